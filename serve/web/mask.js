// A mask as the strokes that make it, in pixels of the picture: undo is forgetting the last one,
// and it can be drawn at any size.

const COLOUR = "#e5484d"; // the page shows painted parts through this film

export class Mask {
  constructor(width, height, strokes = []) {
    Object.assign(this, { width, height, strokes });
  }

  /** tool: "brush" or "erase" with size and points, "whole" or "invert". */
  add(stroke) {
    this.strokes.push(stroke);
    return stroke;
  }

  undo() {
    return this.strokes.pop();
  }

  clear() {
    this.strokes = [];
  }

  copy() {
    return new Mask(this.width, this.height, [...this.strokes]);
  }

  /** Painted parts in colour, the rest transparent, on a canvas of `scale` times the picture. */
  draw(canvas, scale = 1) {
    canvas.width = Math.max(1, Math.round(this.width * scale));
    canvas.height = Math.max(1, Math.round(this.height * scale));
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.scale(canvas.width / this.width, canvas.height / this.height);
    for (const stroke of this.strokes) drawStroke(context, stroke, this);
    return canvas;
  }

  /** How much of the picture is painted, 0 to 1. */
  share() {
    if (!this.strokes.length) return 0;
    const canvas = this.draw(
      document.createElement("canvas"),
      128 / Math.max(this.width, this.height),
    );
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let sum = 0;
    for (let at = 3; at < data.length; at += 4) sum += data[at];
    return sum / 255 / (data.length / 4);
  }

  /** What the API wants: a PNG of the picture's size, transparent where it is to change. */
  toBlob() {
    const film = this.draw(document.createElement("canvas"));
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: this.width, height: this.height });
    const context = canvas.getContext("2d");
    context.fillRect(0, 0, this.width, this.height);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(film, 0, 0);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }
}

/** Draws a stroke from its point number `from` on: in painting only the newest piece is drawn. */
export function drawStroke(context, { tool, size, points }, { width, height }, from = 0) {
  context.save();
  context.fillStyle = context.strokeStyle = COLOUR;
  if (tool === "erase") context.globalCompositeOperation = "destination-out";
  if (tool === "invert") context.globalCompositeOperation = "xor";
  if (tool === "whole" || tool === "invert") context.fillRect(0, 0, width, height);
  else drawPath(context, size, points.slice(Math.max(from - 1, 0)));
  context.restore();
}

function drawPath(context, size, points) {
  Object.assign(context, { lineWidth: size, lineCap: "round", lineJoin: "round" });
  context.beginPath();
  // A line without length is not drawn, whatever its caps.
  if (points.length === 1) {
    context.arc(...points[0], size / 2, 0, 2 * Math.PI);
    return context.fill();
  }
  context.moveTo(...points[0]);
  for (const point of points.slice(1)) context.lineTo(...point);
  context.stroke();
}
