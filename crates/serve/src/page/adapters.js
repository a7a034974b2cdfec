// The view of the adapters: a table that sorts, filters and shows a page of rows at a time.

import { getJson, request } from "./api.js";
import { $, ago, ask, bytes, cell, count, el, moment, percent, refreshModels, setText, showProblem, stateText, toast } from "./parts.js";

const PAGE = 50;
const REFRESH_MS = 4000;

let list = [];
const view = { key: "id", down: false, page: 0 };
// The rows that were built, by the adapter's id: they are updated in place, so that focus stays where it is.
const rows = new Map();
let timer = 0;

const COLUMNS = [
  { key: "id", label: "Name", value: (a) => a.id },
  { key: "method", label: "Method", value: (a) => a.method },
  { key: "rank", label: "Rank", value: (a) => a.rank, number: true },
  { key: "change", label: "‖ΔW‖/‖W‖", value: (a) => a.relative_change, number: true, title: "Size of the change beside the base’s weights" },
  { key: "bytes", label: "Size", value: (a) => a.bytes, number: true },
  { key: "used", label: "Last used", value: (a) => a.last_used, number: true },
  { key: "requests", label: "Requests", value: (a) => a.requests, number: true },
  { key: "state", label: "State", value: (a) => state(a).word },
];

export function start() {
  for (const column of COLUMNS) $("adapters-head").append(headCell(column));
  $("adapters-head").append(el("th", { scope: "col", role: "columnheader", class: "last" }, el("span", { class: "unseen", text: "Actions" })));
  $("adapters-filter").addEventListener("input", () => turn(0));
  $("adapters-previous").addEventListener("click", () => turn(view.page - 1));
  $("adapters-next").addEventListener("click", () => turn(view.page + 1));
  $("adapters-load").addEventListener("click", openLoad);
  $("load-cancel").addEventListener("click", () => $("load").close());
  $("load-form").addEventListener("submit", load);
}

/** Called when the view is shown. */
export async function show() {
  clearInterval(timer);
  timer = setInterval(() => {
    if (!document.hidden) refresh({ patient: false }).catch(() => {});
  }, REFRESH_MS);
  await refresh();
}

/** Called when another view is shown. */
export function hide() {
  clearInterval(timer);
}

async function refresh(options) {
  const answer = await getJson("v1/adapters", { admin: true, ...options });
  list = answer.data;
  showMemory(answer.memory);
  draw();
}

function headCell(column) {
  const button = el("button", { type: "button", class: "sort", text: column.label, title: column.title });
  button.addEventListener("click", () => {
    view.down = view.key === column.key ? !view.down : Boolean(column.number);
    view.key = column.key;
    turn(0);
  });
  return el("th", { scope: "col", role: "columnheader", "data-key": column.key, class: column.number ? "number" : null }, button);
}

function state(adapter) {
  if (adapter.error) return { word: "error", tone: "bad" };
  if (adapter.running > 0) return { word: `running ${adapter.running}`, tone: "busy" };
  if (adapter.pinned) return { word: "pinned", tone: "good" };
  return adapter.resident ? { word: "in memory", tone: "good" } : { word: "on disk", tone: "idle" };
}

function turn(page) {
  view.page = page;
  draw();
}

// What the filter lets through, in the order of the chosen column. What has no value comes last either way.
function chosen() {
  const wanted = $("adapters-filter").value.trim().toLowerCase();
  const column = COLUMNS.find(({ key }) => key === view.key);
  const sign = view.down ? -1 : 1;
  return list
    .filter((a) => !wanted || `${a.id} ${a.method} ${state(a).word}`.toLowerCase().includes(wanted))
    .sort((a, b) => {
      const [x, y] = [column.value(a), column.value(b)];
      const missing = (x === null || x === undefined) - (y === null || y === undefined);
      if (missing) return missing;
      const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
      return order * sign || a.id.localeCompare(b.id, "en", { numeric: true });
    });
}

function draw() {
  const found = chosen();
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  view.page = Math.min(Math.max(view.page, 0), pages - 1);
  const from = view.page * PAGE;
  const here = found.slice(from, from + PAGE);

  const shown = here.map((adapter) => {
    if (!rows.has(adapter.id)) rows.set(adapter.id, makeRow(adapter.id));
    const row = rows.get(adapter.id);
    fillRow(row, adapter);
    return row.node;
  });
  place($("adapters-body"), shown);
  const kept = new Set(here.map(({ id }) => id));
  for (const id of rows.keys()) if (!kept.has(id)) rows.delete(id);

  for (const head of $("adapters-head").children) {
    if (head.dataset.key !== view.key) head.removeAttribute("aria-sort");
    else head.setAttribute("aria-sort", view.down ? "descending" : "ascending");
  }
  const all = list.length === 1 ? "1 adapter" : `${count(list.length)} adapters`;
  setText($("adapters-count"), found.length === list.length ? all : `${count(found.length)} of ${all}`);
  $("adapters-table").hidden = found.length === 0;
  $("adapters-empty").hidden = found.length > 0;
  setText($("adapters-empty"), list.length ? "No adapter matches the filter." : "No adapters yet. Load one, or start a job that trains one.");
  $("adapters-pager").hidden = pages === 1;
  setText($("adapters-page"), `${from + 1}–${from + here.length} of ${count(found.length)}`);
  $("adapters-previous").disabled = view.page === 0;
  $("adapters-next").disabled = view.page === pages - 1;
}

// Puts the rows in order and touches the document only where the order changed; focus comes back where it was.
function place(body, nodes) {
  const now = [...body.children];
  if (now.length === nodes.length && now.every((node, i) => node === nodes[i])) return;
  const focused = document.activeElement;
  body.replaceChildren(...nodes);
  if (focused !== document.activeElement && body.contains(focused)) focused.focus();
}

function makeRow(id) {
  const cells = {
    method: cell("Method"),
    rank: cell("Rank", { class: "number" }),
    change: cell("‖ΔW‖/‖W‖", { class: "number" }),
    bytes: cell("Size", { class: "number" }),
    used: cell("Last used", { class: "number" }),
    requests: cell("Requests", { class: "number" }),
  };
  const stateNode = el("span", { class: "state" });
  const error = el("p", { class: "problem", hidden: true });
  const stateCell = cell("State", {}, stateNode, error);
  const pin = el("button", { type: "button", class: "quiet pin", onclick: () => setPinned(id) });
  const unload = el("button", { type: "button", class: "quiet", text: "Unload", "aria-label": `Unload ${id}`, onclick: () => askUnload(id) });
  const chat = el("a", { class: "button quiet", href: `#chat/${encodeURIComponent(id)}`, text: "Chat", "aria-label": `Chat with ${id}` });
  const node = el(
    "tr",
    { role: "row", "data-id": id },
    el("th", { scope: "row", role: "rowheader", class: "name" }, id),
    ...Object.values(cells),
    stateCell,
    cell("", { class: "last" }, el("div", { class: "row-actions" }, chat, pin, unload)),
  );
  return { node, cells, stateCell, state: stateNode, error, pin };
}

function fillRow(row, adapter) {
  const { word, tone } = state(adapter);
  setText(row.cells.method, adapter.method);
  setText(row.cells.rank, count(adapter.rank));
  setText(row.cells.change, percent(adapter.relative_change));
  setText(row.cells.bytes, bytes(adapter.bytes));
  setText(row.cells.used, ago(adapter.last_used));
  row.cells.used.title = adapter.last_used ? moment(adapter.last_used) : "";
  setText(row.cells.requests, count(adapter.requests));
  stateText(row.state, word, tone);
  row.stateCell.classList.toggle("failed", Boolean(adapter.error));
  showProblem(row.error, adapter.error ? { message: adapter.error } : null);
  setText(row.pin, adapter.pinned ? "Unpin" : "Pin");
  row.pin.setAttribute("aria-label", `${adapter.pinned ? "Unpin" : "Pin"} ${adapter.id}`);
  row.pin.title = adapter.pinned ? "Let it leave memory when others need the room" : "Keep it in memory";
}

function showMemory(memory) {
  const text = memory.limit ? `${bytes(memory.used)} of ${bytes(memory.limit)} in memory` : `${bytes(memory.used)} in memory`;
  const parts = [el("span", { text })];
  if (memory.limit) {
    const full = Math.min(100, Math.round((100 * memory.used) / memory.limit));
    const bar = el("div");
    bar.style.width = `${full}%`;
    const label = "Share of the memory for adapters, in percent";
    parts.unshift(el("div", { class: "meter", role: "meter", "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": full, "aria-label": label }, bar));
  }
  $("adapters-memory").replaceChildren(...parts);
}

function openLoad() {
  showProblem($("load-error"), null);
  $("load").showModal();
  $("load-name").focus();
}

async function load(event) {
  event.preventDefault();
  showProblem($("load-error"), null);
  $("load-go").disabled = true;
  const json = {
    lora_name: $("load-name").value.trim(),
    lora_path: $("load-path").value.trim(),
    load_inplace: $("load-inplace").checked,
  };
  try {
    const response = await request("v1/load_lora_adapter", { method: "POST", json, admin: true });
    $("load").close();
    $("load-form").reset();
    toast(await response.text());
    await changed();
  } catch (error) {
    showProblem($("load-error"), error);
  } finally {
    $("load-go").disabled = false;
  }
}

async function askUnload(id) {
  const yes = await ask({
    title: `Unload ${id}?`,
    text:
      "It leaves memory; requests under way keep it, and its files stay on the disk. If --adapter-dir has a folder of this name, it is loaded again when it is next asked for. An adapter from outside of that folder comes back only when the server restarts.",
    yes: "Unload",
  });
  if (!yes) return;
  try {
    const response = await request("v1/unload_lora_adapter", { method: "POST", json: { lora_name: id }, admin: true });
    toast(await response.text());
    await changed();
    $("adapters-filter").focus();
  } catch (error) {
    toast(error.message, true);
  }
}

async function setPinned(id) {
  const pinned = !list.find((adapter) => adapter.id === id)?.pinned;
  try {
    await request(`v1/adapters/${encodeURIComponent(id)}/pin`, { method: "POST", json: { pinned }, admin: true });
    await refresh();
  } catch (error) {
    toast(error.message, true);
  }
}

async function changed() {
  await Promise.all([refresh(), refreshModels()]);
}
