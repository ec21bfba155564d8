// One request from Generate to its last picture: sent, followed, cancelled, or failed.
import { make } from "./api.js";
import { $, count, inWords, say } from "./dom.js";
import * as form from "./form.js";
import { addShot } from "./gallery.js";
import { input, packInput } from "./input.js";
import { askForKey } from "./key.js";
import * as stage from "./stage.js";

let running = null; // the run's AbortController

export const isRunning = () => running !== null;
export const cancel = () => running?.abort();

export async function generate(verbs) {
  if (running) return;
  form.clearMarks();
  $("trouble").replaceChildren();
  const wrong = form.objection();
  if (wrong) return form.pointAt(...wrong);
  const fields = form.readFields();
  const used = input && { ...input, mask: input.mask.copy() };
  running = new AbortController();
  setRunning(true);
  stage.begin(fields.n, shapeOf(fields.size), used?.url);
  try {
    const shots = await follow(fields, used, verbs);
    finish(shots, stage.end(), verbs);
  } catch (error) {
    fail(error, stage.end(), () => generate(verbs));
  } finally {
    running = null;
    setRunning(false);
  }
}

/** Shows what happens to the pictures of one request, and returns them. */
async function follow(fields, used, verbs) {
  const started = Date.now();
  const shots = [];
  for await (const event of make(fields, await packInput(used), running.signal)) {
    if (event.what === "waiting") stage.waiting(event);
    else if (event.what === "step") stage.step(event);
    else if (event.what === "partial") stage.put(event.image, event.blob);
    else {
      const shot = await develop(event, fields, used, (Date.now() - started) / 1000);
      shots.push(shot);
      stage.finish(event.image, shot, () => verbs.show(shot));
      addShot(shot, verbs);
    }
  }
  return shots;
}

/** A finished picture with all that is needed to make it again. */
async function develop({ blob, seed, warnings }, fields, used, seconds) {
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
    input: used,
    warnings: warnings ?? [],
  };
}

function finish(shots, { seconds }, verbs) {
  const time = inWords(seconds);
  if (shots.length > 1)
    return stage.note(
      `${count(shots.length, "picture")} in ${time}`,
      "Choose one to see it large.",
    );
  verbs.show(shots[0]);
  say(`Done in ${time}. Seed ${shots[0].fields.seed ?? "unknown"}.`);
}

function fail(error, { at }, again) {
  if (error.name === "AbortError") return stage.note(`Cancelled ${at}`);
  form.pointAt(error.param, error.message);
  if (error.status !== 401) return stage.showTrouble(error, again);
  stage.showTrouble(error, () => askForKey(again), "Enter a key");
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
  if (focused) shown.focus();
  if (is) $("stage").scrollIntoView({ block: "nearest" });
}
