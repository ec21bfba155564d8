// The picture area: the picture as it forms, the progress, and errors.
import { $, button, count, formatSeconds, node, announce } from "./dom.js";
import { drawNoise } from "./noise.js";
import { explain } from "./errors.js";

const LARGEST = 7; // screen pixels for one of the picture
let run = null; // {many, shape, cells, done: [steps of each], total, started, ...}
let clock = null;
let empty = false;

export const isEmpty = () => empty;
const isRunning = () => document.body.classList.contains("running");

/** A shape for the style sheet; small pictures are not blown up without end. */
function setShape(element, [width, height]) {
  element.style.setProperty("--ratio", width / height);
  element.style.setProperty("--most", `${width * LARGEST}px`);
}

/** Puts frames of one shape onto the mat. */
function arrange(cells, shape) {
  const columns = cells.length > 1 ? 2 : 1;
  const frames = $("frames");
  setShape(frames, shape);
  frames.style.setProperty("--columns", columns);
  frames.style.setProperty("--rows", Math.ceil(cells.length / columns));
  frames.replaceChildren(...cells);
  frames.hidden = empty = false;
  $("painter").hidden = $("paint-tools").hidden = true;
  const old = isRunning()
    ? ["hint", "caption", "error"]
    : ["hint", "caption", "error", "status"];
  for (const name of old) $(name).replaceChildren();
}

function noiseCell(tag, attributes) {
  const noise = node("canvas", { class: "noise", "aria-hidden": "true" });
  drawNoise(noise);
  return node(tag, { class: "cell", ...attributes }, noise);
}

/** Nothing yet: pictures begin as noise, and this is the noise. */
export function showEmpty(shape, hints, use) {
  arrange([noiseCell("div", {})], shape);
  const chips = hints.map((hint) => {
    return node("button", { type: "button", class: "chip", onclick: () => use(hint) }, hint);
  });
  const words = "Every picture starts as noise. Say what this one should become.";
  $("hint").replaceChildren(node("span", {}, words), ...chips);
  empty = true;
}

/** Frames for a run; `backdrop` is the picture it starts from. */
export function begin(many, shape, backdrop) {
  const cells = Array.from({ length: many }, (_, at) => {
    const label = `Picture ${at + 1} of ${many}`;
    const button = { type: "button", disabled: true, "aria-label": label };
    const cell = many > 1 ? noiseCell("button", button) : noiseCell("div", {});
    if (backdrop) cell.append(node("img", { src: backdrop, alt: "", class: "backdrop" }));
    return cell;
  });
  arrange(cells, shape);
  document.body.classList.add("running");
  run = { many, shape, cells, done: Array(many).fill(0), total: 0, started: Date.now() };
  clock = setInterval(updateStatus, 250);
  updateStatus();
  announce("Sent");
}

/** Back from a finished picture to the one being made. */
const watch = () => arrange(run.cells, run.shape);

export function waiting({ position, seconds }) {
  if (run.waiting?.position !== position)
    announce(position ? `${count(position, "request")} ahead of you` : "You are next");
  run.waiting = { position, until: Date.now() + seconds * 1000 };
  updateStatus();
}

export function step({ image, step: done, steps, seconds_left: left }) {
  if (!run.total) announce(`Started, ${count(steps, "step")}`);
  run.done[image] = done;
  Object.assign(run, { total: steps, image, left: Date.now() + left * 1000 });
  updateStatus();
}

/** Lays a newer picture over the older one. */
export function put(image, blob) {
  layOver(run.cells[image], URL.createObjectURL(blob), "The picture as it forms", true);
}

function layOver(cell, url, alt, passing) {
  const picture = node("img", { src: url, alt, class: "forming", "data-passing": passing });
  cell.newest = picture;
  picture.addEventListener("load", () => {
    if (cell.newest !== picture) return drop(picture);
    const older = [...cell.querySelectorAll("img")];
    cell.append(picture);
    setTimeout(() => older.forEach(drop), 450); // once it has faded in
  });
}

function drop(picture) {
  picture.remove();
  if ("passing" in picture.dataset) URL.revokeObjectURL(picture.src);
}

/** A picture of the run is finished; with several, its frame opens it. */
export function finish(image, shot, open) {
  const cell = run.cells[image];
  layOver(cell, shot.url, shot.fields.prompt, false);
  run.done[image] = run.total;
  cell.classList.add("done");
  if (run.many === 1) return;
  cell.disabled = false;
  cell.addEventListener("click", open);
  cell.setAttribute("aria-label", `Picture ${image + 1} of ${run.many}: show it large`);
}

/** How long the run took, and how far it came. */
export function end() {
  clearInterval(clock);
  document.body.classList.remove("running");
  document.title = "rayjobs";
  $("status").replaceChildren();
  $("ruler").hidden = true;
  if (run.many > 1) watch();
  const seconds = (Date.now() - run.started) / 1000;
  const at = run.total ? `at step ${run.done[run.image]} of ${run.total}` : "while waiting";
  return { seconds, at };
}

/** One line of how far the run is, the ruler, and the tab's title. */
function updateStatus() {
  const waited = formatSeconds((Date.now() - run.started) / 1000);
  const left = run.left && (run.left - Date.now()) / 1000;
  if (run.total) {
    const which = run.many > 1 ? `Picture ${run.image + 1} of ${run.many}, step` : "Step";
    const rest = left > 0.3 ? `about ${formatSeconds(left)} left` : "almost there";
    status(`${which} ${run.done[run.image]} of ${run.total}`, rest);
    document.title = `${run.done[run.image]}/${run.total} rayjobs`;
  } else if (run.waiting) {
    const ahead = run.waiting.position
      ? `${count(run.waiting.position, "request")} ahead of you`
      : "You are next";
    const until = (run.waiting.until - Date.now()) / 1000;
    if (until > 0.5) status(ahead, `starts in about ${formatSeconds(until)}`);
    else if (run.waiting.position) status(ahead, `waiting for ${waited}`);
    else status("Making the first step", `${waited} so far`);
  } else {
    status("Sent", `waiting for ${waited}`);
  }
  drawRuler();
}

function status(now, then = "") {
  if (!$("status").children.length) $("status").append(node("b"), node("span"));
  $("status").firstChild.textContent = now;
  $("status").lastChild.textContent = then;
}

/** A tick for each step, filled as they are made. */
function drawRuler() {
  const ruler = $("ruler");
  const done = run.done.reduce((sum, steps) => sum + steps, 0);
  const share = run.total ? done / (run.total * run.many) : 0;
  ruler.hidden = false;
  ruler.classList.toggle("waits", !run.total);
  ruler.style.setProperty("--steps", Math.min(run.total * run.many, 120) || 1);
  ruler.style.setProperty("--share", `${share * 100}%`);
  ruler.setAttribute("aria-valuenow", Math.round(share * 100));
}

/** One finished picture, large, with what is known about it below. */
export function showShot({ url, width, height, fields }, ...caption) {
  const img = node("img", { src: url, alt: fields.prompt });
  arrange([node("div", { class: "cell done" }, img)], [width, height]);
  const back = node(
    "button",
    { type: "button", class: "link", onclick: watch },
    "Back to the picture being made",
  );
  $("caption").replaceChildren(...caption, isRunning() ? back : "");
}

export function showPainter({ width, height }, ...lines) {
  arrange([], [1, 1]);
  setShape($("sheet"), [width, height]);
  $("frames").hidden = true;
  $("painter").hidden = $("paint-tools").hidden = false;
  $("caption").replaceChildren(...lines.map((line) => node("p", { class: "quiet" }, line)));
}

/** Shows how the run ended, where there is no picture. */
export function note(now, then = "") {
  status(now, then);
  announce(`${now}. ${then}`);
}

/** Shows what went wrong; `again` retries, after counting down the time the server asked for. */
export function showError(error, again, words = "Try again") {
  const { title, reason, advice, again: helps } = explain(error);
  const away = button({ class: "plain", onclick: () => $("error").replaceChildren() }, "Dismiss");
  const retry = helps ? againButton(error.wait_s, again, words) : null;
  const parts = [
    node("h2", {}, title),
    reason ? node("p", {}, reason) : null,
    node("p", { class: "quiet" }, advice),
    node("div", { class: "row" }, ...[retry, away].filter(Boolean)),
  ];
  $("error").replaceChildren(node("div", { class: "card" }, ...parts));
}

function againButton(wait_s, again, words) {
  const until = Date.now() + (wait_s ?? 0) * 1000;
  const made = button({ class: "strong", onclick: () => again() });
  const countDown = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    made.textContent = left > 0 ? `${words} in ${left} s` : words;
    if (left > 0 && (made.isConnected || left === Math.ceil(wait_s))) setTimeout(countDown, 250);
  };
  countDown();
  return made;
}
