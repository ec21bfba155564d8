// The ControlNets of the chosen model: each follows a picture that is picked for or dropped on it.
import { $, announce, button, fillTrack, icon, node } from "./dom.js";
import { pictureIn, readPicture } from "./picture.js";

const rows = new Map(); // by name, of all models: a picture stays while another model is chosen
let shown = []; // those of the chosen one
let maxSide;

/** Shows these, whose pictures are sent with sides of up to `largest`. */
export function fillControls(names, largest) {
  maxSide = largest;
  for (const name of names) if (!rows.has(name)) rows.set(name, new Row(name));
  shown = names.map((name) => rows.get(name));
  $("controls-box").hidden = !names.length;
  $("controls").replaceChildren(...shown.map(({ element }) => element));
}

const used = () => shown.filter(({ picture }) => picture);

/** [{name, scale, preprocess}] of those that have a picture. */
export const readControls = () => used().map((row) => row.read());

/** Their pictures: [{name, file, title, picture, url}], where `file` is how commands call it. */
export const readPictures = () => used().map(({ name, picture }) => ({ name, ...picture }));

/** Sets them all; a control without one of the `pictures` is not used. */
export function writeControls(controls, pictures) {
  const byName = (list, name) => list.find((one) => one.name === name);
  for (const row of shown)
    row.write(byName(controls, row.name) ?? {}, byName(pictures, row.name) ?? null);
}

/** The field of the control that is sent as number `at`; without a number, of the only one. */
export function fieldOf(at) {
  const sent = used();
  return (sent[at] ?? (sent.length === 1 ? sent[0] : null))?.file;
}

/** One control: a place for its picture, and once it has one, how it is followed. */
class Row {
  constructor(name) {
    Object.assign(this, { name, picture: null });
    const both = { value: 1, min: 0, max: 2, step: 0.05, "aria-label": `Scale of ${name}` };
    this.number = node("input", { type: "number", inputmode: "decimal", ...both });
    this.range = node("input", { type: "range", ...both });
    this.edges = node("input", { type: "checkbox" });
    this.file = node("input", {
      type: "file",
      accept: "image/*",
      "aria-describedby": "controls-wrong",
      onchange: () => this.take(this.file.files[0]),
    });
    this.element = this.build();
    this.range.addEventListener("input", () => this.setScale(this.range.value));
    this.number.addEventListener("input", () => this.setScale(this.number.value));
    for (const kind of ["dragover", "dragleave", "drop"])
      this.element.addEventListener(kind, (event) => this.onDrag(event));
    this.setScale(1);
    this.show();
  }

  build() {
    this.drawing = icon("input");
    this.thumb = node("img", { alt: "" });
    this.words = node("span");
    const title = node("span", { class: "words" }, node("b", {}, this.name), this.words);
    const remove = button({ class: "link", onclick: () => this.remove() }, "Remove");
    const edges = node("label", {}, this.edges, "Follow its edges");
    this.more = node(
      "div",
      { class: "more" },
      node("span", { "aria-hidden": "true" }, "Scale"),
      this.range,
      this.number,
      node("div", { class: "row" }, edges, remove),
    );
    const place = node("label", { class: "drop" }, this.file, this.drawing, this.thumb, title);
    const about = { class: "control", role: "group", "aria-label": this.name };
    return node("div", about, place, this.more);
  }

  async take(file) {
    if (!file) return;
    $("controls-wrong").textContent = "";
    this.file.removeAttribute("aria-invalid");
    try {
      const read = await readPicture(file, maxSide);
      this.picture = { ...read, file: `control-${this.name}.png`, title: file.name };
      announce(`Picture for ${this.name}, ${read.width} by ${read.height}`);
    } catch (error) {
      $("controls-wrong").textContent = error.message;
      this.file.setAttribute("aria-invalid", "true");
    }
    this.show();
  }

  remove() {
    this.picture = null;
    this.show();
    this.file.focus();
    announce(`No picture for ${this.name}`);
  }

  /** What is prevented here, the page's own place for pictures leaves alone. */
  onDrag(event) {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    const away = event.type === "dragleave" && !this.element.contains(event.relatedTarget);
    this.element.classList.toggle("over", event.type !== "drop" && !away);
    if (event.type === "drop") this.take(pictureIn(event.dataTransfer));
  }

  setScale(value) {
    this.number.value = this.range.value = value;
    fillTrack(this.range);
  }

  show() {
    const { picture } = this;
    this.file.value = "";
    this.more.hidden = this.thumb.hidden = !picture;
    this.drawing.toggleAttribute("hidden", Boolean(picture));
    if (picture) this.thumb.src = picture.url;
    else this.thumb.removeAttribute("src");
    const words = picture
      ? [`${picture.title}, ${picture.width} × ${picture.height}`]
      : ["Drop or ", node("u", {}, "choose"), " a picture"];
    this.words.replaceChildren(...words);
    const title = picture ? `${this.name}: ${words[0]}` : this.name;
    this.file.setAttribute("aria-label", `Picture for ${title}`);
  }

  /** A scale that is left empty is left to the server. */
  read() {
    const scale = this.number.value === "" ? {} : { scale: Number(this.number.value) };
    return { name: this.name, ...scale, ...(this.edges.checked && { preprocess: "canny" }) };
  }

  write({ scale = 1, preprocess }, picture) {
    this.setScale(scale);
    this.edges.checked = preprocess === "canny";
    this.picture = picture;
    this.show();
  }
}
