// Pictures that people bring, read and drawn anew for the server.

const MAX_SIDE = 2048; // where the server names no limit

/** The picture among the files of a drop or a paste, or else the first file. */
export const pictureIn = ({ files = [] } = {}) =>
  [...files].find(({ type }) => type.startsWith("image/")) ?? files[0];

/**
 * Draws a file anew, so that what is sent stands upright, has no transparency, is of a kind that
 * every server reads and is no larger than `maxSide`. Throws an Error that can be shown.
 */
export async function readPicture(blob, maxSide = MAX_SIDE) {
  try {
    return await draw(await createImageBitmap(blob), maxSide);
  } catch {
    const kind = blob.type.replace("image/", "").toUpperCase();
    const what = kind ? `${kind} pictures` : "this file";
    throw new Error(`This browser cannot read ${what}. Use a PNG, JPEG or WebP picture.`);
  }
}

async function draw(bitmap, maxSide) {
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
  return { picture, width, height, url: URL.createObjectURL(picture) };
}
