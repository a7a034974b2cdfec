// Calls to the server: keys, errors, JSON and server-sent events.
//
// Addresses are relative to the page, so that it also works behind a proxy that serves it under a path.

/** An answer that is not 2xx, or no answer at all (then `status` is 0). */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
  }
}

/** Dispatches "offline" where a call gets no answer, "online" where one does and "keys" where keys change. */
export const signals = new EventTarget();

// Keys last as long as the tab. Where the browser forbids storage, they last as long as the page.
const memory = new Map();

function readKey(kind) {
  try {
    return sessionStorage.getItem(`lowrank.${kind}`);
  } catch {
    return memory.get(kind) ?? null;
  }
}

function writeKey(kind, value) {
  try {
    if (value) sessionStorage.setItem(`lowrank.${kind}`, value);
    else sessionStorage.removeItem(`lowrank.${kind}`);
  } catch {
    if (value) memory.set(kind, value);
    else memory.delete(kind);
  }
  signals.dispatchEvent(new Event("keys"));
}

export function hasKeys() {
  return Boolean(readKey("key") || readKey("admin"));
}

export function forgetKeys() {
  writeKey("key", null);
  writeKey("admin", null);
}

let prompter = null;
let asking = null;

/** Sets the function that asks the person for a key: `(kind, message) → Promise<string | null>`. */
export function askKeysWith(ask) {
  prompter = ask;
}

// Calls that fail together ask once.
function askKey(kind, message) {
  asking ??= prompter(kind, message)
    .then((value) => {
      if (value) writeKey(kind, value);
      return value;
    })
    .finally(() => {
      asking = null;
    });
  return asking;
}

/**
 * Sends a request and returns the Response if it is 2xx, or throws an ApiError.
 *
 * `admin` marks the calls for which a server may want another key. `patient` is false for calls that repeat by
 * themselves: those fail instead of asking for a key.
 */
export async function request(path, { method = "GET", json, body, signal, admin = false, patient = true } = {}) {
  for (;;) {
    const key = (admin && readKey("admin")) || readKey("key") || readKey("admin");
    const headers = {};
    if (key) headers.Authorization = `Bearer ${key}`;
    if (json !== undefined) headers["Content-Type"] = "application/json";
    const response = await send(path, {
      method,
      headers,
      signal,
      body: json === undefined ? body : JSON.stringify(json),
    });
    if (response.ok) return response;
    const error = await readError(response);
    // A folder that the server does not read is forbidden to every key.
    const forbidden = error.status === 403 && admin && error.code !== "adapter_path_forbidden";
    const wantsKey = error.status === 401 || forbidden;
    if (!wantsKey || !patient || !prompter) throw error;
    // Another call may have got a key while this one was on its way.
    const now = (admin && readKey("admin")) || readKey("key") || readKey("admin");
    if (now !== key) continue;
    if (!(await askKey(admin ? "admin" : "key", key ? error.message : ""))) throw error;
  }
}

async function send(path, options) {
  try {
    const response = await fetch(path, options);
    signals.dispatchEvent(new Event("online"));
    return response;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    signals.dispatchEvent(new Event("offline"));
    throw new ApiError("The server does not answer.");
  }
}

async function readError(response) {
  const text = await response.text().catch(() => "");
  let error = null;
  try {
    error = JSON.parse(text).error;
  } catch {
    // Not JSON: a proxy's page, or nothing.
  }
  const message = error?.message ?? `The server answered ${response.status} ${response.statusText}`.trim();
  return new ApiError(message, { status: response.status, code: error?.code, param: error?.param });
}

/** As `request`, and returns the JSON of the answer. */
export async function getJson(path, options) {
  return (await request(path, options)).json();
}

/** Yields the data of each server-sent event of a response, parsed as JSON, until `[DONE]` or the end. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let data = [];
  let complete = false;
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection broke off.");
      });
      buffer += done ? "\n\n" : value;
      const lines = buffer.split(/\r\n|\n|\r(?!$)/);
      buffer = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line !== "" || data.length === 0) continue;
        const text = data.join("\n");
        data = [];
        if (text === "[DONE]") {
          complete = true;
          return;
        }
        const event = JSON.parse(text);
        if (event.error) throw new ApiError(event.error.message ?? "The server stopped the stream.", event.error);
        yield event;
      }
      if (done) return;
    }
  } finally {
    // Hanging up right behind the last event would look to the server like a client that left.
    if (complete) drain(reader);
    else reader.cancel().catch(() => {});
  }
}

async function drain(reader) {
  try {
    while (!(await reader.read()).done);
  } catch {
    // The answer was whole already.
  }
}
