// The page of a lowrank server: which view is shown, and what stands around it.

import * as adapters from "./adapters.js";
import { forgetKeys, hasKeys, request, signals } from "./api.js";
import * as chat from "./chat.js";
import * as compare from "./compare.js";
import * as jobs from "./jobs.js";
import { $, refreshModels, setText, toast } from "./parts.js";

const VIEWS = { chat, compare, adapters, jobs };
const RETRY_MS = 3000;
let current = null;

// An address is #view or #view/part, where the part is a model's name or a job's id.
function readHash() {
  const [name, ...rest] = location.hash.slice(1).split("/");
  const view = Object.hasOwn(VIEWS, name) ? name : "chat";
  let part = rest.join("/");
  try {
    part = decodeURIComponent(part);
  } catch {
    // A hand-written address with a lone %: taken as it is.
  }
  return { view, part };
}

async function route() {
  const { view, part } = readHash();
  if (current !== view) {
    if (current) VIEWS[current].hide?.();
    current = view;
    for (const name of Object.keys(VIEWS)) $(`view-${name}`).hidden = name !== view;
    scrollTo(0, 0);
  }
  for (const link of document.querySelectorAll("nav a[data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${view[0].toUpperCase()}${view.slice(1)} · lowrank`;
  // The choice of a model is used up: a reload should not undo a later one.
  if (part && (view === "chat" || view === "compare")) history.replaceState(null, "", `#${view}`);
  const linked = document.activeElement === document.body || !document.activeElement.checkVisibility();
  try {
    await VIEWS[view].show(part);
    // Whoever followed a link inside of a view that is gone now goes on at the top of the new one.
    if (linked && part) $("main").focus({ preventScroll: true });
  } catch (error) {
    report(error);
  }
}

// A server that does not answer has its own line at the top.
function report(error) {
  if (error.name !== "AbortError" && error.status !== 0) toast(error.message, true);
}

function watchConnection() {
  let timer = 0;
  signals.addEventListener("offline", () => {
    if (timer) return;
    $("offline").hidden = false;
    setText($("offline"), "The server does not answer. Trying again.");
    timer = setInterval(() => request("health", { patient: false }).catch(() => {}), RETRY_MS);
  });
  signals.addEventListener("online", () => {
    if (!timer) return;
    clearInterval(timer);
    timer = 0;
    $("offline").hidden = true;
    route();
  });
}

function watchKeys() {
  const show = () => ($("forget-keys").hidden = !hasKeys());
  signals.addEventListener("keys", show);
  show();
  $("forget-keys").addEventListener("click", () => {
    forgetKeys();
    toast("The key is forgotten.");
    $("main").focus();
  });
}

$("skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("main").focus();
});
for (const view of Object.values(VIEWS)) view.start();
watchConnection();
watchKeys();
addEventListener("hashchange", route);
// The models first: what they answer shows which key the server wants.
await refreshModels().catch(report);
await route();
