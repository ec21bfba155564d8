// Puts the page together and listens to the person before it.
import { loadModels } from "./api.js";
import { verbs } from "./deeds.js";
import { $ } from "./dom.js";
import * as form from "./form.js";
import { readyInput } from "./input.js";
import { askForKey, readyKey } from "./key.js";
import { readyPainter } from "./painter.js";
import { cancel, generate, isRunning, shapeOf } from "./run.js";
import * as stage from "./stage.js";

/** Fills the page with what the server has. */
async function open() {
  try {
    form.fillModels(await loadModels());
    form.recallForm();
    emptyStage();
  } catch (error) {
    if (error.status === 401) return askForKey(open);
    stage.showTrouble(error, open);
  }
}

function emptyStage() {
  stage.showEmpty(shapeOf(form.readFields().size), form.hints(), (hint) => {
    $("prompt").value = hint;
    $("prompt").focus();
  });
}

/** The empty frame has the shape and the hints of what is chosen. */
function onChoice() {
  form.keepForm();
  if (stage.isEmpty()) emptyStage();
}

function submit(event) {
  event.preventDefault();
  form.keepForm();
  generate(verbs);
}

function onKey(event) {
  if (event.isComposing) return; // the keys are an input method's
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    if (!$("key-dialog").open) submit(event);
  } else if (event.key === "Escape" && isRunning() && !$("key-dialog").open) {
    cancel();
  }
}

function showTheme(name) {
  const words = { system: "as the system", light: "light", dark: "dark" }[name];
  $("theme").querySelector("use").setAttribute("href", `#i-${name}`);
  $("theme").setAttribute("aria-label", `Theme: ${words}`);
  $("theme").title = `Theme: ${words}`;
}

function ready() {
  form.readyForm();
  readyInput(emptyStage);
  readyPainter();
  readyKey();
  showTheme(theme.recall());
  $("theme").addEventListener("click", () => {
    const next = theme.after($("theme").querySelector("use").getAttribute("href").slice(3));
    theme.choose(next);
    showTheme(next);
  });
  $("keys").textContent = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵";
  $("form").addEventListener("submit", submit);
  $("form").addEventListener("change", onChoice);
  $("cancel").addEventListener("click", cancel);
  addEventListener("keydown", onKey);
}

ready();
emptyStage();
open();
