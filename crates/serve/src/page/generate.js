// One answer, streamed: from the chat endpoint, or from plain completion for a model without a chat template.

import { events, request } from "./api.js";
import { count } from "./parts.js";

// Models that said they have no chat template.
const plainModels = new Set();

/**
 * Streams an answer and returns `{ text, plain, stopped, finish, usage, tokens, first, rate }`; `rate` is null for a
 * short answer.
 *
 * `messages` are OpenAI's. `onText` gets each piece of text, and `onPlain` is called where the model has no chat
 * template: then only the last message is sent, as the text to continue. An abort through `signal` is no error; the
 * result then says `stopped`.
 */
export async function answer({ model, messages, temperature, maxTokens, signal, onText, onPlain }) {
  const result = { text: "", plain: plainModels.has(model), stopped: false, finish: null, usage: null };
  const clock = { sent: performance.now(), first: null, last: null, pieces: 0 };
  const body = { model, stream: true, stream_options: { include_usage: true } };
  if (temperature !== null) body.temperature = temperature;
  if (maxTokens !== null) body.max_tokens = maxTokens;
  try {
    const response = await open(result, body, messages, signal, clock, onPlain);
    for await (const event of events(response)) {
      const choice = event.choices?.[0];
      const piece = (result.plain ? choice?.text : choice?.delta?.content) ?? "";
      if (event.usage) result.usage = event.usage;
      if (choice?.finish_reason) result.finish = choice.finish_reason;
      if (!piece) continue;
      clock.last = performance.now();
      clock.first ??= clock.last;
      clock.pieces += 1;
      result.text += piece;
      onText(piece, measure(result, clock));
    }
  } catch (error) {
    if (!signal.aborted) throw error;
    result.stopped = true;
  }
  return { ...result, ...measure(result, clock) };
}

async function open(result, body, messages, signal, clock, onPlain) {
  if (!result.plain) {
    try {
      const json = { ...body, messages };
      return await request("v1/chat/completions", { method: "POST", json, signal });
    } catch (error) {
      if (error.code !== "no_chat_template") throw error;
      plainModels.add(body.model);
      result.plain = true;
      clock.sent = performance.now();
    }
  }
  onPlain?.();
  const json = { ...body, prompt: messages.at(-1).content };
  return request("v1/completions", { method: "POST", json, signal });
}

// Tokens that came within a shorter time than this have no rate that means anything.
const SHORTEST_SECONDS = 0.2;

// A server may send several tokens in one piece, so its own count is taken where there is one. The rate leaves out the
// time until the first token, which is the prompt's.
function measure(result, clock) {
  const tokens = result.usage?.completion_tokens ?? clock.pieces;
  const seconds = (clock.last - clock.first) / 1000;
  return {
    tokens,
    first: clock.first === null ? null : (clock.first - clock.sent) / 1000,
    rate: tokens > 1 && seconds >= SHORTEST_SECONDS ? (tokens - 1) / seconds : null,
  };
}

/** What the line below an answer says, while it streams and after it. */
export function describe({ tokens, first, rate, usage = null, finish = null, stopped = false }) {
  const parts = [];
  if (stopped) parts.push("Stopped");
  if (finish === "length") parts.push("Cut at max tokens");
  parts.push(`${count(tokens)} ${tokens === 1 ? "token" : "tokens"}`);
  if (rate !== null) parts.push(`${rate.toFixed(1)} tokens/s`);
  if (first !== null) parts.push(`first token after ${first.toFixed(2)} s`);
  if (usage?.prompt_tokens !== undefined) parts.push(`prompt ${count(usage.prompt_tokens)} tokens`);
  return parts.join(" · ");
}

/** Adds streamed pieces to a text node, at most once a frame. */
export class TextStream {
  #node = document.createTextNode("");
  #waiting = "";
  #frame = 0;
  #after;

  constructor(parent, after = () => {}) {
    parent.append(this.#node);
    this.#after = after;
  }

  add(piece) {
    this.#waiting += piece;
    // A hidden tab has no frames; its text must not pile up.
    if (document.hidden) this.flush();
    else this.#frame ||= requestAnimationFrame(() => this.flush());
  }

  flush() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    if (!this.#waiting) return;
    this.#node.appendData(this.#waiting);
    this.#waiting = "";
    this.#after();
  }
}

/** A number from an input, or null where it is empty or not a number. */
export function numberOf(input) {
  return input.value.trim() === "" || !Number.isFinite(input.valueAsNumber) ? null : input.valueAsNumber;
}
