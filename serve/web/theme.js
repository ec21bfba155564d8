"use strict";
// Runs before the page is drawn, so that a chosen theme never flashes in from the other one.
const theme = (() => {
  const NAMES = ["system", "light", "dark"];

  function recall() {
    try {
      return localStorage.getItem("rayjobs.theme") ?? "system";
    } catch {
      return "system"; // storage is blocked
    }
  }

  function apply(name) {
    if (name === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
  }

  function choose(name) {
    apply(name);
    try {
      localStorage.setItem("rayjobs.theme", name);
    } catch {
      // Chosen for this visit only.
    }
  }

  const after = (name) => NAMES[(NAMES.indexOf(name) + 1) % NAMES.length];
  apply(recall());
  return { recall, choose, after };
})();
