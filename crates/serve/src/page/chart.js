// The curve of a job's losses, drawn as SVG.

import { count, el, figure, setText } from "./parts.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 300;
const EDGE = { left: 52, right: 24, top: 14, bottom: 40 };
const SERIES = [
  { key: "train", name: "train" },
  { key: "valid", name: "validation" },
];

function svg(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

/** Round numbers from `low` to `high`, about `wanted` of them. */
export function ticks(low, high, wanted) {
  const raw = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.75);
  const found = [];
  const last = Math.floor(high / step + 1e-9);
  // `+ 0` turns -0 into 0.
  for (let i = Math.ceil(low / step - 1e-9) + 0; i <= last; i += 1) found.push(i * step);
  return { step, values: found };
}

/** Keeps the lowest and the highest of each of `buckets` groups of points, so that a long run stays quick to draw. */
export function thin(points, buckets) {
  if (points.length <= buckets * 2) return points;
  const kept = [points[0]];
  const size = (points.length - 2) / buckets;
  for (let bucket = 0; bucket < buckets; bucket += 1) {
    const group = points.slice(1 + Math.floor(bucket * size), 1 + Math.floor((bucket + 1) * size));
    const low = group.reduce((best, point) => (point[1] < best[1] ? point : best), group[0]);
    const high = group.reduce((best, point) => (point[1] > best[1] ? point : best), group[0]);
    kept.push(...[...new Set([low, high])].sort((a, b) => a[0] - b[0]));
  }
  kept.push(points.at(-1));
  return kept;
}

/** A chart in `parent`. `set({ train, valid, total })` takes lists of `[step, loss]` and the number of steps, or null. */
export class LossChart {
  #data = { train: [], valid: [], total: null };
  #svg = svg("svg", { class: "chart", tabindex: "0", role: "img", height: HEIGHT });
  #readout = el("p", { class: "readout", role: "status" });
  #legend = el("p", { class: "legend" });
  #frame = 0;
  // The step that the reader points at, or null for the last one.
  #step = null;
  #place = null;

  constructor(parent) {
    for (const { key, name } of SERIES) {
      const sample = svg("svg", { width: 26, height: 10, "aria-hidden": "true" });
      sample.append(svg("line", { class: `line ${key}`, x1: 1, y1: 5, x2: 25, y2: 5 }));
      if (key === "valid") sample.append(svg("circle", { class: "dot valid", cx: 13, cy: 5, r: 3 }));
      this.#legend.append(el("span", {}, sample, ` ${name}`));
    }
    parent.replaceChildren(el("div", { class: "chart-head" }, this.#legend, this.#readout), this.#svg);
    new ResizeObserver(() => this.#soon()).observe(this.#svg.parentNode);
    this.#svg.addEventListener("pointermove", (event) => this.#point(event));
    this.#svg.addEventListener("pointerdown", (event) => this.#point(event));
    this.#svg.addEventListener("pointerleave", () => this.#goTo(null));
    this.#svg.addEventListener("blur", () => this.#goTo(null));
    this.#svg.addEventListener("keydown", (event) => this.#key(event));
  }

  set(data) {
    this.#data = data;
    this.#soon();
  }

  clear() {
    this.#step = null;
    this.set({ train: [], valid: [], total: null });
  }

  #soon() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  #scale(width) {
    const all = [...this.#data.train, ...this.#data.valid];
    const losses = all.map((point) => point[1]);
    let low = losses.reduce((a, b) => Math.min(a, b), Infinity);
    let high = losses.reduce((a, b) => Math.max(a, b), -Infinity);
    if (!all.length) [low, high] = [0, 1];
    const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 0.5;
    low = low >= 0 ? Math.max(0, low - room) : low - room;
    high += room;
    const last = all.reduce((most, point) => Math.max(most, point[0]), 1);
    const end = Math.max(this.#data.total ?? 0, last);
    const inner = { width: Math.max(1, width - EDGE.left - EDGE.right), height: HEIGHT - EDGE.top - EDGE.bottom };
    return {
      low,
      high,
      end,
      x: (step) => EDGE.left + (step / end) * inner.width,
      y: (loss) => EDGE.top + (1 - (loss - low) / (high - low)) * inner.height,
      stepAt: (x) => ((x - EDGE.left) / inner.width) * end,
      inner,
    };
  }

  #draw() {
    const width = this.#svg.parentNode.clientWidth - 2 * parseFloat(getComputedStyle(this.#svg.parentNode).paddingLeft);
    if (width <= 0) return;
    this.#svg.setAttribute("width", width);
    this.#svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const scale = this.#scale(width);
    this.#place = scale;
    const parts = this.#axes(scale, width);
    for (const { key } of SERIES) parts.push(...this.#line(key, scale));
    if (!this.#data.train.length && !this.#data.valid.length) {
      parts.push(svg("text", { class: "nothing", x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "No losses yet"));
    }
    const cursor = this.#values();
    if (this.#step !== null && cursor) {
      const x = scale.x(cursor.step);
      parts.push(svg("line", { class: "cursor", x1: x, x2: x, y1: EDGE.top, y2: HEIGHT - EDGE.bottom }));
    }
    this.#svg.replaceChildren(...parts);
    this.#say(cursor);
  }

  #axes(scale, width) {
    const parts = [];
    const bottom = HEIGHT - EDGE.bottom;
    const vertical = ticks(scale.low, scale.high, 5);
    const digits = Math.max(0, -Math.floor(Math.log10(vertical.step) + 1e-9));
    for (const loss of vertical.values) {
      const y = scale.y(loss);
      parts.push(svg("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y, y2: y }));
      parts.push(svg("text", { x: EDGE.left - 8, y: y + 4, "text-anchor": "end" }, loss.toFixed(Math.min(digits, 8))));
    }
    const horizontal = ticks(0, scale.end, Math.max(3, Math.floor(scale.inner.width / 90)));
    for (const step of horizontal.values.filter(Number.isInteger)) {
      const x = scale.x(step);
      parts.push(svg("line", { class: "axis", x1: x, x2: x, y1: bottom, y2: bottom + 4 }));
      parts.push(svg("text", { x, y: bottom + 18, "text-anchor": "middle" }, count(step)));
    }
    parts.push(svg("line", { class: "axis", x1: EDGE.left, x2: width - EDGE.right, y1: bottom, y2: bottom }));
    parts.push(svg("text", { class: "title", x: EDGE.left + scale.inner.width / 2, y: HEIGHT - 5, "text-anchor": "middle" }, "step"));
    const middle = EDGE.top + scale.inner.height / 2;
    const turn = `rotate(-90 12 ${middle})`;
    parts.push(svg("text", { class: "title", x: 12, y: middle, transform: turn, "text-anchor": "middle" }, "loss"));
    return parts;
  }

  #line(key, scale) {
    const points = thin(this.#data[key], Math.ceil(scale.inner.width));
    const at = ([step, loss]) => `${scale.x(step).toFixed(1)},${scale.y(loss).toFixed(1)}`;
    const parts = [];
    if (points.length > 1) parts.push(svg("polyline", { class: `line ${key}`, points: points.map(at).join(" ") }));
    const dots = key === "valid" ? (points.length <= 60 ? points : points.slice(-1)) : points.slice(-1);
    for (const [step, loss] of dots) parts.push(svg("circle", { class: `dot ${key}`, cx: scale.x(step), cy: scale.y(loss), r: 3 }));
    return parts;
  }

  // The values at the step that is pointed at, and the validation loss that was the newest then.
  #values() {
    const { train, valid } = this.#data;
    const steps = train.length ? train : valid;
    if (!steps.length) return null;
    const wanted = this.#step ?? steps.at(-1)[0];
    const [step] = steps.reduce((best, point) => (Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted) ? point : best));
    return {
      step,
      train: train.find((point) => point[0] === step)?.[1] ?? null,
      valid: valid.findLast((point) => point[0] <= step) ?? null,
    };
  }

  #say(values) {
    if (!values) {
      setText(this.#readout, "");
      this.#svg.setAttribute("aria-label", "Loss by step: no losses yet.");
      return;
    }
    const parts = [`Step ${count(values.step)}`];
    if (values.train !== null) parts.push(`train ${figure(values.train)}`);
    if (values.valid) parts.push(`validation ${figure(values.valid[1])}${values.valid[0] === values.step ? "" : ` at ${count(values.valid[0])}`}`);
    // While the run goes on, the newest step would be said without an end: the role is there only for the cursor.
    if (this.#step === null) this.#readout.removeAttribute("role");
    else this.#readout.setAttribute("role", "status");
    setText(this.#readout, parts.join(" · "));
    const first = this.#data.train[0];
    const from = first ? ` It began at ${figure(first[1])}.` : "";
    this.#svg.setAttribute("aria-label", `Loss by step. Newest: ${parts.join(", ")}.${from} Arrow keys read single steps.`);
  }

  #goTo(step) {
    if (this.#step === step) return;
    this.#step = step;
    this.#soon();
  }

  #point(event) {
    if (!this.#place) return;
    this.#goTo(Math.max(0, this.#place.stepAt(event.clientX - this.#svg.getBoundingClientRect().left)));
  }

  #key(event) {
    const steps = (this.#data.train.length ? this.#data.train : this.#data.valid).map((point) => point[0]);
    if (!steps.length) return;
    const now = steps.indexOf(this.#values().step);
    const jump = Math.max(1, Math.round(steps.length / 20));
    const moves = { ArrowLeft: now - 1, ArrowRight: now + 1, PageUp: now - jump, PageDown: now + jump, Home: 0, End: steps.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.#goTo(steps[Math.min(Math.max(moves[event.key], 0), steps.length - 1)]);
  }
}
