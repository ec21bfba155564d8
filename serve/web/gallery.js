// The pictures of this visit, newest first, each with its actions.
import { $, button, count, icon, formatSeconds, node, announce } from "./dom.js";

const KEPT = 200; // older ones are released, to save memory
let shots = [];

const ACTIONS = [
  ["download", "download", "Download"],
  ["useAsInput", "input", "Use as input"],
  ["reuse", "reuse", "Reuse settings"],
  ["copyCurl", "terminal", "Copy as curl"],
  ["copyPython", "code", "Copy as Python"],
];

export function addShot(shot, actions) {
  shots.unshift(shot);
  $("gallery").hidden = false;
  $("gallery-count").textContent = count(shots.length, "picture");
  $("shots").prepend(tile(shot, actions));
  for (const { url } of shots.splice(KEPT)) URL.revokeObjectURL(url);
  while ($("shots").children.length > KEPT) $("shots").lastChild.remove();
}

function tile(shot, actions) {
  const img = node("img", { src: shot.url, alt: "", loading: "lazy" });
  const label = `Show: ${shot.fields.prompt}, seed ${shot.fields.seed ?? "unknown"}`;
  const show = () => actions.show(shot);
  const open = button({ class: "thumb", "aria-label": label, onclick: show }, img);
  return node(
    "li",
    {},
    open,
    node("p", { class: "words", title: shot.fields.prompt }, shot.fields.prompt),
    facts(shot),
    actionButtons(shot, actions),
  );
}

function facts(shot) {
  const time = shot.when.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const seed = node("span", {}, `Seed ${shot.fields.seed ?? "unknown"}`);
  return node(
    "p",
    { class: "facts" },
    seed,
    node("time", { datetime: shot.when.toISOString() }, `${time}, ${formatSeconds(shot.seconds)}`),
  );
}

/** The buttons of a picture, with labels where there is room for them. */
export function actionButtons(shot, actions, withLabels = false) {
  const hasFiles = shot.input || shot.pictures.length;
  const all = hasFiles ? [...ACTIONS, ["saveInput", "files", "Save input files"]] : ACTIONS;
  const made = all.map(([action, drawing, label]) => {
    const act = async ({ currentTarget }) => confirm(currentTarget, await actions[action](shot));
    const name = withLabels ? {} : { "aria-label": label, title: label };
    const inside = [icon(drawing), withLabels ? node("span", {}, label) : null];
    return button({ class: "plain", "data-action": action, onclick: act, ...name }, ...inside);
  });
  return node("div", { class: "actions" }, ...made);
}

/** Shows beside the button what it has done, if the action returned a message. */
function confirm({ dataset }, message) {
  if (!message) return;
  announce(message);
  dataset.message = message;
  setTimeout(() => delete dataset.message, 1600);
}

/** The caption of a picture that is shown large. */
export function caption(shot, actions) {
  const { fields } = shot;
  const seed = node("span", {}, `Seed ${fields.seed ?? "unknown"}`);
  const use = button({ class: "link", onclick: () => actions.useSeed(shot) }, "Use this seed");
  const parts = [
    `${shot.width} × ${shot.height}`,
    fields.num_inference_steps && count(fields.num_inference_steps, "step"),
    fields.sampler,
    formatSeconds(shot.seconds),
  ];
  const rest = node("span", {}, parts.filter(Boolean).join(", "));
  return [
    node("p", { class: "prompt" }, fields.prompt),
    node("p", { class: "facts" }, seed, fields.seed === undefined ? null : use, rest),
    ...shot.warnings.map((warning) => node("p", { class: "warning" }, warning)),
    actionButtons(shot, actions, true),
  ];
}
