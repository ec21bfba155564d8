// What this tab remembers over a reload. Nothing here outlives the tab: the API key least of all.
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
