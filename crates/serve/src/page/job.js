// One job: its state, its curve, which goes live while it runs, its checkpoints and events.

import { events, getJson, request } from "./api.js";
import { LossChart } from "./chart.js";
import { $, ask, count, duration, el, figure, moment, setText, showProblem, stateText, toast } from "./parts.js";

const WORDS = {
  validating_files: ["checking files", "busy"],
  queued: ["queued", "idle"],
  running: ["running", "busy"],
  paused: ["paused", "idle"],
  succeeded: ["succeeded", "good"],
  failed: ["failed", "bad"],
  cancelled: ["cancelled", "idle"],
};
const OVER = new Set(["succeeded", "failed", "cancelled"]);
const HISTORY = 500;
const SHOWN_EVENTS = 200;
const REFRESH_MS = 3000;
const RETRY_MS = 2000;

let chart = null;
// What is shown: the job's id, its object and its events by id. Null where no job is.
let shown = null;

export function start() {
  chart = new LossChart($("job-chart"));
  $("job-metrics").addEventListener("change", drawEvents);
}

/** The word for a job's status and the tone of its dot. */
export function statusOf(job) {
  return WORDS[job.status] ?? [job.status, "idle"];
}

/** What a person would call a job: its model's name, the suffix it was given, or its id. */
export function nameOf(job) {
  return job.fine_tuned_model ?? job.user_provided_suffix ?? job.id;
}

/** Called when a job is to be shown. */
export async function show(id) {
  hide();
  const control = new AbortController();
  shown = { id, job: null, control, events: new Map(), isWhole: false, checkpoints: "", timer: 0, frame: 0, refreshing: null };
  const mine = shown;
  chart.clear();
  $("job-facts").replaceChildren();
  $("job-events").replaceChildren();
  $("job-actions").replaceChildren();
  $("job-checkpoints").tBodies[0].replaceChildren();
  setText($("job-name"), id);
  stateText($("job-status"), "", "idle");
  showProblem($("job-error"), null);
  drawProgress(mine);
  try {
    await refresh(mine);
  } catch (error) {
    if (mine === shown) showProblem($("job-error"), error);
    return;
  }
  if (!OVER.has(mine.job.status)) {
    mine.timer = setInterval(() => refreshOnce(mine), REFRESH_MS);
    follow(mine);
  }
  await history(mine);
}

/** Called when something else is to be shown: the stream ends. */
export function hide() {
  if (!shown) return;
  shown.control.abort();
  clearInterval(shown.timer);
  cancelAnimationFrame(shown.frame);
  shown = null;
}

const address = ({ id }, rest = "") => `v1/fine_tuning/jobs/${encodeURIComponent(id)}${rest}`;

async function refresh(mine, options = {}) {
  const call = { admin: true, signal: mine.control.signal, ...options };
  const [job, checkpoints] = await Promise.all([
    getJson(address(mine), call),
    getJson(address(mine, "/checkpoints"), call),
  ]);
  if (mine !== shown) return;
  mine.job = job;
  if (OVER.has(job.status)) clearInterval(mine.timer);
  drawJob(mine);
  drawCheckpoints(mine, checkpoints.data);
}

// Refreshes unless a refresh is on its way.
function refreshOnce(mine) {
  mine.refreshing ??= refresh(mine, { patient: false })
    .catch(() => {})
    .finally(() => {
      mine.refreshing = null;
    });
}

// All events that there are, newest first, page by page.
async function history(mine) {
  let after = "";
  for (;;) {
    let page;
    try {
      page = await getJson(address(mine, `/events?limit=${HISTORY}${after}`), { admin: true, signal: mine.control.signal });
    } catch (error) {
      if (mine === shown) toast(error.message, true);
      return;
    }
    if (mine !== shown) return;
    page.data.forEach((event) => mine.events.set(event.id, event));
    mine.isWhole = !page.has_more || page.data.length === 0;
    soon(mine);
    if (mine.isWhole) return;
    after = `&after=${encodeURIComponent(page.data.at(-1).id)}`;
  }
}

// Listens to the job until it is over. A stream that breaks off is opened again; events that come twice count once.
async function follow(mine) {
  while (mine === shown) {
    try {
      const response = await request(address(mine, "/events?stream=true"), { admin: true, signal: mine.control.signal });
      for await (const event of events(response)) {
        if (mine !== shown) return;
        mine.events.set(event.id, event);
        soon(mine);
        // Messages tell of a change, and metrics come only from a job that runs.
        if (event.type !== "metrics" || mine.job.status !== "running") refreshOnce(mine);
      }
      await refresh(mine);
      if (OVER.has(mine.job.status)) return;
      await history(mine);
    } catch {
      // The job's own refresh says what is wrong.
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

function soon(mine) {
  mine.frame ||= requestAnimationFrame(() => {
    mine.frame = 0;
    if (mine !== shown) return;
    drawCurve(mine);
    drawProgress(mine);
    drawEvents();
  });
}

const metricsOf = (mine) =>
  [...mine.events.values()].filter((event) => event.type === "metrics" && event.data).sort((a, b) => a.data.step - b.data.step);

function drawCurve(mine) {
  const metrics = metricsOf(mine);
  const series = (key) =>
    metrics.filter(({ data }) => Number.isFinite(data[key])).map(({ data }) => [data.step, data[key]]);
  chart.set({ train: series("train_loss"), valid: series("valid_loss"), total: metrics.at(-1)?.data.total_steps ?? null });
}

function drawProgress(mine) {
  const metrics = metricsOf(mine);
  const last = metrics.at(-1)?.data;
  const bar = $("job-progress");
  bar.max = last?.total_steps || 1;
  bar.value = last?.step ?? 0;
  // A job that ended before its first step has no curve and never will; its error stands above.
  const isBare = !last && mine.isWhole && OVER.has(mine.job?.status);
  bar.hidden = isBare;
  $("job-chart").hidden = isBare;
  if (isBare) {
    const ends = { failed: "It failed before its first step.", cancelled: "It was cancelled before its first step." };
    setText($("job-progress-text"), ends[mine.job.status] ?? "");
    return;
  }
  if (!last) {
    const waits = { validating_files: "The files are checked.", queued: "It waits for its turn.", running: "It is about to begin." };
    setText($("job-progress-text"), waits[mine.job?.status] ?? "");
    return;
  }
  const parts = [`Step ${count(last.step)}${last.total_steps ? ` of ${count(last.total_steps)}` : ""}`];
  if (Number.isFinite(last.tokens_per_second)) parts.push(`${count(Math.round(last.tokens_per_second))} tokens/s`);
  if (Number.isFinite(last.learning_rate)) parts.push(`learning rate ${Number(last.learning_rate.toPrecision(3))}`);
  const left = timeLeft(mine, metrics);
  if (left !== null) parts.push(`about ${duration(left)} left`);
  setText($("job-progress-text"), parts.join(" · "));
}

function timeLeft(mine, metrics) {
  const [first, last] = [metrics[0], metrics.at(-1)];
  if (!mine.job || OVER.has(mine.job.status) || !last.data.total_steps) return null;
  const steps = last.data.step - first.data.step;
  const seconds = last.created_at - first.created_at;
  if (steps < 1 || seconds < 3) return null;
  return ((last.data.total_steps - last.data.step) * seconds) / steps;
}

function drawJob(mine) {
  const { job } = mine;
  setText($("job-name"), nameOf(job));
  document.title = `${nameOf(job)} · lowrank`;
  const [word, tone] = statusOf(job);
  stateText($("job-status"), word, tone);
  const failed = job.error?.message ? job.error : null;
  showProblem($("job-error"), failed);
  drawProgress(mine);
  drawActions(mine);

  const settings = { ...job.hyperparameters, ...job.lowrank };
  const facts = [
    ["Job", job.id],
    ["Model", job.model],
    ["Training file", job.training_file],
    ["Validation file", job.validation_file],
    ["Result", job.fine_tuned_model],
    ["Trained tokens", job.trained_tokens === null ? null : count(job.trained_tokens)],
    ["Created", moment(job.created_at)],
    ["Finished", job.finished_at ? moment(job.finished_at) : null],
    ["Seed", job.seed],
    ...Object.entries(settings).map(([key, value]) => [key, value !== null && typeof value === "object" ? JSON.stringify(value) : value]),
  ].filter(([, value]) => value !== null && value !== undefined);
  $("job-facts").replaceChildren(
    ...facts.map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", { text: String(value) }))),
  );
}

function drawActions(mine) {
  const { job } = mine;
  const kind = `${OVER.has(job.status)} ${job.fine_tuned_model}`;
  if (mine.actions === kind) return;
  mine.actions = kind;
  const nodes = [];
  if (!OVER.has(job.status)) {
    nodes.push(el("button", { type: "button", id: "job-cancel", text: "Cancel the job", onclick: () => cancel(mine) }));
  }
  if (job.status === "succeeded" && job.fine_tuned_model) {
    const name = encodeURIComponent(job.fine_tuned_model);
    nodes.push(el("a", { class: "button", href: `#compare/${name}`, text: "Compare with the base" }));
    nodes.push(el("a", { class: "button primary", href: `#chat/${name}`, text: "Chat with it" }));
  }
  const hadFocus = $("job-actions").contains(document.activeElement);
  $("job-actions").replaceChildren(...nodes);
  if (hadFocus) $("job-name").focus();
}

async function cancel(mine) {
  const yes = await ask({
    title: "Cancel this job?",
    text: "It stops and cannot be continued.",
    yes: "Cancel the job",
    no: "Let it run",
  });
  if (!yes) return;
  try {
    await request(address(mine, "/cancel"), { method: "POST", admin: true });
    await refresh(mine);
  } catch (error) {
    toast(error.message, true);
  }
}

function drawCheckpoints(mine, list) {
  const text = JSON.stringify(list);
  if (mine.checkpoints === text) return;
  mine.checkpoints = text;
  $("job-checkpoints").hidden = list.length === 0;
  $("job-no-checkpoints").hidden = list.length > 0;
  $("job-checkpoints").tBodies[0].replaceChildren(
    ...list.map(({ id, step_number: step, metrics = {}, fine_tuned_model_checkpoint: name }) =>
      el(
        "tr",
        {},
        el("td", { class: "number", text: count(step) }),
        el("td", { class: "number", text: figure(metrics.train_loss) }),
        el("td", { class: "number", text: figure(metrics.full_valid_loss ?? metrics.valid_loss) }),
        el("td", { class: "name", text: name ?? id }),
      ),
    ),
  );
}

function drawEvents() {
  if (!shown) return;
  const all = $("job-metrics").checked;
  const list = [...shown.events.values()]
    .filter((event) => all || event.type !== "metrics")
    .sort((a, b) => b.created_at - a.created_at || (b.data?.step ?? 0) - (a.data?.step ?? 0))
    .slice(0, SHOWN_EVENTS);
  const key = list.map((event) => event.id).join(" ");
  if ($("job-events").dataset.key === key && $("job-events").children.length) return;
  $("job-events").dataset.key = key;
  $("job-events").replaceChildren(
    ...list.map((event) =>
      el(
        "li",
        { class: event.level === "info" ? null : event.level },
        el("time", { datetime: new Date(event.created_at * 1000).toISOString(), text: new Date(event.created_at * 1000).toLocaleTimeString() }),
        " ",
        event.level === "info" ? null : el("strong", { text: `${event.level}: ` }),
        el("span", { text: event.message }),
      ),
    ),
  );
}
