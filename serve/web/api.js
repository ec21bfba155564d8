// The server's side of the conversation: which models there are, and one picture after another.
import { recall } from "./memory.js";
import { events } from "./stream.js";
import { refusal, Trouble } from "./trouble.js";

const keyHeader = () => (recall("key") ? { Authorization: `Bearer ${recall("key")}` } : {});

async function call(path, init = {}) {
  let response;
  try {
    response = await fetch(path, { ...init, headers: { ...init.headers, ...keyHeader() } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble(error.message, { kind: "unreachable" });
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

export async function loadModels() {
  return (await (await call("v1/models")).json()).data ?? [];
}

/** Fields as the API names them. `input` is {picture, mask}, both blobs, mask perhaps null. */
function letter(fields, input) {
  const all = { ...fields, stream: true, partial_images: 3, progress: true, output_format: "png" };
  if (!input) {
    const headers = { "Content-Type": "application/json" };
    return ["v1/images/generations", { method: "POST", headers, body: JSON.stringify(all) }];
  }
  const form = new FormData();
  form.append("image", input.picture, "input.png");
  if (input.mask) form.append("mask", input.mask, "mask.png");
  for (const [name, value] of Object.entries(all)) {
    form.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  return ["v1/images/edits", { method: "POST", body: form }];
}

/**
 * Asks for pictures and yields what happens to them: {what: "waiting", position, seconds},
 * {what: "step", image, step, steps, seconds_left}, {what: "partial", image, blob} and
 * {what: "done", image, blob, seed, warnings}. Ends with the last, or throws a Trouble.
 */
export async function* make(fields, input, signal) {
  const [path, init] = letter(fields, input);
  const response = await call(path, { ...init, signal });
  let image = 0; // images come one after another
  for await (const event of told(response)) {
    if (event.error) {
      const { message, param, code } = event.error;
      throw new Trouble(message ?? "No reason was given.", { kind: "failed", param, code });
    }
    const kind = event.type ?? "";
    if (kind === "rayjobs.waiting") yield { what: "waiting", ...event };
    else if (kind === "rayjobs.step")
      yield { what: "step", image: event.image_index ?? image, ...event };
    else if (kind.endsWith(".partial_image")) yield { what: "partial", image, blob: toBlob(event) };
    else if (kind.endsWith(".completed"))
      yield { what: "done", image: image++, ...event, blob: toBlob(event) };
  }
  if (image < (fields.n ?? 1))
    throw new Trouble("The answer ended before its last picture.", { kind: "lost" });
}

/** The events of an answer, also of one that did not care to stream. */
async function* told(response) {
  if ((response.headers.get("content-type") ?? "").includes("json")) {
    for (const picture of (await response.json()).data ?? [])
      yield { type: ".completed", ...picture };
    return;
  }
  try {
    yield* events(response.body);
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Trouble) throw error;
    throw new Trouble(error.message, { kind: "lost" });
  }
}

function toBlob({ b64_json, output_format }) {
  const bytes = Uint8Array.from(atob(b64_json), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: `image/${output_format ?? "png"}` });
}
