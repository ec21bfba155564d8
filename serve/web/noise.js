// The noise that a picture starts from, in muted colours: clouds with fine grain over them.

const ACROSS = 320;
const CLOUDS = 6;

const normal = () =>
  Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());

function noise(across, colour) {
  const canvas = Object.assign(document.createElement("canvas"), { width: across, height: across });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(across, across);
  for (let at = 0; at < pixels.data.length; at += 4) pixels.data.set(colour(), at);
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function grey() {
  const level = 128 + 70 * normal();
  return [level, level, level, 255];
}

const tint = () => [128 + 58 * normal(), 128 + 44 * normal(), 134 + 58 * normal(), 255];
let grain = null; // the same for all pictures: only the clouds differ

export function drawNoise(canvas) {
  grain ??= noise(ACROSS, grey);
  canvas.width = canvas.height = ACROSS;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  const edge = ACROSS / CLOUDS; // smoothing pales at the rim, so that lies outside
  context.drawImage(noise(CLOUDS, tint), -edge, -edge, ACROSS + 2 * edge, ACROSS + 2 * edge);
  context.globalAlpha = 0.2;
  context.drawImage(grain, 0, 0);
}
