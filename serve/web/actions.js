// Actions on a finished picture.
import { asCurl, asPython } from "./snippets.js";
import { $, announce } from "./dom.js";
import * as form from "./form.js";
import { caption } from "./gallery.js";
import { openInput } from "./input.js";
import { recall } from "./session.js";
import { showShot } from "./stage.js";

export const actions = {
  show,
  download,
  useAsInput,
  reuse,
  useSeed,
  copyCurl,
  copyPython,
  saveInput,
};

function show(shot) {
  showShot(shot, ...caption(shot, actions));
  $("stage").scrollIntoView({ block: "nearest" });
}

function save(url, name) {
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  link.click();
}

function download({ url, blob, fields }) {
  const words = fields.prompt
    .toLowerCase()
    .replaceAll(/[^\p{L}\p{N}]+/gu, "-")
    .slice(0, 60);
  const kind = blob.type.replace("image/", "");
  save(
    url,
    [words.replaceAll(/^-|-$/g, ""), fields.seed].filter((part) => part !== undefined).join("-") +
      `.${kind}`,
  );
}

/** The files that the copied command reads. */
async function saveInput({ input, pictures }) {
  for (const { url, file } of pictures) save(url, file);
  if (!input) return;
  save(input.url, "input.png");
  if (input.mask.share() > 0) save(URL.createObjectURL(await input.mask.toBlob()), "mask.png");
}

async function useAsInput({ blob, fields }) {
  await openInput(blob, `Seed ${fields.seed ?? "unknown"}`);
  $("prompt").focus();
}

/** Restores the settings of this picture, with its seed and the pictures that it was made from. */
async function reuse({ fields, input, pictures }) {
  await openInput(input?.picture ?? null, input?.name, input?.mask);
  form.writeFields(fields, pictures);
  $("prompt").focus();
  return "Settings restored";
}

function useSeed({ fields }) {
  $("seed").value = fields.seed;
  $("seed").focus();
  announce(`Seed ${fields.seed} is set`);
}

function copyCurl(shot) {
  return copy(asCurl(shot, Boolean(recall("key"))));
}

function copyPython(shot) {
  return copy(asPython(shot, Boolean(recall("key"))));
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyByHand(text);
  }
  return "Copied";
}

/** Without https, browsers have only this old way to copy. */
function copyByHand(text) {
  const area = Object.assign(document.createElement("textarea"), { value: text });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
