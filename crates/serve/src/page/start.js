// The form that starts a job: a file, a look at what of it is learned, settings.

import { getJson } from "./api.js";
import { numberOf } from "./generate.js";
import { $, bytes, chooseModel, count, el, models, refreshModels, setText, showProblem } from "./parts.js";

// Special tokens look like <|im_end|>, <s> or [SEP].
const SPECIAL = /^(<[^\s<>]+>|\[[A-Z]+\])$/;
const FIRST_ROWS = 3;
const MORE_ROWS = 20;

let rowsWanted = FIRST_ROWS;
// The preview that was asked for last: an older answer that comes late is dropped.
let asked = 0;

export function start() {
  chooseModel($("start-model"), { fallback: () => models.base, onlyBase: true });
  $("start-upload").addEventListener("change", () => {
    if ($("start-upload").files.length) upload($("start-upload").files[0]);
    $("start-upload").value = "";
  });
  acceptDrops();
  $("start-training").addEventListener("change", () => preview(FIRST_ROWS));
  $("preview-more").addEventListener("click", () => preview(MORE_ROWS));
  $("preview-ids").addEventListener("change", () => $("preview-rows").classList.toggle("ids", $("preview-ids").checked));
  $("start-form").addEventListener("submit", submit);
}

/** Called when the form is shown. */
export async function show() {
  showProblem($("start-error"), null);
  const [, files] = await Promise.all([refreshModels(), getJson("v1/files", { admin: true })]);
  listFiles(files.data);
  if (!$("start-training").value) clearPreview();
}

// Dropping a file beside the box must not make the browser leave the page.
function acceptDrops() {
  const box = $("start-drop");
  let depth = 0;
  const lit = () => box.classList.toggle("over", depth > 0);
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    lit();
  });
  box.addEventListener("dragenter", () => {
    depth += 1;
    lit();
  });
  box.addEventListener("dragleave", () => {
    depth -= 1;
    lit();
  });
  box.addEventListener("drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (file) upload(file);
  });
}

function listFiles(files) {
  const usable = files.filter((file) => file.purpose === "fine-tune").sort((a, b) => b.created_at - a.created_at);
  for (const [select, none] of [
    [$("start-training"), usable.length ? "Choose a file" : "None uploaded yet"],
    [$("start-validation"), "None"],
  ]) {
    const chosen = select.value;
    select.replaceChildren(
      el("option", { value: "", text: none }),
      ...usable.map((file) => el("option", { value: file.id, text: `${file.filename} (${bytes(file.bytes)})` })),
    );
    select.value = usable.some((file) => file.id === chosen) ? chosen : "";
  }
}

async function upload(file) {
  const status = $("start-upload-status");
  setText(status, `Uploading ${file.name} (${bytes(file.size)})`);
  const body = new FormData();
  body.append("purpose", "fine-tune");
  body.append("file", file, file.name);
  try {
    const stored = await getJson("v1/files", { method: "POST", body, admin: true });
    const files = await getJson("v1/files", { admin: true });
    listFiles(files.data);
    // The first file is for training. A second one is likely for validation, and is left to be chosen.
    if (!$("start-training").value) {
      $("start-training").value = stored.id;
      await preview(FIRST_ROWS);
    }
    setText(status, `${stored.filename} is uploaded.`);
  } catch (error) {
    setText(status, "or drop one here.");
    showProblem($("start-error"), error);
  }
}

async function preview(rows) {
  const id = $("start-training").value;
  rowsWanted = rows;
  asked += 1;
  const mine = asked;
  showProblem($("start-error"), null);
  if (!id) {
    clearPreview();
    return;
  }
  try {
    const answer = await getJson(`v1/files/${encodeURIComponent(id)}/preview?rows=${rows}`, { admin: true });
    if (mine === asked) drawPreview(answer);
  } catch (error) {
    if (mine !== asked) return;
    clearPreview();
    setText($("preview-report"), error.message);
  }
}

function clearPreview() {
  setText($("preview-report"), "Choose a training file to see which of its tokens the model learns.");
  $("preview-rows").replaceChildren();
  $("preview-key").hidden = true;
  $("preview-more").hidden = true;
}

function drawPreview({ format, report, rows }) {
  const parts = [`Format: ${format}`, `${count(report.rows)} ${report.rows === 1 ? "row" : "rows"}`];
  if (report.kept !== report.rows) parts.push(`${count(report.kept)} kept`);
  if (report.skipped) parts.push(`${count(report.skipped)} skipped: nothing in them to learn`);
  if (report.truncated) parts.push(`${count(report.truncated)} cut at the maximum length`);
  setText($("preview-report"), parts.join(" · "));
  $("preview-rows").replaceChildren(
    ...rows.map(({ tokens }, i) => {
      const learned = tokens.filter((token) => token.supervised).length;
      const head = `Row ${i + 1}: ${count(tokens.length)} tokens, ${count(learned)} learned`;
      return el("div", {}, el("h3", { text: head }), el("div", { class: "tokens" }, ...tokens.map(tokenNode)));
    }),
  );
  $("preview-more").hidden = rowsWanted > FIRST_ROWS || rows.length < FIRST_ROWS || report.kept <= FIRST_ROWS;
  $("preview-key").hidden = false;
}

// A line break is shown as a sign and breaks the line, too. Marks are not by colour alone: learned text is underlined.
function tokenNode({ id, text, supervised }) {
  const special = SPECIAL.test(text);
  const kind = `tok${supervised ? " supervised" : ""}${special ? " special" : ""}`;
  return el("span", { class: kind, "data-id": id, text: text === "" ? "∅" : text.replaceAll("\n", "↵\n") });
}

function wanted() {
  const rate = Number($("start-rate").value);
  if ($("start-rate").value.trim() && !(rate > 0)) return [$("start-rate"), "The learning rate is a number above 0, as 2e-4."];
  if (!$("start-training").value) return [$("start-training"), "Choose a training file."];
  const input = [...$("start-form").querySelectorAll("input[type=number]")].find((field) => !field.checkValidity());
  if (input) return [input, `${input.labels[0].textContent}: ${input.validationMessage}`];
  return null;
}

// Empty fields are left out: the server has defaults of its own.
function filled(fields) {
  const kept = Object.entries(fields).filter(([, value]) => value !== null && value !== "");
  return kept.length ? Object.fromEntries(kept) : undefined;
}

async function submit(event) {
  event.preventDefault();
  const wrong = wanted();
  showProblem($("start-error"), wrong && { message: wrong[1] });
  if (wrong) {
    wrong[0].focus();
    return;
  }
  const json = filled({
    model: $("start-model").value,
    training_file: $("start-training").value,
    validation_file: $("start-validation").value,
    suffix: $("start-suffix").value.trim(),
    seed: numberOf($("start-seed")),
  });
  json.hyperparameters = filled({ n_epochs: numberOf($("start-epochs")), batch_size: numberOf($("start-batch")) });
  json.lowrank = filled({
    learning_rate: $("start-rate").value.trim() ? Number($("start-rate").value) : null,
    r: numberOf($("start-r")),
    lora_alpha: numberOf($("start-alpha")),
    target_modules: $("start-targets").value.trim(),
    max_steps: numberOf($("start-steps")),
  });
  $("start-go").disabled = true;
  try {
    const job = await getJson("v1/fine_tuning/jobs", { method: "POST", json, admin: true });
    location.hash = `#jobs/${encodeURIComponent(job.id)}`;
  } catch (error) {
    showProblem($("start-error"), error);
  } finally {
    $("start-go").disabled = false;
  }
}
