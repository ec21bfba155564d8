// The picture to start from: dropped, pasted, picked from a file or taken from the gallery.
import { $, announce } from "./dom.js";
import { chosenModel, clearMarks, limitsOf, markField, setHasInput } from "./form.js";
import { Mask } from "./mask.js";
import { openPainter } from "./painter.js";
import { pictureIn, readPicture } from "./picture.js";
import { showPainter } from "./stage.js";

export let input = null; // {name, picture, url, width, height, mask}
let onRemoved = () => {};

/** Takes a picture in, or with null lets it go. */
export async function openInput(blob, name = "Picture", mask = null) {
  clearMarks();
  try {
    input = blob && (await readInput(blob, name));
  } catch (error) {
    markField("image", error.message);
    return;
  }
  if (mask && mask.width === input.width && mask.height === input.height) input.mask = mask.copy();
  showCard();
  if (input) openMask();
  else onRemoved();
}

/** The mask fits the picture as it is sent, pixel by pixel. */
async function readInput(blob, name) {
  const read = await readPicture(blob, limitsOf(chosenModel()).max_side);
  return { name, ...read, mask: new Mask(read.width, read.height) };
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

const take = (file) => file && openInput(file, file.name || "Pasted picture");

/** Files may be picked, dropped anywhere but on a control, or pasted. */
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

/** What a control has taken by the time that it comes here goes there only. */
function onDrag(event) {
  if (!event.dataTransfer?.types.includes("Files")) return;
  const isTaken = event.defaultPrevented;
  event.preventDefault();
  const left = event.type === "drop" || (event.type === "dragleave" && !event.relatedTarget);
  document.body.classList.toggle("dropping", !left && !isTaken);
  if (event.type === "drop" && !isTaken) take(pictureIn(event.dataTransfer));
}
