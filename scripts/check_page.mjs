#!/usr/bin/env node
// Clicks through the page of a running `lowrank serve` and fails on the first thing that is not as it should be.
//
//   npm install playwright-core     (in any folder; start this script from there)
//   node check_page.mjs --url URL --adapter-path FOLDER --rows FILE.jsonl
//        [--key KEY] [--admin-key KEY] [--base-prompt TEXT] [--shots FOLDER]
//
// URL is the server's, FOLDER an adapter of its base model as the server sees it, and FILE.jsonl rows to train on. The
// server must allow adapters to be loaded from FOLDER, and jobs. A key is typed where the page asks for it. Chromium is
// the program that the environment variable CHROMIUM names, or `chromium` on the PATH. --shots keeps screenshots.
//
// An adapter "check-page" is loaded and unloaded, a job is started and cancelled, and another one runs to its end; its
// adapter stays.

import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, join } from "node:path";
import { parseArgs } from "node:util";

const { values: options } = parseArgs({
  options: {
    url: { type: "string" },
    "adapter-path": { type: "string" },
    rows: { type: "string" },
    key: { type: "string" },
    "admin-key": { type: "string" },
    "base-prompt": { type: "string", default: "Hello" },
    shots: { type: "string" },
  },
});
for (const name of ["url", "adapter-path", "rows"]) {
  if (!options[name]) stop(`--${name} is missing; the head of this script says how to call it`);
}
if (!existsSync(options.rows)) stop(`${options.rows}: no such file`);
const URL_BASE = options.url.replace(/\/*$/, "/");
const ADAPTER = "check-page";
const SLOW_MS = 120_000;

function stop(message) {
  console.error(`check_page: ${message}`);
  process.exit(1);
}

function loadPlaywright() {
  for (const from of [import.meta.url, join(process.cwd(), "x.js")]) {
    try {
      return createRequire(from)("playwright-core");
    } catch {
      // Looked for in the next place.
    }
  }
  return stop("playwright-core is not installed here: npm install playwright-core");
}

function findChromium() {
  if (process.env.CHROMIUM) return process.env.CHROMIUM;
  try {
    return execFileSync("which", ["chromium"], { encoding: "utf8" }).trim();
  } catch {
    return stop("there is no chromium on the PATH, and CHROMIUM is not set");
  }
}

// What is expected, and what went wrong unexpectedly.

let step = "start";
const wrong = [];
// Answers that a check causes on purpose: `{ path, status }`. Chromium also writes each to the console.
let expected = [];
let mayAbort = false;

function expect(value, message) {
  if (!value) throw new Error(message);
}

async function check(name, run) {
  step = name;
  const begun = Date.now();
  await run();
  if (wrong.length) throw new Error(wrong.join("\n  "));
  console.log(`ok  ${name} (${((Date.now() - begun) / 1000).toFixed(1)} s)`);
}

/** Polls until `probe` returns something true, and returns that. */
async function until(message, probe, limit = 15_000) {
  const end = Date.now() + limit;
  for (;;) {
    const value = await probe();
    if (value) return value;
    if (Date.now() > end) throw new Error(`${message} (waited ${limit / 1000} s)`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

function isExpected(url, status) {
  return expected.some((one) => url.includes(one.path) && (one.status === status || status === undefined));
}

function watch(page) {
  page.on("pageerror", (error) => wrong.push(`uncaught error in the page: ${error.message}`));
  page.on("console", (message) => {
    if (message.type() !== "error" && message.type() !== "warning") return;
    const { url } = message.location();
    const status = Number(/status of (\d+)/.exec(message.text())?.[1]) || undefined;
    if (status && isExpected(url, status)) return;
    if (mayAbort && message.text().includes("ERR_ABORTED")) return;
    wrong.push(`console ${message.type()}: ${message.text()} (${url})`);
  });
  page.on("response", (response) => {
    if (response.status() >= 400 && !isExpected(response.url(), response.status())) {
      wrong.push(`${response.request().method()} ${response.url()} answered ${response.status()}`);
    }
    if (!response.url().startsWith(URL_BASE) && !response.url().startsWith("data:")) {
      wrong.push(`the page loaded something from elsewhere: ${response.url()}`);
    }
  });
  page.on("requestfailed", (request) => {
    const reason = request.failure()?.errorText;
    // Leaving a view ends the stream of a job's events and calls under way.
    const left = reason === "net::ERR_ABORTED" && (mayAbort || /fine_tuning|adapters|files|models/.test(request.url()));
    if (!left) wrong.push(`${request.method()} ${request.url()} failed: ${reason}`);
  });
}

// Text that grows may move nothing but itself; the browser's measure of that is close to nothing then.
async function watchShifts(page) {
  await page.evaluate(() => {
    globalThis.shifted = 0;
    const add = (list) => list.getEntries().forEach((entry) => (globalThis.shifted += entry.value));
    new PerformanceObserver(add).observe({ type: "layout-shift" });
  });
  return async () => {
    const moved = await page.evaluate(() => globalThis.shifted);
    expect(moved < 0.01, `the page jumps while text streams (layout shift ${moved.toFixed(3)})`);
  };
}

const text = (page, selector) => page.locator(selector).textContent();
const sent = (page) => until("the answer never ended", async () => (await text(page, "#chat-send")) === "Send", SLOW_MS);

async function shot(page, name) {
  if (!options.shots) return;
  mkdirSync(options.shots, { recursive: true });
  await page.screenshot({ path: join(options.shots, `${name}.png`) });
}

/** Types the key where the page asks for it; without a key it must not ask. */
async function giveKey(page, key, ready) {
  const dialog = page.locator("#key[open]");
  await until("neither the page nor a question for the key appeared", async () => (await dialog.count()) > 0 || (await ready()));
  if ((await dialog.count()) === 0) return false;
  expect(key, `the server wants a key ("${await text(page, "#key-title")}"): give --key, or --admin-key for the admin's`);
  await page.fill("#key-value", key);
  await page.press("#key-value", "Enter");
  await until("the dialog for the key stayed open", async () => (await dialog.count()) === 0);
  return true;
}

async function goTo(page, view) {
  await page.click(`nav a[data-view=${view}]`);
  await page.waitForSelector(`#view-${view}:not([hidden])`);
}

async function ask(page, message) {
  await page.fill("#chat-input", message);
  await page.press("#chat-input", "Enter");
}

const lastReply = (page) => page.locator("#chat-log .turn.assistant").last();

// The checks.

async function opens(page) {
  expected = options.key || options["admin-key"] ? [{ path: "v1/", status: 401 }] : [];
  await page.goto(URL_BASE);
  const filled = async () => (await page.locator("#chat-model option").count()) > 0;
  const asked = await giveKey(page, options.key, filled);
  if (options.key) expect(asked, "--key is given, but the page did not ask for it");
  await until("the list of models stayed empty", filled);
  expected = [];
  expect((await text(page, "#base-name")) !== "", "the name of the base is not shown");
  expect((await page.title()) === "Chat · lowrank", `the title is "${await page.title()}"`);
}

async function chats(page) {
  // A base without a chat template answers the first call so; the page then continues plain text.
  expected = [{ path: "v1/chat/completions", status: 400 }];
  await ask(page, options["base-prompt"]);
  const isStill = await watchShifts(page);
  await sent(page);
  await isStill();
  expected = [];
  expect((await page.locator("#chat-log .problem").count()) === 0, `an error: ${await page.locator("#chat-log .problem").allTextContents()}`);
  expect((await lastReply(page).locator(".body").textContent()) !== "", "the answer is empty");
  const stats = await lastReply(page).locator(".stats").textContent();
  expect(/\d+ tokens? · .*first token after [\d.]+ s · prompt \d+ tokens/.test(stats), `the figures are "${stats}"`);
  expect((await page.locator("#spoken p").count()) > 0, "nothing was said to screen readers");
  await lastReply(page).locator(".copy").click();
  await until("Copy did not say that it copied", async () => (await lastReply(page).locator(".copy").textContent()) === "Copied");
  await shot(page, "chat");
}

// A slow network keeps the answer under way for long enough.
async function stops(page) {
  const session = await page.context().newCDPSession(page);
  await session.send("Network.enable");
  const speed = (down, latency) =>
    session.send("Network.emulateNetworkConditions", { offline: false, latency, downloadThroughput: down, uploadThroughput: -1 });
  await speed(1500, 500);
  mayAbort = true;
  await page.fill("#chat-max", "2000");
  await ask(page, "Tell me a long story.");
  await until("Send did not become Stop", async () => (await text(page, "#chat-send")) === "Stop");
  const width = (await page.locator("#chat-send").boundingBox()).width;
  const body = lastReply(page).locator(".body");
  await until("no text came", async () => (await body.textContent()) !== "" || (await text(page, "#chat-send")) === "Send", 20_000);
  expect((await text(page, "#chat-send")) === "Stop", "the answer ended before it could be stopped; a longer --base-prompt may help");
  await page.click("#chat-send");
  await until("Stop did not stop", async () => (await text(page, "#chat-send")) === "Send", 3000);
  await speed(-1, 0);
  expect((await page.locator("#chat-send").boundingBox()).width === width, "the button changed its width");
  const stats = await lastReply(page).locator(".stats").textContent();
  expect(stats.startsWith("Stopped"), `the figures of a stopped answer are "${stats}"`);
  const length = (await body.textContent()).length;
  await page.waitForTimeout(300);
  expect((await body.textContent()).length === length, "text came after the stop");
  await page.fill("#chat-max", "64");
  mayAbort = false;
  await session.detach();
}

async function loads(page) {
  await goTo(page, "adapters");
  await until("the adapters did not come", async () => (await text(page, "#adapters-count")) !== "");
  expected = [
    { path: "load_lora_adapter", status: 400 },
    { path: "load_lora_adapter", status: 401 },
    { path: "load_lora_adapter", status: 403 },
    { path: "load_lora_adapter", status: 404 },
  ];
  const left = page.locator(`#adapters-body tr[data-id="${ADAPTER}"]`);
  if (await left.count()) await unload(page, left);
  await page.click("#adapters-load");
  await page.fill("#load-name", ADAPTER);
  await page.fill("#load-path", "/no/such/folder");
  await page.click("#load-go");
  const problem = async () => (await text(page, "#load-error")) !== "" && (await page.locator("#load-error:not([hidden])").count()) > 0;
  await giveKey(page, options["admin-key"] ?? options.key, problem);
  await until("a folder that is not there gave no message", problem);
  expected = [];
  await page.fill("#load-path", options["adapter-path"]);
  await page.click("#load-go");
  await until(`the adapter was not loaded: ${options["adapter-path"]}`, async () => {
    if (await problem()) throw new Error(`the adapter was not loaded: ${await text(page, "#load-error")}`);
    return (await left.count()) === 1;
  }, SLOW_MS);
  expect((await page.locator("#load[open]").count()) === 0, "the dialog stayed open");
}

async function sortsAndPins(page) {
  await page.fill("#adapters-filter", ADAPTER);
  const row = page.locator(`#adapters-body tr[data-id="${ADAPTER}"]`);
  await until("the filter hides what it should show", async () => (await row.count()) === 1);
  await page.fill("#adapters-filter", "no adapter is called so");
  await until("the filter shows what it should hide", async () => (await row.count()) === 0);
  expect(await page.locator("#adapters-empty:not([hidden])").count(), "an empty result is not explained");
  await page.fill("#adapters-filter", "");
  const head = page.locator('#adapters-head th[data-key="bytes"]');
  await head.locator("button").click();
  expect((await head.getAttribute("aria-sort")) === "descending", "the first click on Size does not sort the largest first");
  await head.locator("button").click();
  expect((await head.getAttribute("aria-sort")) === "ascending", "the second click on Size does not turn the order");
  await page.locator('#adapters-head th[data-key="id"] button').click();
  await page.fill("#adapters-filter", ADAPTER);
  const pin = row.locator("button.pin");
  expect((await pin.textContent()) === "Pin", "the adapter is pinned from the start");
  await pin.click();
  await until("Pin did not become Unpin", async () => (await pin.textContent()) === "Unpin");
  await pin.click();
  await until("Unpin did not become Pin", async () => (await pin.textContent()) === "Pin");
  await shot(page, "adapters");
}

async function switches(page) {
  await page.fill("#adapters-filter", ADAPTER);
  await page.locator(`#adapters-body tr[data-id="${ADAPTER}"] a`).click();
  await page.waitForSelector("#view-chat:not([hidden])");
  await until("the adapter is not chosen", async () => (await page.inputValue("#chat-model")) === ADAPTER);
  const before = await page.locator("#chat-log .turn.assistant").count();
  expect(before > 0, "the conversation was lost");
  expected = [{ path: "v1/chat/completions", status: 400 }];
  await ask(page, options["base-prompt"]);
  await sent(page);
  expected = [];
  expect((await lastReply(page).locator("h2").textContent()) === ADAPTER, "the answer does not say that the adapter wrote it");
  expect((await lastReply(page).locator(".body").textContent()) !== "", "the adapter's answer is empty");
  await page.click("#chat-clear");
  expect((await page.locator("#chat-log .turn").count()) === 0, "Clear left something");
}

async function compares(page) {
  await goTo(page, "compare");
  const base = await text(page, "#base-name");
  expect((await page.inputValue("#compare-left")) === base, "the left model is not the base");
  await page.selectOption("#compare-right", ADAPTER);
  await page.fill("#compare-prompt", options["base-prompt"]);
  await page.fill("#compare-max", "64");
  expected = [{ path: "v1/chat/completions", status: 400 }];
  const isStill = await watchShifts(page);
  await page.click("#compare-run");
  await until("the comparison never ended", async () => (await text(page, "#compare-run")) === "Compare" && (await text(page, "#compare-left-stats")) !== "", SLOW_MS);
  await isStill();
  expected = [];
  const [left, right] = [await text(page, "#compare-left-text"), await text(page, "#compare-right-text")];
  expect(left && right, "an answer is empty");
  const summary = await text(page, "#compare-summary");
  const marks = await page.locator(".answer mark").count();
  if (left === right) expect(summary === "Both answers are the same." && marks === 0, `the same answers, but "${summary}"`);
  else expect(/words? only left|white space/.test(summary), `the answers differ, but the summary is "${summary}"`);
  if (summary.includes("only left")) {
    expect(marks > 0, "the answers differ, but nothing is marked");
    await page.uncheck("#compare-mark");
    expect((await page.locator(".answer mark").count()) === 0, "the marks cannot be taken away");
    expect((await text(page, "#compare-left-text")) === left, "the text changed with the marks");
    await page.check("#compare-mark");
  }
  await shot(page, "compare");
}

async function unload(page, row) {
  await row.locator("button", { hasText: "Unload" }).click();
  await page.waitForSelector("#ask[open]");
  await page.click("#ask-yes");
  await until("the adapter is still listed", async () => (await row.count()) === 0);
}

async function unloads(page) {
  await goTo(page, "adapters");
  await page.fill("#adapters-filter", ADAPTER);
  const row = page.locator(`#adapters-body tr[data-id="${ADAPTER}"]`);
  await row.locator("button", { hasText: "Unload" }).click();
  await page.waitForSelector("#ask[open]");
  await page.keyboard.press("Escape");
  await page.waitForSelector("#ask:not([open])", { state: "attached" });
  expect((await row.count()) === 1, "Escape unloaded the adapter");
  await unload(page, row);
  await page.fill("#adapters-filter", "");
  expect(!(await page.locator("#chat-model option").allTextContents()).includes(ADAPTER), "the chat still offers the adapter");
}

async function previews(page) {
  await goTo(page, "jobs");
  await page.click('#jobs-list a[href="#jobs/new"]');
  await page.waitForSelector("#jobs-new:not([hidden])");
  await page.waitForSelector("#start-training option", { state: "attached" });
  await page.setInputFiles("#start-upload", options.rows);
  await until("the upload did not end", async () => {
    if (await page.locator("#start-error:not([hidden])").count()) throw new Error(`the upload failed: ${await text(page, "#start-error")}`);
    return (await text(page, "#start-upload-status")) === `${basename(options.rows)} is uploaded.`;
  }, SLOW_MS);
  await page.waitForSelector("#preview-rows .tok");
  expect(await page.locator("#preview-rows .tok.supervised").count(), "no token is marked as learned");
  const look = await page.locator("#preview-rows .tok.supervised").first().evaluate((node) => getComputedStyle(node).boxShadow);
  expect(look !== "none", "learned tokens are not underlined");
  expect(/Format: .+ · \d+ rows?/.test(await text(page, "#preview-report")), `the report is "${await text(page, "#preview-report")}"`);
  await shot(page, "preview");
}

async function drops(page) {
  const before = await page.locator("#start-validation option").count();
  const transfer = await page.evaluateHandle(() => {
    const data = new DataTransfer();
    data.items.add(new File(['{"prompt":"2+2=","completion":"4"}\n'], "dropped.jsonl"));
    return data;
  });
  await page.dispatchEvent("#start-drop", "drop", { dataTransfer: transfer });
  await until("a dropped file was not uploaded", async () => (await page.locator("#start-validation option").count()) > before);
}

async function startJob(page, steps, suffix) {
  if (!(await page.locator("#jobs-new:not([hidden])").count())) {
    await goTo(page, "jobs");
    await page.click('#jobs-list a[href="#jobs/new"]');
    await page.waitForSelector("#jobs-new:not([hidden])");
  }
  await until("no training file is chosen", () => page.inputValue("#start-training"));
  await page.fill("#start-suffix", suffix);
  await page.fill("#start-steps", String(steps));
  await page.fill("#start-batch", "2");
  await page.click("#start-go");
  await until("the job did not start", async () => {
    if (await page.locator("#start-error:not([hidden])").count()) throw new Error(`the job did not start: ${await text(page, "#start-error")}`);
    return (await page.locator("#jobs-detail:not([hidden])").count()) > 0;
  });
}

async function refusesWrongRate(page) {
  await page.fill("#start-rate", "fast");
  await page.click("#start-go");
  expect((await text(page, "#start-error")).startsWith("The learning rate"), "a wrong learning rate gives no message");
  expect(await page.locator("#start-rate:focus").count(), "the wrong field does not get the focus");
  await page.fill("#start-rate", "2e-4");
}

async function cancels(page) {
  await startJob(page, 100_000, "check-cancel");
  const points = async () => ((await page.locator("#job-chart .chart polyline.train").getAttribute("points").catch(() => "")) ?? "").split(" ").length;
  await until("the curve did not appear", async () => (await page.locator("#job-chart .chart polyline.train").count()) > 0 && (await points()) >= 2, SLOW_MS);
  const before = await text(page, "#job-progress-text");
  await until("the curve does not grow by itself", async () => (await text(page, "#job-progress-text")) !== before, SLOW_MS);
  expect((await text(page, "#job-status")) === "running", `the status is "${await text(page, "#job-status")}"`);
  await page.focus("#job-chart .chart");
  await page.keyboard.press("Home");
  await until("the arrow keys do not read the curve", async () => (await page.locator("#job-chart .cursor").count()) > 0);
  await shot(page, "job");
  await page.click("#job-cancel");
  await page.waitForSelector("#ask[open]");
  await page.click("#ask-yes");
  await until("the job was not cancelled", async () => (await text(page, "#job-status")) === "cancelled", SLOW_MS);
  await page.waitForSelector("#job-cancel", { state: "detached" });
}

async function finishes(page) {
  await startJob(page, 6, "check-page-job");
  await until("the job did not succeed", async () => {
    const status = await text(page, "#job-status");
    if (status === "failed") throw new Error(`the job failed: ${await text(page, "#job-error")}`);
    return status === "succeeded";
  }, SLOW_MS);
  await until("the last step is not shown", async () => (await text(page, "#job-progress-text")).startsWith("Step 6 of 6"));
  const name = await text(page, "#job-name");
  await page.click('#job-actions a[href^="#chat/"]');
  await until("the new adapter is not offered in the chat", async () => (await page.inputValue("#chat-model")) === name);
  await goTo(page, "jobs");
  await until("the list lacks the job", async () => (await page.locator("#jobs-body .name", { hasText: name }).count()) > 0);
}

async function keyboard(page) {
  await page.goto(`${URL_BASE}#compare`);
  await page.reload();
  await page.waitForSelector("#view-compare:not([hidden])");
  await page.evaluate(() => document.activeElement?.blur());
  await page.keyboard.press("Tab");
  expect(await page.locator("#skip:focus").count(), "the first stop is not the link that skips to the content");
  for (const view of ["chat", "compare", "adapters", "jobs"]) {
    await page.keyboard.press("Tab");
    expect(await page.locator(`nav a[data-view=${view}]:focus`).count(), `Tab does not reach ${view}`);
    const outline = await page.locator(":focus").evaluate((node) => getComputedStyle(node).outlineStyle);
    expect(outline !== "none", `the focus on ${view} is not visible`);
    await page.keyboard.press("Enter");
    await page.waitForSelector(`#view-${view}:not([hidden])`);
    expect((await page.locator("nav a[aria-current=page]").getAttribute("data-view")) === view, `${view} is not marked as the current one`);
    expect(await page.locator(`nav a[data-view=${view}]:focus`).count(), `${view} took the focus from its tab`);
  }
  for (const view of ["chat", "compare", "adapters", "jobs"]) await hasNoTrap(page, view);
}

// Tab must come around to the start, and each stop must have a name.
async function hasNoTrap(page, view) {
  await page.goto(`${URL_BASE}#${view}`);
  await page.waitForSelector(`#view-${view}:not([hidden])`);
  await page.waitForTimeout(300);
  await page.focus("#skip");
  for (let stops = 0; ; stops += 1) {
    expect(stops < 600, `${view}: Tab does not come around`);
    await page.keyboard.press("Tab");
    const at = await page.evaluate(() => {
      const node = document.activeElement;
      if (node === document.body || node.id === "skip") return null;
      const name = node.getAttribute("aria-label") || node.labels?.[0]?.textContent || node.textContent || node.title;
      return { id: node.id || node.outerHTML.slice(0, 80), name: name.trim() };
    });
    if (!at) return;
    expect(at.name, `${view}: ${at.id} has no name`);
  }
}

async function narrow(browser, state, colorScheme) {
  const context = await browser.newContext({ viewport: { width: 320, height: 640 }, colorScheme });
  const page = await context.newPage();
  watch(page);
  await page.addInitScript((kept) => Object.entries(kept).forEach(([key, value]) => sessionStorage.setItem(key, value)), state.keys);
  for (const hash of ["chat", "compare", "adapters", "jobs", "jobs/new", state.job]) {
    await page.goto(`${URL_BASE}#${hash}`);
    await page.waitForTimeout(500);
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    expect(wide <= 0, `#${hash} at 320 px is ${wide} px too wide`);
    if (hash === "chat") {
      const long = await page.evaluate(() => document.documentElement.scrollHeight - document.documentElement.clientHeight);
      expect(long <= 0, `the empty chat at 320 px is ${long} px longer than the window`);
    }
    await shot(page, `narrow-${colorScheme}-${hash.replace("/", "-")}`);
  }
  await context.close();
}

async function main() {
  const { chromium } = loadPlaywright();
  const browser = await chromium.launch({ executablePath: findChromium(), args: ["--no-sandbox"] });
  try {
    const context = await browser.newContext({ viewport: { width: 1280, height: 860 } });
    await context.grantPermissions(["clipboard-read", "clipboard-write"]).catch(() => {});
    const page = await context.newPage();
    page.setDefaultTimeout(15_000);
    watch(page);
    const on = (run) => () => run(page);
    await check("the page opens and lists the models", on(opens));
    await check("chat streams an answer with its figures", on(chats));
    await check("Stop ends an answer", on(stops));
    await check("an adapter is loaded, and a wrong folder is explained", on(loads));
    await check("the table filters, sorts and pins", on(sortsAndPins));
    await check("the chat goes on with the adapter", on(switches));
    await check("two answers are compared word by word", on(compares));
    await check("an adapter is unloaded after a question", on(unloads));
    await check("a file is uploaded and its masks are shown", on(previews));
    await check("a dropped file is uploaded", on(drops));
    await check("a wrong learning rate is refused", on(refusesWrongRate));
    await check("a job is started, drawn live and cancelled", on(cancels));
    await check("a job runs to its end and its adapter is offered", on(finishes));
    const state = {
      keys: await page.evaluate(() => ({ ...sessionStorage })),
      job: (await page.locator("#jobs-body a").first().getAttribute("href")).slice(1),
    };
    await check("the keyboard reaches every view and leaves it", on(keyboard));
    for (const scheme of ["light", "dark"]) {
      await check(`nothing is wider than a screen of 320 px, ${scheme}`, () => narrow(browser, state, scheme));
    }
    console.log("check_page: all is well");
  } finally {
    await browser.close();
  }
}

await main().catch((error) => {
  for (const line of wrong) if (!error.message.includes(line)) console.error(`  also: ${line}`);
  stop(`failed at "${step}": ${error.message}`);
});
