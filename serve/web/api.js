// Calls the server's API: the list of models, and streams of pictures.
import { recall } from "./session.js";
import { events } from "./stream.js";
import { errorOf, RequestError } from "./errors.js";

const keyHeader = () => (recall("key") ? { Authorization: `Bearer ${recall("key")}` } : {});

async function call(path, init = {}) {
  let response;
  try {
    response = await fetch(path, { ...init, headers: { ...init.headers, ...keyHeader() } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError(error.message, { kind: "unreachable" });
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

export async function loadModels() {
  return (await (await call("v1/models")).json()).data ?? [];
}

export async function loadOf() {
  return (await (await call("v1/load")).json()).data ?? [];
}

/** The API's fields, where `imageOf` gives the image of a control by its name. */
export function withImages({ controls, ...fields }, imageOf) {
  if (!controls) return fields;
  const filled = controls.map(({ name, ...rest }) => ({ name, image: imageOf(name), ...rest }));
  return { ...fields, controls: filled };
}

/**
 * Path and options of a fetch. `input` is {picture, mask}, two blobs; mask may be null. `pictures`
 * are those that the fields' controls follow.
 */
async function buildRequest(fields, input, pictures) {
  const all = { ...fields, stream: true, partial_images: 3, progress: true, output_format: "png" };
  if (input) return ["v1/images/edits", { method: "POST", body: buildForm(all, input, pictures) }];
  const headers = { "Content-Type": "application/json" };
  const urls = new Map();
  for (const { name, picture } of pictures) urls.set(name, await toDataUrl(picture));
  const body = JSON.stringify(withImages(all, (name) => urls.get(name)));
  return ["v1/images/generations", { method: "POST", headers, body }];
}

function buildForm(fields, input, pictures) {
  const form = new FormData();
  form.append("image", input.picture, "input.png");
  if (input.mask) form.append("mask", input.mask, "mask.png");
  const files = new Map(pictures.map(({ name, file }) => [name, file]));
  for (const { file, picture } of pictures) form.append("control_image", picture, file);
  const named = withImages(fields, (name) => files.get(name));
  for (const [name, value] of Object.entries(named)) {
    form.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  return form;
}

function toDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/**
 * Requests pictures and yields events: {what: "waiting", position, seconds},
 * {what: "step", image, step, steps, seconds_left}, {what: "partial", image, blob} and
 * {what: "done", image, blob, seed, warnings}. Ends with the last, or throws a RequestError.
 */
export async function* make(fields, input, pictures, signal) {
  const [path, init] = await buildRequest(fields, input, pictures);
  const response = await call(path, { ...init, signal });
  let image = 0; // images come one after another
  for await (const event of responseEvents(response)) {
    if (event.error) {
      const { message, param, code } = event.error;
      throw new RequestError(message ?? "No reason was given.", { kind: "failed", param, code });
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
    throw new RequestError("The answer ended before its last picture.", { kind: "lost" });
}

/** The events of a response, whether it is a stream or JSON. */
async function* responseEvents(response) {
  if ((response.headers.get("content-type") ?? "").includes("json")) {
    for (const picture of (await response.json()).data ?? [])
      yield { type: ".completed", ...picture };
    return;
  }
  try {
    yield* events(response.body);
  } catch (error) {
    if (error.name === "AbortError" || error instanceof RequestError) throw error;
    throw new RequestError(error.message, { kind: "lost" });
  }
}

function toBlob({ b64_json, output_format }) {
  const bytes = Uint8Array.from(atob(b64_json), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: `image/${output_format ?? "png"}` });
}
