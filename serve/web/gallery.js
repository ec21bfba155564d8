// What was made in this visit, newest first, and what can be done with each.
import { $, button, count, icon, inWords, node, say } from "./dom.js";

const KEPT = 200; // older ones are let go, for the memory's sake
let shots = [];

const VERBS = [
  ["download", "download", "Download"],
  ["useAsInput", "input", "Use as input"],
  ["reuse", "reuse", "Reuse settings"],
  ["copyCurl", "terminal", "Copy as curl"],
  ["copyPython", "code", "Copy as Python"],
];

export function addShot(shot, verbs) {
  shots.unshift(shot);
  $("gallery").hidden = false;
  $("gallery-count").textContent = count(shots.length, "picture");
  $("shots").prepend(tile(shot, verbs));
  for (const { url } of shots.splice(KEPT)) URL.revokeObjectURL(url);
  while ($("shots").children.length > KEPT) $("shots").lastChild.remove();
}

function tile(shot, verbs) {
  const img = node("img", { src: shot.url, alt: "", loading: "lazy" });
  const label = `Show: ${shot.fields.prompt}, seed ${shot.fields.seed ?? "unknown"}`;
  const show = () => verbs.show(shot);
  const open = button({ class: "thumb", "aria-label": label, onclick: show }, img);
  return node(
    "li",
    {},
    open,
    node("p", { class: "words", title: shot.fields.prompt }, shot.fields.prompt),
    facts(shot),
    actions(shot, verbs),
  );
}

function facts(shot) {
  const time = shot.when.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const seed = node("span", {}, `Seed ${shot.fields.seed ?? "unknown"}`);
  return node(
    "p",
    { class: "facts" },
    seed,
    node("time", { datetime: shot.when.toISOString() }, `${time}, ${inWords(shot.seconds)}`),
  );
}

/** The buttons of a picture, with words where there is room for them. */
export function actions(shot, verbs, wordy = false) {
  const all = shot.input ? [...VERBS, ["saveInput", "files", "Save input files"]] : VERBS;
  const made = all.map(([verb, drawing, words]) => {
    const act = async ({ currentTarget }) => confirm(currentTarget, await verbs[verb](shot));
    const name = wordy ? {} : { "aria-label": words, title: words };
    const inside = [icon(drawing), wordy ? node("span", {}, words) : null];
    return button({ class: "plain", "data-verb": verb, onclick: act, ...name }, ...inside);
  });
  return node("div", { class: "actions" }, ...made);
}

/** Tells beside the button what it has done, if it has words for that. */
function confirm({ dataset }, said) {
  if (!said) return;
  say(said);
  dataset.said = said;
  setTimeout(() => delete dataset.said, 1600);
}

/** What is told below a picture that is shown large. */
export function caption(shot, verbs) {
  const { fields } = shot;
  const seed = node("span", {}, `Seed ${fields.seed ?? "unknown"}`);
  const use = button({ class: "link", onclick: () => verbs.useSeed(shot) }, "Use this seed");
  const parts = [
    `${shot.width} × ${shot.height}`,
    fields.num_inference_steps && count(fields.num_inference_steps, "step"),
    fields.sampler,
    inWords(shot.seconds),
  ];
  const rest = node("span", {}, parts.filter(Boolean).join(", "));
  return [
    node("p", { class: "prompt" }, fields.prompt),
    node("p", { class: "facts" }, seed, fields.seed === undefined ? null : use, rest),
    ...shot.warnings.map((warning) => node("p", { class: "warning" }, warning)),
    actions(shot, verbs, true),
  ];
}
