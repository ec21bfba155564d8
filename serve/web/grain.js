// The noise that a picture starts from, as quiet colour: one blot for each pixel of the latents.

const ACROSS = 48;

function normal() {
  return Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
}

export function drawGrain(canvas) {
  canvas.width = canvas.height = ACROSS;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(ACROSS, ACROSS);
  for (let at = 0; at < pixels.data.length; at += 4) {
    const grey = 128 + 46 * normal();
    for (let channel = 0; channel < 3; channel++) pixels.data[at + channel] = grey + 26 * normal();
    pixels.data[at + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
}
