// What the server does for everybody: pictures in progress and waiting, by model.
import { loadOf } from "./api.js";
import { $, count } from "./dom.js";

const EVERY_MS = 5000;

function words({ in_progress: made, waiting, replicas }) {
  const where = replicas ? count(replicas, "replica") : "in no replica's memory yet";
  if (!made && !waiting) return `Idle, ${where}`;
  return `${count(made, "picture")} in progress, ${waiting} waiting, ${where}`;
}

/** Shows it below the chosen model; what cannot be had is not shown. */
export async function showLoad() {
  let text = "";
  try {
    const model = (await loadOf()).find(({ id }) => id === $("model").value);
    if (model) text = words(model);
  } catch {
    // The pictures' own requests say what is wrong.
  }
  $("load").textContent = text;
}

let timer = null;

/** Keeps it fresh from now on, while the page is looked at. */
export function setupLoad() {
  if (timer) return;
  const look = () => document.visibilityState === "visible" && showLoad();
  $("model").addEventListener("change", look);
  document.addEventListener("visibilitychange", look);
  timer = setInterval(look, EVERY_MS);
  look();
}
