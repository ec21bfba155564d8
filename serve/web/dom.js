// Makes the page's elements. Text is always set as text, never parsed as HTML.

export const $ = (id) => document.getElementById(id);

export function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== undefined && value !== null && value !== false)
      made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const button = (attributes, ...children) =>
  node("button", { type: "button", ...attributes }, ...children);

/** One of the drawings at the top of index.html. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const made = document.createElementNS(space, "svg");
  made.setAttribute("aria-hidden", "true");
  made.setAttribute("class", "icon");
  made.append(document.createElementNS(space, "use"));
  made.firstChild.setAttribute("href", `#i-${name}`);
  return made;
}

/** Announces a text to screen readers. */
export function announce(text) {
  $("live").textContent = text;
}

/** How far a slider is filled, for the style sheet. */
export function fillTrack(range) {
  const share = (range.value - range.min) / (range.max - range.min);
  range.style.setProperty("--share", `${share * 100}%`);
}

/** 0.4 s, 12 s, 2 min 5 s. */
export function formatSeconds(seconds) {
  if (!Number.isFinite(seconds)) return "";
  if (seconds < 9.95) return `${Math.max(seconds, 0.1).toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  const rest = Math.round(seconds - 60 * minutes);
  return rest ? `${minutes} min ${rest} s` : `${minutes} min`;
}

export const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
