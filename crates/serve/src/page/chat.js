// The view that talks with one model at a time.

import { answer, describe, numberOf, TextStream } from "./generate.js";
import { $, chooseModel, copyButton, el, models, refreshModels, selectModel, setText, Speaker } from "./parts.js";

// What was said: `{ user, text, node, … }`. `text` is null while there is no answer.
const exchanges = [];
let running = null;

const PLAIN_NOTE =
  "This model has no chat template: your message was sent as the text to continue, without the system prompt and earlier messages.";

export function start() {
  chooseModel($("chat-model"), { fallback: () => models.base });
  const input = $("chat-input");
  $("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else send();
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!running) send();
    }
    if (event.key === "Escape" && running) running.abort();
  });
  input.addEventListener("input", grow);
  $("chat-clear").addEventListener("click", clear);
  // The settings stand open where there is room for them.
  const wide = matchMedia("(min-width: 60rem)");
  const place = () => ($("chat-settings").open = wide.matches);
  wide.addEventListener("change", place);
  place();
}

/** Called when the view is shown. */
export async function show(model) {
  if (model) selectModel($("chat-model"), model);
  if (matchMedia("(hover: hover)").matches && document.activeElement === document.body) {
    $("chat-input").focus({ preventScroll: true });
  }
  await refreshModels();
}

// The composer grows with its text, up to the height that its style allows.
function grow() {
  const input = $("chat-input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

function clear() {
  running?.abort();
  for (const exchange of exchanges) exchange.node.remove();
  exchanges.length = 0;
  $("chat-empty").hidden = false;
  $("chat-input").focus();
}

function send() {
  const input = $("chat-input");
  const user = input.value.trim();
  if (!user) {
    input.focus();
    return;
  }
  input.value = "";
  grow();
  $("chat-empty").hidden = true;
  const node = el("div", { class: "exchange" });
  const said = el("div", { class: "turn user" }, el("h2", { class: "unseen", text: "You" }), el("p", { text: user }));
  node.append(said);
  $("chat-log").append(node);
  const exchange = { user, text: null, node, reply: null };
  exchanges.push(exchange);
  run(exchange);
}

// Exchanges that failed or were stopped before the first word are left out, so that turns keep alternating.
function messagesFor(exchange) {
  const system = $("chat-system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const { user, text } of exchanges.slice(0, exchanges.indexOf(exchange))) {
    if (text) messages.push({ role: "user", content: user }, { role: "assistant", content: text });
  }
  messages.push({ role: "user", content: exchange.user });
  return messages;
}

function replyParts(model) {
  const body = el("div", { class: "body streaming" });
  const note = el("p", { class: "hint", hidden: true });
  const stats = el("p", { class: "stats", text: "Waiting for the first token" });
  const tools = el("div", { class: "tools" });
  // The figures stand above the text, where a growing text does not move them.
  const head = el("div", { class: "reply-head" }, el("h2", { text: model }), stats);
  const node = el("div", { class: "turn assistant" }, head, note, body, tools);
  return { node, body, note, stats, tools };
}

async function run(exchange) {
  const model = $("chat-model").value;
  const reply = replyParts(model);
  exchange.reply?.node.remove();
  exchange.reply = reply;
  exchange.text = null;
  exchange.node.append(reply.node);
  for (const old of document.querySelectorAll("#chat-log .again")) old.remove();
  const control = new AbortController();
  busy(control);
  scrollTo(0, document.documentElement.scrollHeight);

  const stream = new TextStream(reply.body, () => follow());
  const speaker = new Speaker();
  try {
    const result = await answer({
      model,
      messages: messagesFor(exchange),
      temperature: numberOf($("chat-temperature")),
      maxTokens: numberOf($("chat-max")),
      signal: control.signal,
      onPlain() {
        setText(reply.note, PLAIN_NOTE);
        reply.note.hidden = false;
      },
      onText(piece, figures) {
        stream.add(piece);
        speaker.add(piece);
        setText(reply.stats, describe(figures));
      },
    });
    exchange.text = result.text;
    setText(reply.stats, describe(result));
    if (result.text) reply.tools.append(copyButton(() => exchange.text));
    speaker.finish(result.stopped ? " Stopped." : "");
  } catch (error) {
    stream.flush();
    reply.body.hidden = reply.body.textContent === "";
    reply.body.after(el("p", { class: "problem", role: "alert", text: error.message }));
    setText(reply.stats, reply.body.hidden ? "No answer" : "Not finished");
    speaker.finish();
  }
  stream.flush();
  reply.body.classList.remove("streaming");
  if (exchanges.at(-1) === exchange) reply.tools.append(againButton(exchange));
  if (running === control) busy(null);
  follow();
}

function againButton(exchange) {
  return el("button", {
    type: "button",
    class: "quiet again",
    text: "Ask again",
    title: "Ask the chosen model the same again",
    onclick() {
      if (running) return;
      run(exchange);
      $("chat-input").focus();
    },
  });
}

function busy(control) {
  running = control;
  setText($("chat-send"), control ? "Stop" : "Send");
  $("chat-send").classList.toggle("stop", Boolean(control));
}

// Follows the text while the end of the page is in sight, and leaves alone whoever has scrolled up to read.
let atEnd = true;
addEventListener("scroll", () => {
  const page = document.documentElement;
  atEnd = page.scrollHeight - page.clientHeight - page.scrollTop < 48;
}, { passive: true });

function follow() {
  if (atEnd && !$("view-chat").hidden) scrollTo(0, document.documentElement.scrollHeight);
}
