// Small pieces that the views share: elements, numbers as text, dialogs, messages, the list of models.

import { askKeysWith, getJson } from "./api.js";

export const $ = (id) => document.getElementById(id);

/** Makes an element. Strings become text, never markup. Keys that start with "on" are listeners. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "text") node.textContent = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Sets an element's text only where it differs, so that selections and screen readers are left alone. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Numbers and times.

const NONE = "–";

export function count(value) {
  return value === null || value === undefined ? NONE : value.toLocaleString("en-US");
}

export function bytes(value) {
  if (value === null || value === undefined) return NONE;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

export function percent(share) {
  if (share === null || share === undefined) return NONE;
  const value = share * 100;
  if (value !== 0 && value < 0.005) return "< 0.01 %";
  if (value >= 1e5) return `${value.toExponential(1)} %`;
  return `${value.toFixed(value < 10 ? 2 : 1)} %`;
}

/** A loss or another figure: four digits, more where it is small. */
export function figure(value) {
  if (!Number.isFinite(value)) return NONE;
  if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(2);
  return value.toFixed(Math.abs(value) < 10 ? 3 : 1);
}

export function duration(seconds) {
  if (!Number.isFinite(seconds) || seconds < 0) return NONE;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function ago(unix) {
  if (!unix) return "never";
  const seconds = Date.now() / 1000 - unix;
  if (seconds < 10) return "just now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return new Date(unix * 1000).toLocaleDateString();
}

export function moment(unix) {
  return unix ? new Date(unix * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" }) : NONE;
}

// Messages.

/** Shows a message in the corner. Problems stay until they are closed. */
export function toast(text, problem = false) {
  const box = el("div", { class: problem ? "toast problem" : "toast" }, el("p", { text }));
  const close = el("button", { type: "button", class: "quiet", text: "Close", onclick: () => box.remove() });
  box.append(close);
  $("toasts").append(box);
  while ($("toasts").children.length > 3) $("toasts").firstChild.remove();
  if (!problem) setTimeout(() => box.remove(), 6000);
}

/** Shows the message of an error in an element that is hidden otherwise; null hides it. */
export function showProblem(node, error) {
  node.hidden = !error;
  setText(node, error ? error.message : "");
}

/** Has a screen reader say streamed text, a sentence at a time: word by word would be unbearable. */
export class Speaker {
  #rest = "";

  add(text) {
    this.#rest += text;
    const end = this.#rest.search(/[.!?…。！？:\n][^.!?…。！？:\n]*$/);
    if (end >= 0) this.#say(end + 1);
  }

  finish(last = "") {
    this.#rest += last;
    this.#say(this.#rest.length);
  }

  #say(length) {
    const text = this.#rest.slice(0, length).trim();
    this.#rest = this.#rest.slice(length);
    if (!text) return;
    $("spoken").append(el("p", { text }));
    while ($("spoken").children.length > 20) $("spoken").firstChild.remove();
  }
}

export async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  // Plain http on another machine: the old way is the only one.
  const area = el("textarea", { class: "unseen", "aria-hidden": "true" });
  area.value = text;
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  if (!done) throw new Error("The browser does not let this page copy.");
}

/** A button that copies what `text` returns, and says so. */
export function copyButton(text) {
  const button = el("button", { type: "button", class: "quiet copy", text: "Copy" });
  button.addEventListener("click", async () => {
    try {
      await copyText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Failed";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}

// Dialogs.

/** Asks a question; true where the answer is yes. Escape means no. */
export function ask({ title, text, yes, no = "Cancel" }) {
  const dialog = $("ask");
  setText($("ask-title"), title);
  setText($("ask-text"), text);
  setText($("ask-yes"), yes);
  setText($("ask-no"), no);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

askKeysWith((kind, message) => {
  const dialog = $("key");
  const input = $("key-value");
  const admin = kind === "admin";
  setText($("key-title"), admin ? "This needs the admin key" : "This server needs a key");
  setText($("key-text"), message || "The key stays in this tab and goes only to this server.");
  input.value = "";
  let value = null;
  const form = $("key-form");
  form.onsubmit = (event) => {
    event.preventDefault();
    value = input.value.trim();
    dialog.close();
  };
  $("key-cancel").onclick = () => dialog.close();
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(value || null), { once: true });
  });
});

// Models.

export const models = { list: [], base: null };
const choices = [];

/** The first adapter, or the base where there is none. */
export function firstAdapter() {
  return models.list.find((model) => model.parent)?.id ?? models.base;
}

/** Keeps a select filled with the server's models. `fallback` names the model to choose where none is. */
export function chooseModel(select, { fallback, onlyBase = false }) {
  choices.push({ select, fallback, onlyBase });
  fill(choices.at(-1));
}

/** Selects a model by its id; it may appear in the list later. */
export function selectModel(select, id) {
  select.dataset.wanted = id;
  for (const choice of choices) if (choice.select === select) fill(choice);
}

function fill({ select, fallback, onlyBase }) {
  const chosen = select.dataset.wanted ?? select.value;
  const option = (model) => el("option", { value: model.id, text: model.id });
  const bases = models.list.filter((model) => !model.parent).map(option);
  const adapters = onlyBase ? [] : models.list.filter((model) => model.parent).map(option);
  select.replaceChildren(
    ...(bases.length ? [el("optgroup", { label: "Base" }, ...bases)] : []),
    ...(adapters.length ? [el("optgroup", { label: "Adapters" }, ...adapters)] : []),
  );
  const known = [...select.options].some((item) => item.value === chosen);
  select.value = known ? chosen : (fallback() ?? "");
  if (known) delete select.dataset.wanted;
}

/** Asks the server for its models and fills every select with them. */
export async function refreshModels(options) {
  const { data } = await getJson("v1/models", options);
  const same = JSON.stringify(data.map((model) => model.id)) === JSON.stringify(models.list.map((model) => model.id));
  models.list = data;
  models.base = data.find((model) => !model.parent)?.id ?? null;
  if (!same) choices.forEach(fill);
  setText($("base-name"), models.base ?? "");
  return models;
}

// Tables that become cards on a narrow screen keep their roles, which `display` would take from them.

/** A cell with a label, which stands beside the value where the table is shown as cards. */
export function cell(label, options = {}, ...children) {
  return el("td", { role: "cell", "data-label": label, ...options }, ...children);
}

/** A word for a state with a dot whose colour repeats it. */
export function stateText(node, word, tone) {
  setText(node, word);
  node.dataset.tone = tone;
}
