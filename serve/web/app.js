// Sets up the page and its event handlers.
import { loadModels } from "./api.js";
import { actions } from "./actions.js";
import { $ } from "./dom.js";
import * as form from "./form.js";
import { setupInput } from "./input.js";
import { askForKey, setupKey } from "./api-key.js";
import { setupLoad } from "./load.js";
import { setupPainter } from "./painter.js";
import { cancel, generate, isRunning, shapeOf } from "./generate.js";
import * as stage from "./stage.js";

/** Fills the page with the server's models. */
async function open() {
  try {
    form.fillModels(await loadModels());
    form.restoreForm();
    emptyStage();
    setupLoad();
  } catch (error) {
    if (error.status === 401) return askForKey(open);
    stage.showError(error, open);
  }
}

function emptyStage() {
  stage.showEmpty(shapeOf(form.readFields().size), form.hints(), (hint) => {
    $("prompt").value = hint;
    $("prompt").focus();
  });
}

/** The empty frame follows the chosen size and model. */
function onChoice() {
  form.saveForm();
  if (stage.isEmpty()) emptyStage();
}

function submit(event) {
  event.preventDefault();
  form.saveForm();
  generate(actions);
}

function onKey(event) {
  if (event.isComposing) return; // the input method uses the keys
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
  form.setupForm();
  setupInput(emptyStage);
  setupPainter();
  setupKey();
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
