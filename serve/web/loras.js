// The LoRAs of the chosen model: any of them, each with a scale.
import { $, fillTrack, node } from "./dom.js";

/** Shows these, keeping those that are chosen. */
export function fillLoras(names) {
  const scales = new Map(readLoras().map(({ name, scale }) => [name, scale]));
  $("loras-box").hidden = !names.length;
  $("loras").replaceChildren(...names.map((name) => row(name, scales.get(name))));
}

function row(name, scale) {
  const off = scale === undefined;
  const both = { value: scale ?? 1, step: 0.05, "aria-label": `Scale of ${name}`, disabled: off };
  const number = node("input", { type: "number", min: -2, max: 2, inputmode: "decimal", ...both });
  const range = node("input", { type: "range", min: 0, max: 1.5, ...both });
  const check = node("input", { type: "checkbox", value: name, checked: !off });
  range.addEventListener("input", () => ((number.value = range.value), fillTrack(range)));
  number.addEventListener("input", () => ((range.value = number.value), fillTrack(range)));
  check.addEventListener("change", () => (number.disabled = range.disabled = !check.checked));
  fillTrack(range);
  return node(
    "div",
    { class: "lora" },
    node("label", {}, check, node("span", {}, name)),
    range,
    number,
  );
}

/** [{name, scale}] of the chosen ones. */
export function readLoras() {
  return [...$("loras").children].flatMap((place) => {
    const check = place.querySelector("[type=checkbox]");
    const scale = Number(place.querySelector("[type=number]").value);
    return check.checked ? [{ name: check.value, scale }] : [];
  });
}

export function writeLoras(loras) {
  const scales = new Map(loras.map(({ name, scale }) => [name, scale]));
  const names = [...$("loras").querySelectorAll("[type=checkbox]")].map(({ value }) => value);
  $("loras").replaceChildren(...names.map((name) => row(name, scales.get(name))));
}
