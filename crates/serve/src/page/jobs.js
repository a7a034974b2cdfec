// The view of the fine-tuning jobs: the list, and what is common to its three screens.

import { getJson } from "./api.js";
import { $, ago, cell, count, duration, el, moment, setText, stateText } from "./parts.js";
import * as job from "./job.js";
import * as startJob from "./start.js";

const REFRESH_MS = 4000;
const COLUMNS = ["Job", "Status", "Model", "Trained tokens", "Created", "Time"];
const NUMBERS = new Set(["Trained tokens", "Created", "Time"]);

const rows = new Map();
let timer = 0;

export function start() {
  for (const label of COLUMNS) {
    $("jobs-head").append(el("th", { scope: "col", role: "columnheader", class: NUMBERS.has(label) ? "number" : null, text: label }));
  }
  job.start();
  startJob.start();
}

/** Called when the view is shown: `part` is empty for the list, "new" for the form, or a job's id. */
export async function show(part) {
  hide();
  $("jobs-list").hidden = Boolean(part);
  $("jobs-new").hidden = part !== "new";
  $("jobs-detail").hidden = !part || part === "new";
  if (part === "new") await startJob.show();
  else if (part) await job.show(part);
  else {
    timer = setInterval(() => {
      if (!document.hidden) refresh({ patient: false }).catch(() => {});
    }, REFRESH_MS);
    await refresh();
  }
}

/** Called when another view is shown. */
export function hide() {
  clearInterval(timer);
  job.hide();
}

async function refresh(options) {
  const { data } = await getJson("v1/fine_tuning/jobs?limit=100", { admin: true, ...options });
  const nodes = data.map((item) => {
    if (!rows.has(item.id)) rows.set(item.id, makeRow(item));
    const row = rows.get(item.id);
    fillRow(row, item);
    return row.node;
  });
  const body = $("jobs-body");
  if (nodes.length !== body.children.length || nodes.some((node, i) => node !== body.children[i])) {
    const focused = document.activeElement;
    body.replaceChildren(...nodes);
    if (body.contains(focused)) focused.focus();
  }
  $("jobs-table").hidden = nodes.length === 0;
  $("jobs-empty").hidden = nodes.length > 0;
  setText($("jobs-empty"), "No jobs yet. A job trains an adapter on a file of examples; it can be used here as soon as it is done.");
}

function makeRow(item) {
  const link = el("a", { href: `#jobs/${encodeURIComponent(item.id)}` });
  const status = el("span", { class: "state" });
  const cells = COLUMNS.slice(2).map((label) => cell(label, { class: NUMBERS.has(label) ? "number" : null }));
  const node = el(
    "tr",
    { role: "row", "data-id": item.id },
    el("th", { scope: "row", role: "rowheader", class: "name" }, link),
    cell("Status", {}, status),
    ...cells,
  );
  return { node, link, status, cells };
}

function fillRow(row, item) {
  const [model, tokens, created, time] = row.cells;
  setText(row.link, job.nameOf(item));
  stateText(row.status, ...job.statusOf(item));
  setText(model, item.model);
  setText(tokens, count(item.trained_tokens));
  setText(created, ago(item.created_at));
  created.title = moment(item.created_at);
  setText(time, duration((item.finished_at ?? Date.now() / 1000) - item.created_at));
}
