// Asks for the API key where the server needs one. Only this tab keeps it.
import { $ } from "./dom.js";
import { recall, remember } from "./session.js";

let then = () => {};

/** Opens the dialog; `next` runs once a key is given. */
export function askForKey(next = () => {}) {
  then = next;
  $("key").value = recall("key") ?? "";
  $("key-dialog").showModal();
  $("key").select();
}

export function setupKey() {
  $("key-open").addEventListener("click", () => askForKey());
  $("key-cancel").addEventListener("click", () => $("key-dialog").close());
  $("key-dialog").addEventListener("submit", () => {
    remember("key", $("key").value.trim());
    then();
  });
}
