// The picture to start from: dropped, pasted, picked from a file or taken from the gallery.
import { Mask } from "./mask.js";

/**
 * Draws a file anew, so that what is sent stands upright, has no transparency, is of a kind that
 * every server reads and is no larger than `maxSide`; the mask then fits it pixel by pixel.
 */
export async function readInput(blob, name, maxSide) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, maxSide / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  const picture = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  const { width, height } = canvas;
  return { name, picture, width, height, url: URL.createObjectURL(picture), mask: new Mask(width, height) };
}

/** What goes to the server: the mask only where something is painted. */
export async function packInput(input) {
  if (!input) return null;
  return { picture: input.picture, mask: input.mask.share() > 0 ? await input.mask.toBlob() : null };
}

const pictureIn = (transfer) => [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/")) ?? transfer?.files?.[0];

/** Takes files that are dropped anywhere on the page or pasted into it. */
export function watchForPictures(take) {
  const carries = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const mark = (event, over) => {
    if (!carries(event)) return;
    event.preventDefault();
    document.body.classList.toggle("dropping", over);
  };
  addEventListener("dragover", (event) => mark(event, true));
  addEventListener("dragleave", (event) => event.relatedTarget === null && mark(event, false));
  addEventListener("drop", (event) => {
    mark(event, false);
    if (carries(event) && pictureIn(event.dataTransfer)) take(pictureIn(event.dataTransfer));
  });
  addEventListener("paste", (event) => {
    const file = pictureIn(event.clipboardData);
    if (!file) return; // text goes where text goes
    event.preventDefault();
    take(file);
  });
}
