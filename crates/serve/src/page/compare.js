// The view that asks two models the same and marks what only one of them wrote.

import { answer, describe, numberOf, TextStream } from "./generate.js";
import { $, chooseModel, el, firstAdapter, models, refreshModels, selectModel, setText, Speaker } from "./parts.js";
import { diffWords } from "./words.js";

const SIDES = ["left", "right"];
let running = null;
let results = null;

export function start() {
  chooseModel($("compare-left"), { fallback: () => models.base });
  chooseModel($("compare-right"), { fallback: firstAdapter });
  $("compare-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else run();
  });
  $("compare-prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      if (!running) run();
    }
    if (event.key === "Escape" && running) running.abort();
  });
  $("compare-mark").addEventListener("change", paint);
}

/** Called when the view is shown; `model` is for the right column. */
export async function show(model) {
  if (model) selectModel($("compare-right"), model);
  await refreshModels();
}

async function run() {
  const prompt = $("compare-prompt").value.trim();
  if (!prompt) {
    setText($("compare-summary"), "Write a prompt first.");
    $("compare-prompt").focus();
    return;
  }
  const system = $("compare-system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  messages.push({ role: "user", content: prompt });
  const control = new AbortController();
  busy(control);
  results = null;
  setText($("compare-summary"), "");
  const asked = await Promise.all(SIDES.map((side) => fill(side, messages, control.signal)));
  if (asked.every((result) => result?.text)) results = asked;
  busy(null);
  paint();
}

async function fill(side, messages, signal) {
  const box = $(`compare-${side}-text`);
  const stats = $(`compare-${side}-stats`);
  const model = $(`compare-${side}`).value;
  box.replaceChildren();
  box.classList.add("streaming");
  setText(stats, "Waiting for the first token");
  const stream = new TextStream(box);
  let note = "";
  try {
    const result = await answer({
      model,
      messages,
      temperature: numberOf($("compare-temperature")),
      maxTokens: numberOf($("compare-max")),
      signal,
      onPlain() {
        note = " · plain text, as there is no chat template";
      },
      onText(piece, figures) {
        stream.add(piece);
        setText(stats, describe(figures));
      },
    });
    stream.flush();
    setText(stats, describe(result) + note);
    // Two texts that stream at once can't be said at once: each is said when it is whole.
    new Speaker().finish(`${model}: ${result.text}`);
    return result;
  } catch (error) {
    stream.flush();
    box.append(el("p", { class: "problem", role: "alert", text: error.message }));
    setText(stats, "No answer");
    return null;
  } finally {
    box.classList.remove("streaming");
  }
}

// Marks take no room, so the text does not move when they appear.
function paint() {
  if (!results) return;
  const difference = $("compare-mark").checked ? diffWords(results[0].text, results[1].text) : null;
  SIDES.forEach((side, i) => {
    const parts = difference?.[side] ?? [{ text: results[i].text, common: true }];
    $(`compare-${side}-text`).replaceChildren(
      ...parts.flatMap((part) => (part.common ? [part.text] : marked(part.text, side))),
    );
  });
  setText($("compare-summary"), summary(difference));
}

// The white space behind a word that differs is not part of the difference.
function marked(text, side) {
  const words = text.trimEnd();
  return [el("mark", { class: side, text: words }), text.slice(words.length)];
}

function summary(difference) {
  if (results[0].text === results[1].text) return "Both answers are the same.";
  if (!$("compare-mark").checked) return "";
  if (!difference) return "The answers are too long to compare word by word.";
  const only = (parts) => parts.reduce((sum, part) => sum + (part.common ? 0 : part.words), 0);
  const [left, right] = [only(difference.left), only(difference.right)];
  if (left + right === 0) return "The words are the same; the white space differs.";
  return `${left} ${left === 1 ? "word" : "words"} only left, ${right} only right.`;
}

function busy(control) {
  running = control;
  setText($("compare-run"), control ? "Stop" : "Compare");
  $("compare-run").classList.toggle("stop", Boolean(control));
}
