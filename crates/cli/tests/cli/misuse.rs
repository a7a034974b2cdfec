//! What is printed where, and misuse: exit code 2 and a message that says what to do.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;

use predicates::prelude::*;
use predicates::str::contains;

use crate::support::{Lab, lowrank, stderr_of, write};

#[test]
#[expect(clippy::too_many_lines, reason = "the help is as long as it is")]
fn help_of_train() {
    let assert = lowrank()
        .args(["train", "-h"])
        .assert()
        .success()
        .stderr("");
    let help = String::from_utf8(assert.get_output().stdout.clone()).expect("help is UTF-8");
    insta::assert_snapshot!(help, @r#"
    Train an adapter, or a whole model, on rows of text

    Usage: lowrank train [OPTIONS] [CONFIG]

    Arguments:
      [CONFIG]  A YAML file of settings; each key is a flag's name with _ for -, and flags win over it

    Options:
      -c, --config <FILE>       The same as CONFIG
          --model <MODEL>       The base model: a folder in the Hugging Face layout, a GGUF file, an id
                                of the Hub, or builtin:tiny (required)
          --output <DIR>        The run's folder, which must not exist yet (required)
          --init-adapter <DIR>  Start from this adapter of an earlier run; the method's options are then
                                its own
          --method <METHOD>     What is trained [default: lora] [possible values: lora, full, top,
                                bitfit, adapter, prefix, ia3]
          --resume              Go on with the run in the output folder, with its own settings
          --overwrite           Replace an earlier run in the output folder
          --force               Run although the memory is expected not to suffice
      -h, --help                Print help (see more with '--help')
      -V, --version             Print version

    Data:
          --data <PATH>                Rows to train on: a folder with train.jsonl and maybe
                                       valid.jsonl, one file, or - for standard input (required)
          --valid-data <FILE>          Held-out rows, where they are not valid.jsonl beside the others
          --task-type <TASK>           What the model learns to do [default: what the rows are for]
                                       [possible values: CAUSAL_LM, SEQ_CLS, TOKEN_CLS,
                                       FEATURE_EXTRACTION]
          --new-classifier[=<BOOL>]    Begin a new classifier, where the model or the adapter to start
                                       from has one for other labels
          --columns <NAMES>            Names of the columns of CSV and TSV files without a header, such
                                       as text,label
          --max-seq-length <TOKENS>    Cut longer rows to so many tokens, from the end [default: 2048]
          --train-on-prompt[=<BOOL>]   Let the loss fall on prompts too, not on completions alone
          --on-bad-row <WHAT>          What to do with a row that cannot be used [default: error]
                                       [possible values: error, skip]
          --completion-boundary <HOW>  Encode prompt and completion as one text, as TRL does, or each by
                                       itself [default: joint] [possible values: joint, apart]
          --no-shuffle[=<BOOL>]        Keep the rows in the order of the file (key: shuffle)

    LoRA:
          --r <N>                          Rank of the matrices A and B [default: 8]
          --target-modules <MODULES>       Modules to adapt: names (q_proj,v_proj), a regular expression
                                           for the whole name, or all-linear; GPT-2's fused c_attn also
                                           goes in parts (c_attn.q,c_attn.v) [default: PEFT's for the
                                           method; LoRA's are the family's q and v]
          --exclude-modules <MODULES>      Modules to leave out: names, or a regular expression
          --modules-to-save <MODULES>      Modules to train and save as a whole: names as lm_head or
                                           embed_tokens; a classifier's head is always among them
          --rank-pattern <PATTERN=N>       Another r for modules that match a pattern; may be repeated
          --lora-alpha <X>                 The change of a weight is scaled by lora_alpha / r [default:
                                           16]
          --lora-dropout <P>               Dropout on what goes into A [default: 0]
          --alpha-pattern <PATTERN=X>      Another lora_alpha for modules that match a pattern; may be
                                           repeated
          --init-lora-weights <HOW>        How A and B begin [default: gaussian] [possible values:
                                           gaussian, true, false, pissa, pissa_niter_N, olora, loftq]
          --loftq-weights <FOLDER>         The model before it was quantized, a folder with safetensors,
                                           for init_lora_weights loftq [default: the model itself, where
                                           load_in quantizes it]
          --trainable-token-indices <IDS>  Tokens to train the embedding's rows of: ids, as 5,17; in a
                                           file also lists by module
          --add-tokens <FILE>              Tokens to add to the tokenizer and to train the rows of: a
                                           file with one a line, or with a JSON list
          --use-rslora[=<BOOL>]            Scale by lora_alpha / √r instead
          --use-dora[=<BOOL>]              Train the magnitude of each output as well (DoRA)
          --loraplus-lr-ratio <X>          The learning rate of B over that of A (LoRA+); magnitudes and
                                           biases have B's

    Other methods:
          --top-layers <N>                 Train so many of the last blocks, and the norm behind them
                                           [default: 2]
          --head-only[=<BOOL>]             Train the output projection alone; a tied one is untied
                                           (method top)
          --adapter-kind <KIND>            Where adapter layers stand [default: houlsby] [possible
                                           values: houlsby, lin, pfeiffer]
          --bottleneck <N>                 Width of adapter layers [default: 64]
          --prefix-kind <KIND>             What virtual tokens are (method prefix) [default: layer]
                                           [possible values: layer, embedding]
          --num-virtual-tokens <N>         Virtual tokens before every sequence [default: 20]
          --infix-tokens <N>               Virtual tokens between prompt and completion, with the kind
                                           embedding [default: 0]
          --prefix-init <INIT>             What virtual tokens begin as [default: text] [possible
                                           values: text, vocab, random, zero]
          --feedforward-modules <MODULES>  Modules of target_modules whose input is scaled in place of
                                           the output (method ia3) [default: the MLP's last linear]
          --init-ia3-weights[=<BOOL>]      Begin with factors of one, which change nothing, and not at
                                           random (method ia3)

    Optimization:
          --learning-rate <X>
              The highest learning rate [default: 2e-4; full 2e-5, top 5e-5, bitfit and adapter 1e-3,
              prefix 1e-2, ia3 3e-3]
          --lr-scheduler-type <TYPE>
              How the learning rate falls [default: linear] [possible values: linear, cosine, constant]
          --warmup-steps <N>
              Steps over which the learning rate rises from zero [default: 0]
          --warmup-ratio <P>
              The same as a share of all steps, used where warmup_steps is 0 [default: 0]
          --weight-decay <X>
              Decoupled weight decay on everything that is trained [default: 0]
          --lr-pattern <PATTERN=FACTOR>
              Another learning rate for trained tensors that match a pattern, as a factor of
              learning_rate; may be repeated
          --weight-decay-pattern <PATTERN=X>
              Another weight decay for trained tensors that match a pattern; may be repeated
          --adam-beta1 <X>
              AdamW's decay of the first moment [default: 0.9]
          --adam-beta2 <X>
              AdamW's decay of the second moment [default: 0.999]
          --adam-epsilon <X>
              AdamW's epsilon [default: 1e-8]
          --max-grad-norm <X>
              Scale gradients down to this norm; 0 turns it off [default: 1]
          --label-smoothing-factor <P>
              Share of the target's probability that is spread over all tokens [default: 0]
          --class-weights <HOW>
              Weights of a classifier's labels in the loss [possible values: balanced]
          --batch-size <ROWS>
              Rows computed at a time [default: 8]
          --gradient-accumulation-steps <N>
              Batches of an optimizer step [default: 1]
          --share-prompts[=<BOOL>]
              Compute a prompt once for all rows of a batch that have it, and put such rows side by side
          --num-train-epochs <X>
              Passes over the rows [default: 3]
          --max-steps <N>
              Optimizer steps, instead of passes over the rows
          --seed <N>
              Decides the start, the order of the rows and dropout [default: 42]

    Evaluation and checkpoints:
          --eval-steps <N>
              Evaluate the held-out rows every so many steps, not at the end alone
          --save-steps <N>
              Write a checkpoint every so many steps and at the end
          --save-total-limit <N>
              Keep only so many checkpoints, the latest
          --load-best-model-at-end[=<BOOL>]
              Finish with the weights whose held-out loss was the lowest
          --early-stopping-patience <N>
              Stop after so many evaluations without a new lowest loss

    Machine:
          --recompute <WHAT>       What a block computes again in the backward instead of keeping it
                                   [default: as little as the memory allows] [possible values: none,
                                   selective, full]
          --memory-budget <SIZE>   Memory that the run may take, such as 2GiB [default: what the machine
                                   has free]
          --base-dtype <DTYPE>     How the frozen weights are stored [default: bf16] [possible values:
                                   f32, bf16]
          --load-in <BITS>         Quantize the matrices of the model's blocks while they are loaded, to
                                   NF4 or to int8 [possible values: 4bit, 8bit]
          --compute-dtype <DTYPE>  How the factors of training's products are read [default: bf16 beside
                                   a base in bf16, else f32] [possible values: bf16, bf16x2, f32]
          --threads <N>            Threads to compute with [default: one a core]

    Several machines:
          --pipeline-stages <N>        Share the model's blocks out among so many ranks, for models that
                                       are too large for one machine [default: 1]
          --network-timeout <SECONDS>  Seconds that a rank waits for another one before it gives the job
                                       up [default: 600]
          --ranks-per-node <N|auto>    Ranks on each machine: a number, or auto for one a NUMA node;
                                       without a launcher, mpirun is started here
          --json                       Print the outcome as one JSON object
          --print-config               Print the settings as they would be used, as YAML, and do nothing
          --print-schema               Print a JSON schema of the settings file and do nothing

    Messages:
      -v, --verbose...  Say more on standard error; twice for everything
      -q, --quiet       Say nothing but errors on standard error, and show no progress
    "#);
}

#[test]
fn no_command_is_misuse() {
    lowrank()
        .assert()
        .code(2)
        .stderr(contains("Usage: lowrank"));
    lowrank()
        .arg("--version")
        .assert()
        .success()
        .stdout(contains("lowrank 0."));
    lowrank()
        .arg("trian")
        .assert()
        .code(2)
        .stderr(contains("'train'"));
}

#[test]
fn flags_that_do_not_exist_are_answered() {
    let text = stderr_of(&["train", "--iters", "10"], 2);
    assert!(
        text.contains("this setting is called --max-steps here"),
        "{text}"
    );
    let text = stderr_of(&["train", "--per-device-train-batch-size=4"], 2);
    assert!(
        text.contains("this setting is called --batch-size here"),
        "{text}"
    );
    let text = stderr_of(&["train", "--grad-checkpoint"], 2);
    assert!(text.contains("there is no such setting"), "{text}");
    let text = stderr_of(&["eval", "--adapter-path", "x"], 2);
    assert!(
        text.contains("this setting is called --adapter here"),
        "{text}"
    );
    let text = stderr_of(&["train", "--lora-dropuot", "0.1"], 2);
    assert!(text.contains("'--lora-dropout'"), "{text}");
}

#[test]
fn every_wrong_setting_is_reported_at_once() {
    let folder = tempfile::tempdir().expect("there is room for a temporary folder");
    let config = write(
        folder.path(),
        "run.yaml",
        "model: builtin:tiny\nlora_r: 8\nmicro_batch_size: 2\nlearnig_rate: 1e-4\nlora_dropout: 1.5\n",
    );
    let text = stderr_of(&["train", &config, "--data", "nowhere", "--r", "0"], 2);
    insta::assert_snapshot!(text, @r#"
    error: 7 problems with the settings:
      - lora_r (in run.yaml): this setting is called `r` here
      - micro_batch_size (in run.yaml): this setting is called `batch_size` here
      - learnig_rate (in run.yaml) is not a setting; did you mean learning_rate?
      - --r must be from 1 to 65536, not 0
      - lora_dropout (in run.yaml) must be at least 0 and less than 1, not 1.5
      - --output is missing: give the folder to write the adapter to
      - --data: nowhere does not exist
    "#);
}

#[test]
fn flags_of_the_wrong_kind_are_misuse() {
    let text = stderr_of(&["train", "--learning-rate", "fast"], 2);
    assert!(
        text.contains("invalid value 'fast' for '--learning-rate <X>'"),
        "{text}"
    );
    let text = stderr_of(&["train", "--method", "qlora"], 2);
    assert!(
        text.contains("[possible values: lora, full, top, bitfit, adapter, prefix, ia3]"),
        "{text}"
    );
    let text = stderr_of(&["train", "--max-steps", "1", "--num-train-epochs", "1"], 2);
    assert!(text.contains("cannot be used with"), "{text}");
    let text = stderr_of(
        &[
            "generate",
            "--model",
            "builtin:tiny",
            "--prompt",
            "x",
            "--top-k",
            "5",
        ],
        2,
    );
    assert!(
        text.contains("do nothing without a --temperature above 0"),
        "{text}"
    );
    let text = stderr_of(&["generate", "--model", "builtin:tiny"], 2);
    assert!(text.contains("--prompt <TEXT>|--data <PATH>"), "{text}");
}

#[test]
fn settings_files_that_cannot_be_read_are_misuse() {
    let folder = tempfile::tempdir().expect("there is room for a temporary folder");
    let text = stderr_of(&["train", "none.yaml"], 2);
    assert!(
        text.contains("cannot read the settings file none.yaml"),
        "{text}"
    );
    let list = write(folder.path(), "list.yaml", "- r\n");
    assert!(
        stderr_of(&["train", "-c", &list], 2).contains("must hold lines of the form `key: value`")
    );
    let text = stderr_of(&["train", "--resume"], 2);
    assert!(text.contains("--resume needs --output"), "{text}");
    let text = stderr_of(
        &[
            "train",
            "--resume",
            "--output",
            &folder.path().display().to_string(),
        ],
        2,
    );
    assert!(text.contains("there is no run to resume"), "{text}");
}

#[test]
fn models_that_do_not_exist_are_misuse() {
    for args in [
        &["eval", "--model", "models/none", "--data", "."][..],
        &["generate", "--model", "models/none", "--prompt", "x"],
        &[
            "merge",
            "--model",
            "models/none",
            "--adapter",
            "a",
            "--output",
            "o",
        ],
        &["model", "inspect", "models/none"],
        &["data", "preview", "--model", "models/none", "--data", "."],
    ] {
        let text = stderr_of(args, 2);
        assert!(
            text.starts_with("error: model models/none"),
            "{args:?}: {text}"
        );
    }
    let text = stderr_of(&["model", "inspect", "builtin:huge"], 2);
    assert!(text.contains("the one there is: builtin:tiny"), "{text}");
}

#[test]
fn the_resolved_settings_can_be_printed_and_read_again() {
    let folder = tempfile::tempdir().expect("there is room for a temporary folder");
    let flags = [
        "--model",
        "m",
        "--data",
        ".",
        "--output",
        "o",
        "--target-modules",
        "all-linear",
        "--no-shuffle",
    ];
    let print = |args: &[&str]| {
        let assert = lowrank()
            .arg("train")
            .args(args)
            .arg("--print-config")
            .assert()
            .success()
            .stderr("");
        String::from_utf8(assert.get_output().stdout.clone()).expect("settings are UTF-8")
    };
    let yaml = print(&flags);
    for line in [
        "learning_rate: 0.0002",
        "target_modules: all-linear",
        "shuffle: false",
        "r: 8",
        "max_steps: null",
    ] {
        assert!(
            yaml.lines().any(|got| got == line),
            "{line} is not in\n{yaml}"
        );
    }
    let file = write(folder.path(), "config.yaml", &yaml);
    assert_eq!(print(&[&file]), yaml);
    assert!(print(&[&file, "--r", "4"]).contains("\nr: 4\n"));
}

#[test]
fn the_schema_is_json() {
    let assert = lowrank()
        .args(["train", "--print-schema"])
        .assert()
        .success()
        .stderr("");
    let schema: serde_json::Value =
        serde_json::from_slice(&assert.get_output().stdout).expect("the schema is JSON");
    assert_eq!(schema["additionalProperties"], false);
    assert_eq!(schema["properties"]["batch_size"]["type"], "integer");
    let rows = &schema["properties"]["trainable_token_indices"];
    assert_eq!(rows["items"]["type"], "integer");
    assert_eq!(rows["additionalProperties"]["items"], rows["items"]);
}

#[test]
fn colours_stay_off_where_there_is_no_terminal() {
    let escape = contains("\u{1b}");
    lowrank()
        .args(["train"])
        .assert()
        .code(2)
        .stderr(escape.clone().not());
    lowrank()
        .args(["train"])
        .env("NO_COLOR", "1")
        .env("CLICOLOR_FORCE", "0")
        .assert()
        .code(2)
        .stderr(escape.not());
}

#[cfg(unix)]
#[test]
fn a_reader_that_goes_away_is_no_failure() {
    use std::process::{Command, Stdio};
    let program = assert_cmd::cargo::cargo_bin("lowrank");
    let (reader, writer) = std::io::pipe().expect("the system has pipes");
    drop(reader);
    let output = Command::new(program)
        .args(["train", "--print-schema"])
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .expect("the program starts");
    assert_eq!(
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).as_ref()
        ),
        (Some(0), "")
    );
}

#[test]
fn options_of_another_method_are_refused() {
    let refused = |flags: &[&str], words: &[&str]| {
        let train = [
            "train",
            "--model",
            "builtin:tiny",
            "--data",
            ".",
            "--output",
            "x",
        ];
        let text = stderr_of(&[&train[..], flags].concat(), 2);
        for word in words {
            assert!(text.contains(word), "`{word}` is not in: {text}");
        }
    };
    refused(
        &["--bottleneck=8"],
        &["--bottleneck does nothing with the method lora"],
    );
    refused(
        &["--method=bitfit", "--r=4", "--top-layers=1"],
        &[
            "--r does nothing with the method bitfit",
            "--top-layers does nothing",
        ],
    );
    refused(
        &["--method=top", "--top-layers=1", "--head-only"],
        &["--head-only trains the output projection alone, so leave --top-layers out"],
    );
    refused(
        &["--method=adapter", "--bottleneck=0"],
        &["--bottleneck must be 1 or greater"],
    );
}

#[test]
fn flags_of_the_server_are_checked_before_it_starts() {
    for (flags, part) in [
        (&["--max-n", "0"][..], "--max-n must be 1 or greater"),
        (
            &["--served-model-name", ""],
            "--served-model-name must not be empty",
        ),
        (
            &["--served-model-name", "a\nb"],
            "must have no control characters",
        ),
        (&["--kv-cache-memory", "100XB"], "units are B, kB, MB, GB"),
        (&["--host", "somewhere"], "expected an IP address"),
        // `localhost` is an address, so the other flag is at fault.
        (
            &["--host", "localhost", "--max-n", "0"],
            "--max-n must be 1 or greater",
        ),
    ] {
        let text = stderr_of(
            &[&["serve", "--model", "builtin:tiny"][..], flags].concat(),
            2,
        );
        assert!(text.contains(part), "{flags:?}: {text}");
    }
}

#[test]
fn one_rank_has_nobody_to_exchange_anything_with() {
    let text = stderr_of(&["bench", "comm"], 2);
    assert!(text.contains("mpirun -n 2 lowrank bench comm"), "{text}");
    let text = stderr_of(&["bench", "comm", "--mib", "0", "--repeats", "0"], 2);
    assert!(
        text.contains("--mib must be 1 or greater") && text.contains("--repeats"),
        "{text}"
    );
}

#[test]
fn a_server_that_cannot_be_measured_is_said_to_be_so() {
    let bench = |url: &str, flags: &[&str], code| {
        let bench = ["bench", "serve", "--model", "a", "--url", url];
        stderr_of(&[&bench[..], flags].concat(), code)
    };
    for (url, flags, part) in [
        ("127.0.0.1:1", &[][..], "--url must begin with http://"),
        (
            "http://127.0.0.1:1",
            &["--requests", "0"],
            "--requests must be 1 or greater",
        ),
    ] {
        let text = bench(url, flags, 2);
        assert!(text.contains(part), "{url}: {text}");
    }
    let text = bench("http://127.0.0.1:1", &[], 1);
    assert!(text.contains("the server does not answer"), "{text}");
    // One that answers with an error does answer.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let server = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a request");
        let mut reader = BufReader::new(&stream);
        let mut head: Vec<String> = Vec::new();
        while head.last().is_none_or(|line| !line.trim().is_empty()) {
            let mut line = String::new();
            reader.read_line(&mut line).expect("a line");
            head.push(line);
        }
        // Nothing is left unread, or the connection would be reset.
        let length = head.iter().find_map(|line| {
            let line = line.to_ascii_lowercase();
            line.strip_prefix("content-length:")?.trim().parse().ok()
        });
        let mut body = vec![0; length.expect("a length")];
        reader.read_exact(&mut body).expect("the body");
        let answer = "HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\nconnection: close\r\n\r\nnone";
        (&stream).write_all(answer.as_bytes()).expect("it is sent");
        head.remove(0)
    });
    let text = bench(&format!("http://{address}/v1"), &[], 1);
    assert!(
        text.contains("the server answers 404 Not Found: none"),
        "{text}"
    );
    let asked = server.join().expect("it ends");
    assert!(asked.starts_with("POST /v1/completions "), "{asked}");
}

#[test]
fn exactness_is_not_asked_of_what_is_exact() {
    let lab = Lab::new();
    let text = stderr_of(
        &[
            "generate",
            "--model",
            &lab.arg("model"),
            "--prompt",
            "a",
            "--exact",
        ],
        2,
    );
    assert!(
        text.contains("--exact") && text.contains("no weights beside which anything is rounded"),
        "{text}"
    );
}
