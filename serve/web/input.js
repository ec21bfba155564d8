// The picture to start from: dropped, pasted, picked from a file or taken from the gallery.
import { $, announce } from "./dom.js";
import { chosenModel, clearMarks, limitsOf, markField, setHasInput } from "./form.js";
import { Mask } from "./mask.js";
import { openPainter } from "./painter.js";
import { showPainter } from "./stage.js";

const MAX_SIDE = 2048; // where the server names no limit
export let input = null; // {name, picture, url, width, height, mask}
let onRemoved = () => {};

/** Takes a picture in, or with null lets it go. */
export async function openInput(blob, name = "Picture", mask = null) {
  clearMarks();
  try {
    input = blob && (await readInput(blob, name, limitsOf(chosenModel()).max_side ?? MAX_SIDE));
  } catch {
    const kind = blob.type.replace("image/", "").toUpperCase();
    const what = kind ? `${kind} pictures` : "this file";
    markField("image", `This browser cannot read ${what}. Use a PNG, JPEG or WebP picture.`);
    return;
  }
  if (mask && mask.width === input.width && mask.height === input.height) input.mask = mask.copy();
  showCard();
  if (input) openMask();
  else onRemoved();
}

/**
 * Draws a file anew, so that what is sent stands upright, has no transparency, is of a kind that
 * every server reads and is no larger than `maxSide`; the mask then fits it pixel by pixel.
 */
async function readInput(blob, name, maxSide) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, maxSide / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) =>
    Math.max(1, Math.round(side * scale)),
  );
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  const picture = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return {
    name,
    picture,
    width,
    height,
    url: URL.createObjectURL(picture),
    mask: new Mask(width, height),
  };
}

/** What goes to the server: the mask only where something is painted. */
export async function packInput(used) {
  if (!used) return null;
  return { picture: used.picture, mask: used.mask.share() > 0 ? await used.mask.toBlob() : null };
}

function showCard() {
  $("drop").hidden = Boolean(input);
  $("input-card").hidden = !input;
  setHasInput(Boolean(input));
  $("file").value = "";
  if (!input) return;
  $("input-thumb").src = input.url;
  $("input-name").textContent = input.name;
  announce(`Input picture, ${input.width} by ${input.height}`);
  showMaskShare();
}

function showMaskShare() {
  const share = input.mask.share();
  const painted = share > 0 && share < 0.01 ? "under 1%" : `${Math.round(share * 100)}%`;
  const words = share ? `${painted} painted, the rest stays` : "no mask, all of it may change";
  $("mask-words").textContent = `${input.width} × ${input.height}, ${words}`;
}

function openMask() {
  showPainter(
    input,
    "Paint what should change. Paint nothing to vary the whole picture.",
    "Keys: arrows move the brush, space paints, shift with arrows draws, E erases, [ and ] size.",
  );
  openPainter(input, showMaskShare);
}

const pictureIn = ({ files = [] } = {}) =>
  [...files].find(({ type }) => type.startsWith("image/")) ?? files[0];
const take = (file) => file && openInput(file, file.name || "Pasted picture");

/** Files may be picked, dropped anywhere on the page, or pasted into it. */
export function setupInput(emptyStage) {
  onRemoved = emptyStage;
  $("file").addEventListener("change", () => take($("file").files[0]));
  $("mask-open").addEventListener("click", () => {
    openMask();
    $("film").focus({ preventScroll: true });
  });
  $("input-drop").addEventListener("click", async () => {
    await openInput(null);
    $("file").focus();
  });
  for (const name of ["dragover", "dragleave", "drop"]) addEventListener(name, onDrag);
  addEventListener("paste", (event) => {
    const file = pictureIn(event.clipboardData ?? {});
    if (!file) return; // text goes where text goes
    event.preventDefault();
    take(file);
  });
}

function onDrag(event) {
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  const left = event.type === "drop" || (event.type === "dragleave" && !event.relatedTarget);
  document.body.classList.toggle("dropping", !left);
  if (event.type === "drop") take(pictureIn(event.dataTransfer));
}
