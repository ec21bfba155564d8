// Values that this tab keeps over a reload. Nothing outlives the tab, above all not the API key.
const here = new Map(); // where the browser blocks storage

export function recall(name) {
  try {
    return sessionStorage.getItem(`rayjobs.${name}`);
  } catch {
    return here.get(name) ?? null;
  }
}

export function remember(name, value) {
  try {
    if (value) sessionStorage.setItem(`rayjobs.${name}`, value);
    else sessionStorage.removeItem(`rayjobs.${name}`);
  } catch {
    here.set(name, value);
  }
}
