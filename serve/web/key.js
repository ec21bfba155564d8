// Asks for the API key where the server wants one. It is remembered by this tab only.
import { $ } from "./dom.js";
import { recall, remember } from "./memory.js";

let then = () => {};

/** Opens the dialog; `next` runs once a key is given. */
export function askForKey(next = () => {}) {
  then = next;
  $("key").value = recall("key") ?? "";
  $("key-dialog").showModal();
  $("key").select();
}

export function readyKey() {
  $("key-open").addEventListener("click", () => askForKey());
  $("key-cancel").addEventListener("click", () => $("key-dialog").close());
  $("key-dialog").addEventListener("submit", () => {
    remember("key", $("key").value.trim());
    then();
  });
}
