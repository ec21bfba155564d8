// One request from Generate to its last picture: sent, shown, cancelled, or failed.
import { make } from "./api.js";
import { $, count, formatSeconds, announce } from "./dom.js";
import { readPictures } from "./controls.js";
import * as form from "./form.js";
import { addShot } from "./gallery.js";
import { input, packInput } from "./input.js";
import { askForKey } from "./api-key.js";
import * as stage from "./stage.js";

let running = null; // the run's AbortController

export const isRunning = () => running !== null;
export const cancel = () => running?.abort();

export async function generate(actions) {
  if (running) return;
  form.clearMarks();
  $("error").replaceChildren();
  const wrong = form.validate();
  if (wrong) return form.markField(...wrong);
  const fields = form.readFields();
  const used = input && { ...input, mask: input.mask.copy() };
  const asked = { fields, input: used, pictures: readPictures() };
  running = new AbortController();
  setRunning(true);
  stage.begin(fields.n, shapeOf(fields.size), used?.url);
  $("stage").scrollIntoView({ block: "nearest" });
  const shots = [];
  try {
    await follow(asked, shots, actions);
    finish(shots, stage.end(), actions);
  } catch (error) {
    error.made = shots.length;
    fail(error, stage.end(), () => generate(actions));
  } finally {
    running = null;
    setRunning(false);
  }
}

/** Shows the events of one request, and puts its pictures into `shots`. */
async function follow(asked, shots, actions) {
  const started = Date.now();
  const { fields, pictures } = asked;
  const input = await packInput(asked.input);
  for await (const event of make(fields, input, pictures, running.signal)) {
    if (event.what === "waiting") stage.waiting(event);
    else if (event.what === "step") stage.step(event);
    else if (event.what === "partial") stage.put(event.image, event.blob);
    else {
      const shot = await toShot(event, asked, (Date.now() - started) / 1000);
      shots.push(shot);
      stage.finish(event.image, shot, () => actions.show(shot));
      addShot(shot, actions);
    }
  }
}

/** A finished picture with everything needed to make it again. */
async function toShot({ blob, seed, warnings }, { fields, ...brought }, seconds) {
  const { width, height } = await createImageBitmap(blob);
  const url = URL.createObjectURL(blob);
  const again = { ...fields, n: 1, seed: seed ?? (fields.n === 1 ? fields.seed : undefined) };
  const when = new Date();
  return {
    blob,
    url,
    width,
    height,
    seconds,
    when,
    fields: again,
    ...brought,
    warnings: warnings ?? [],
  };
}

function finish(shots, { seconds }, actions) {
  const time = formatSeconds(seconds);
  if (shots.length > 1)
    return stage.note(
      `${count(shots.length, "picture")} in ${time}`,
      "Choose one to see it large.",
    );
  actions.show(shots[0]);
  announce(`Done in ${time}. Seed ${shots[0].fields.seed ?? "unknown"}.`);
}

function fail(error, { at }, again) {
  if (error.name === "AbortError") return stage.note(`Cancelled ${at}`);
  form.markField(error.param, error.message);
  if (error.status !== 401) return stage.showError(error, again);
  stage.showError(error, () => askForKey(again), "Enter a key");
  askForKey(again);
}

/** Width and height of the picture to come, for its frame. */
export function shapeOf(size) {
  if (size === "auto" && input) return [input.width, input.height];
  const known = size === "auto" ? (form.chosenModel().default_size ?? "1024x1024") : size;
  const [width, height] = known.split("x").map(Number);
  return width > 0 && height > 0 ? [width, height] : [1024, 1024];
}

function setRunning(is) {
  const [shown, gone] = is ? [$("cancel"), $("generate")] : [$("generate"), $("cancel")];
  const focused = document.activeElement === gone;
  [shown.hidden, gone.hidden] = [false, true];
  if (focused) shown.focus({ preventScroll: true }); // the picture stays in view
}
