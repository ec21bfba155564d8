// Paints a mask over the input picture: with a pointer, or with arrow keys and space.
import { $, fillTrack, announce } from "./dom.js";
import { drawStroke } from "./mask.js";

const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
let input = null;
let tool = "brush";
let stroke = null; // the one being painted
let at = [0, 0]; // the brush, in pixels of the picture
let changed = () => {};

export function openPainter(newInput, whenChanged) {
  [input, changed] = [newInput, whenChanged];
  at = [input.width / 2, input.height / 2];
  $("sheet").querySelector("img").src = input.url;
  redraw();
  showRing(false);
}

/** A brush of about an eighth of the picture fits most things one would change. */
const sizeOf = () => (Number($("brush-size").value) / 100) * Math.min(input.width, input.height);

function redraw() {
  input.mask.draw($("film"));
  $("paint-undo").disabled = $("paint-clear").disabled = !input.mask.strokes.length;
  changed();
}

function context() {
  return $("film").getContext("2d");
}

function place(event) {
  const box = $("film").getBoundingClientRect();
  const scale = input.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}

function start(point) {
  stroke = input.mask.add({ tool, size: sizeOf(), points: [point] });
  drawStroke(context(), stroke, input.mask);
}

function extend(points) {
  const from = stroke.points.length;
  stroke.points.push(...points);
  drawStroke(context(), stroke, input.mask, from);
}

function finish() {
  if (!stroke) return;
  stroke = null;
  redraw();
}

function onDown(event) {
  if (event.button > 0) return;
  event.target.setPointerCapture(event.pointerId);
  at = place(event);
  start(at);
  showRing(true);
}

function onMove(event) {
  at = place(event);
  const all = event.getCoalescedEvents?.() ?? []; // finer than what moves the ring
  if (stroke) extend((all.length ? all : [event]).map(place));
  showRing(true);
}

function showRing(shown) {
  const ring = $("ring");
  ring.hidden = !shown;
  ring.style.left = `${(at[0] / input.width) * 100}%`;
  ring.style.top = `${(at[1] / input.height) * 100}%`;
  const across = (sizeOf() / input.width) * $("film").clientWidth;
  ring.style.width = ring.style.height = `${across}px`;
}

function choose(name) {
  tool = name;
  for (const button of document.querySelectorAll("[data-tool]")) {
    button.setAttribute("aria-pressed", button.dataset.tool === name);
  }
}

function whole(name) {
  input.mask.add({ tool: name });
  redraw();
}

function undo() {
  input.mask.undo();
  redraw();
}

function resize(by) {
  const size = $("brush-size");
  size.value = Number(size.value) + by;
  fillTrack(size);
  showRing(true);
}

function onKey(event) {
  if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) undo();
  else if (event.ctrlKey || event.metaKey || event.altKey) return;
  else if (KEYS[event.key]) step(KEYS[event.key], event.shiftKey);
  else if (event.key === " ") dab();
  else if (event.key === "e") choose(tool === "erase" ? "brush" : "erase");
  else if (event.key === "[") resize(-2);
  else if (event.key === "]") resize(2);
  else return;
  event.preventDefault();
}

function dab() {
  start(at);
  finish();
  announce(`${tool === "erase" ? "Erased" : "Painted"} ${whereabouts()}`);
}

/** A quarter of the brush at a time; with shift it paints on the way. */
function step([right, down], painting) {
  const by = Math.max(sizeOf() / 4, 1);
  const to = [clamp(at[0] + right * by, input.width), clamp(at[1] + down * by, input.height)];
  if (painting) {
    start(at);
    extend([to]);
    finish();
  }
  at = to;
  showRing(true);
  announce(whereabouts());
}

const clamp = (value, most) => Math.min(Math.max(value, 0), most);
const percent = (value, whole) => `${Math.round((value / whole) * 100)}%`;
const whereabouts = () =>
  `at ${percent(at[0], input.width)} across, ${percent(at[1], input.height)} down`;

export function setupPainter() {
  const film = $("film");
  film.addEventListener("pointerdown", onDown);
  film.addEventListener("pointermove", onMove);
  for (const name of ["pointerup", "pointercancel"]) film.addEventListener(name, finish);
  film.addEventListener("pointerleave", () => showRing(false));
  film.addEventListener("keydown", onKey);
  film.addEventListener("focus", () => film.matches(":focus-visible") && showRing(true));
  film.addEventListener("blur", () => showRing(false));
  for (const button of document.querySelectorAll("[data-tool]")) {
    button.addEventListener("click", () => choose(button.dataset.tool));
  }
  $("brush-size").addEventListener("input", () => (fillTrack($("brush-size")), showRing(true)));
  fillTrack($("brush-size"));
  $("brush-size").addEventListener("change", () => showRing(false));
  $("paint-whole").addEventListener("click", () => whole("whole"));
  $("paint-invert").addEventListener("click", () => whole("invert"));
  $("paint-undo").addEventListener("click", undo);
  $("paint-clear").addEventListener("click", () => (input.mask.clear(), redraw()));
}
