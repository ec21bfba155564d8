// The settings: filled from the server's models, read into the API's fields and written back.
import { fieldOf, fillControls, readControls, writeControls } from "./controls.js";
import { $, fillTrack, node } from "./dom.js";
import { fillLoras, readLoras, writeLoras } from "./loras.js";
import { recall, remember } from "./session.js";

const PLAIN = ["prompt", "negative_prompt", "prompt_syntax", "model", "sampler", "seed"];
const NUMBERS = ["num_inference_steps", "guidance_scale"];
const MARKED = [...PLAIN, ...NUMBERS, "size", "n", "loras", "controls", "strength", "image"];
const PARAMS = {
  mask: "image",
  control_image: "controls",
  steps: "num_inference_steps",
  width: "size",
  height: "size",
};
const EXAMPLES = [
  "a lighthouse on a cliff at dusk, oil painting",
  "a red fox asleep in fresh snow, photograph",
  "a bowl of ramen on a wooden table, seen from above",
  "a small robot watering flowers, watercolour",
]; // where a model names none of its own
const SHOWN = 4;
let models = [];
let hasInput = false;

export const chosenModel = () => models.find(({ id }) => id === $("model").value) ?? {};
export const limitsOf = (model) => model.limits ?? {};

/** Puts the server's models into the list, keeping what is chosen where it is still there. */
export function fillModels(list) {
  models = list;
  const kept = $("model").value;
  const bases = list.filter(({ kind }) => kind === "model");
  const options = bases.map(({ id, loaded }) =>
    node("option", { value: id }, loaded === false ? `${id} (not loaded)` : id),
  );
  $("model").replaceChildren(...options);
  if (bases.some(({ id }) => id === kept)) $("model").value = kept;
  fitModel();
}

/** Makes every other field fit the chosen model. */
function fitModel() {
  const model = chosenModel();
  const { max_steps: steps = 100, max_n: most = 4, max_side: side } = limitsOf(model);
  fillLoras(namesOf("lora", [model.id]));
  fillControls(namesOf("control", [model.id, model.base]), side);
  fillSizes(model);
  for (const name of ["num_inference_steps"]) for (const input of pairOf(name)) input.max = steps;
  for (const radio of $("n").querySelectorAll("input")) radio.disabled = Number(radio.value) > most;
  const samplers = (model.samplers ?? []).map((name) => node("option", { value: name }, name));
  refill($("sampler"), [node("option", { value: "" }, "Model's own"), ...samplers]);
  for (const name of [...NUMBERS, "strength"]) setDefault(name, model.defaults?.[name]);
  showHint();
}

/** Names of what can go with a model: what is for one of these, or for any. */
function namesOf(wanted, bases) {
  const fits = ({ kind, base }) => kind === wanted && (!base || bases.includes(base));
  return models.filter(fits).map(({ id }) => id);
}

/** New options, and the old choice where it is among them. */
function refill(select, options) {
  const kept = select.value;
  select.replaceChildren(...options);
  if (options.some(({ value }) => value === kept)) select.value = kept;
}

/** A field that was not edited follows the model. */
function setDefault(name, value) {
  const field = $(name);
  const untouched = field.value === "" || field.value === field.dataset.default;
  field.dataset.default = value ?? "";
  if (untouched) field.value = value ?? "";
  follow(name);
}

function fillSizes({ default_size: own, sizes = [] }) {
  const pretty = (size) => size.replace("x", "×");
  const auto = hasInput ? "As the picture" : own ? `Auto, ${pretty(own)}` : "Auto";
  const options = (sizes ?? []).map((size) => node("option", { value: size }, pretty(size)));
  const custom = node("option", { value: "custom" }, "Other…");
  refill($("size"), [node("option", { value: "auto" }, auto), ...options, custom]);
  fitSize();
}

function fitSize() {
  const { size_multiple: step, min_side: min, max_side: max } = limitsOf(chosenModel());
  const [width, height] = (chosenModel().default_size ?? "1024x1024").split("x");
  for (const [name, own] of [
    ["width", width],
    ["height", height],
  ]) {
    if (step) Object.assign($(name), { step, min, max });
    if (!$(name).value) $(name).value = own;
  }
  $("custom").hidden = $("size").value !== "custom";
}

/** Example prompts of the chosen model and LoRAs. */
export function hints() {
  const names = [...readLoras().map(({ name }) => name), chosenModel().id];
  const own = names.flatMap((name) => models.find(({ id }) => id === name)?.prompt_hints ?? []);
  return [...new Set(own.length || !models.length ? own : EXAMPLES)].slice(0, SHOWN);
}

function showHint() {
  const [hint] = hints();
  $("prompt").placeholder = hint ? `For example: ${hint}` : "What should the picture show?";
}

const pairOf = (name) => [$(name), ...document.querySelectorAll(`[data-for=${name}]`)];

function follow(name) {
  for (const range of document.querySelectorAll(`[data-for=${name}]`)) {
    range.value = $(name).value;
    range.classList.toggle("unset", $(name).value === "");
    fillTrack(range);
  }
}

/** Whether there is a picture to start from: it has a strength, and a size of its own. */
export function setHasInput(has) {
  hasInput = has;
  $("strength-box").hidden = !has;
  fillSizes(chosenModel());
}

function readSize() {
  return $("size").value === "custom"
    ? `${$("width").value}x${$("height").value}`
    : $("size").value || "auto";
}

/** The API's fields. What is left empty is left to the server. */
export function readFields() {
  const fields = {};
  for (const name of PLAIN) if ($(name).value.trim()) fields[name] = $(name).value.trim();
  if (fields.seed) fields.seed = Number(fields.seed);
  fields.n = Number($("n").querySelector(":checked").value);
  fields.size = readSize();
  const numbers = hasInput ? [...NUMBERS, "strength"] : NUMBERS;
  for (const name of numbers) if ($(name).value !== "") fields[name] = Number($(name).value);
  const loras = readLoras();
  if (loras.length) fields.loras = loras;
  const controls = readControls();
  if (controls.length) fields.controls = controls;
  return fields;
}

/** Errors that the server could not detect: [field, message], or null. */
export function validate() {
  if (!$("prompt").value.trim()) return ["prompt", "Say what the picture should show."];
  const seed = $("seed").value.trim();
  if (seed && !(/^\d+$/.test(seed) && Number.isSafeInteger(Number(seed)))) {
    return ["seed", "A seed is a whole number of up to 15 digits, or nothing for a random one."];
  }
  const wrong = wrongSize();
  return wrong && ["size", wrong];
}

/** What the server would say of a size that was typed. */
function wrongSize() {
  const { size_multiple: step, min_side: min, max_side: max, max_pixels: most } =
    limitsOf(chosenModel());
  if ($("size").value !== "custom" || !step) return null;
  const sides = [$("width").value, $("height").value].map(Number);
  if (sides.some((side) => side < min || side > max || side % step))
    return `Not ${sides.join(" × ")}: each is a multiple of ${step} from ${min} to ${max}.`;
  const pixels = sides[0] * sides[1];
  if (pixels <= most) return null;
  return `${sides.join(" × ")} are ${pixels} pixels. This server makes up to ${most}.`;
}

/** Sets the form; `pictures` are those that controls follow. */
export function writeFields(fields, pictures = []) {
  const known = new Set([...$("model").options].map(({ value }) => value));
  for (const name of PLAIN) {
    if (name !== "model" || known.has(fields.model)) $(name).value = fields[name] ?? "";
  }
  for (const name of [...NUMBERS, "strength"])
    $(name).value = fields[name] ?? $(name).dataset.default ?? "";
  const radio = $("n").querySelector(`[value="${fields.n ?? 1}"]`);
  if (radio) radio.checked = true;
  fitModel();
  writeSize(fields.size ?? "auto");
  writeLoras(fields.loras ?? []);
  writeControls(fields.controls ?? [], pictures);
  showHint();
}

function writeSize(size) {
  const listed = [...$("size").options].some(({ value }) => value === size);
  $("size").value = listed ? size : "custom";
  if (!listed) [$("width").value, $("height").value] = size.split("x");
  fitSize();
}

/** Marks the field that an error belongs to; false where the page has no such field. */
export function markField(param, message) {
  const [place, at] = String(param).split("."); // of loras.0.scale, say
  const name = PARAMS[place] ?? place;
  if (!MARKED.includes(name) || !$(`${name}-wrong`)) return false;
  $(`${name}-wrong`).textContent = message;
  const field = placeOf(name, at);
  field.setAttribute("aria-invalid", "true");
  field.focus();
  return true;
}

function placeOf(name, at) {
  if (name === "image") return $("file");
  if (name === "n") return $("n").querySelector(":checked");
  return (name === "controls" && fieldOf(at)) || $(name);
}

export function clearMarks() {
  for (const place of document.querySelectorAll(".wrong")) place.textContent = "";
  for (const field of document.querySelectorAll("[aria-invalid]"))
    field.removeAttribute("aria-invalid");
}

export function saveForm() {
  remember("fields", JSON.stringify(readFields()));
}

/** Restores what was in the form before a reload. */
export function restoreForm() {
  const kept = recall("fields");
  if (kept) writeFields(JSON.parse(kept));
}

export function setupForm() {
  $("model").addEventListener("change", fitModel);
  $("loras").addEventListener("change", showHint);
  $("size").addEventListener("change", fitSize);
  for (const range of document.querySelectorAll("[data-for]")) {
    const field = $(range.dataset.for);
    range.addEventListener("input", () => ((field.value = range.value), follow(field.id)));
    field.addEventListener("input", () => follow(field.id));
  }
}
