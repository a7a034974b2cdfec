//! Servers that run in this process, and adapters of every method for them.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lowrank::DType;
use lowrank::base::{BUILTIN_FILES, Base, Source};
use lowrank::kernels::{Tensor, add_assign, fill_normal};
use lowrank::model::Decoder;
use lowrank::settings::TrainConfig;
use lowrank::tuning::{self, BaseMark, FirstText, Method, Starting, adapter, prefix, targets};
use lowrank_serve::{Options, ServeError, serve};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::client::Client;

/// The base's name.
pub(crate) const BASE: &str = "tiny";

/// The network that adapters are made for.
pub(crate) static NETWORK: LazyLock<Arc<Decoder>> = LazyLock::new(|| builtin().decoder);

/// The model that adapters are made for.
pub(crate) fn builtin() -> Base {
    load(Source::Builtin, DType::Bf16)
}

/// Loads a model; one at a time, since whoever reads a tokenizer changes the panic hook of the process meanwhile.
pub(crate) fn load(source: Source, dtype: DType) -> Base {
    static LOADING: Mutex<()> = Mutex::new(());
    let _loading = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    source.load(dtype).expect("the model loads")
}

/// An adapter that a test makes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// LoRA on q and v.
    Lora(usize),
    /// LoRA on every linear.
    Wide(usize),
    /// DoRA on every linear.
    Dora(usize),
    Ia3,
    Prefix,
    Prompt,
    Bitfit,
    Top,
    Layers,
}

/// One of each.
pub(crate) const KINDS: [(&str, Kind); 9] = [
    ("lora", Kind::Lora(4)),
    ("wide", Kind::Wide(8)),
    ("ia3", Kind::Ia3),
    ("prefix", Kind::Prefix),
    ("prompt", Kind::Prompt),
    ("bitfit", Kind::Bitfit),
    ("top", Kind::Top),
    ("layers", Kind::Layers),
    ("dora", Kind::Dora(8)),
];

impl Kind {
    fn settings(self) -> TrainConfig {
        let defaults = |method| TrainConfig::new(method, "", "", "");
        match self {
            Self::Lora(r) => defaults(Method::Lora).with_options(|options| options.lora.r = r),
            Self::Wide(r) => defaults(Method::Lora).with_options(|options| {
                options.lora.r = r;
                let all = targets::Targets::Pattern("all-linear".to_owned());
                options.targets.target_modules = Some(all);
            }),
            Self::Dora(r) => Self::Wide(r)
                .settings()
                .with_options(|options| options.lora.use_dora = true),
            Self::Ia3 => defaults(Method::Ia3),
            Self::Prefix => defaults(Method::Prefix).with_options(|options| {
                options.prefix.prefix_kind = prefix::Kind::Layer;
                options.prefix.num_virtual_tokens = 5;
            }),
            Self::Prompt => defaults(Method::Prefix).with_options(|options| {
                options.prefix.prefix_kind = prefix::Kind::Embedding;
                options.prefix.num_virtual_tokens = 3;
            }),
            Self::Bitfit => defaults(Method::Bitfit),
            Self::Top => defaults(Method::Top),
            Self::Layers => defaults(Method::Adapter).with_options(|options| {
                options.adapter.adapter_kind = adapter::Kind::Houlsby;
                options.adapter.bottleneck = 16;
            }),
        }
    }
}

/// Writes a random adapter of the built-in model into `folder`.
pub(crate) fn write_adapter(folder: &Path, kind: Kind, seed: u64) {
    let base = &*NETWORK;
    let settings = kind.settings();
    let starting = Starting {
        decoder: base,
        base: "builtin:tiny",
        seed,
        text: &|count| FirstText {
            ids: (5..5 + count as u32).collect(),
            source: "numbers",
        },
        is_resumed: false,
        unquantized: &|| Ok(None),
        ranks: lowrank::ranks::Ranks::alone(),
    };
    let started = settings.method.start(&settings.options, &starting);
    let mut started = started.expect("it fits");
    let mut noise = Tensor::zeros(1, started.adapter.parameters());
    fill_normal(noise.view_mut(), 0.08, seed + 1);
    add_assign(started.adapter.params.flat_mut(), noise.view());
    fs::create_dir_all(folder).expect("a folder");
    let fingerprint = base.weights().fingerprint();
    let mark = BaseMark {
        name: "builtin:tiny",
        fingerprint: &fingerprint,
        labels: None,
    };
    let config = started.config.expect("a method with files");
    tuning::save(folder, base.config(), &config, &started.adapter, mark).expect("it is saved");
}

/// Changes keys of an adapter's config.
pub(crate) fn edit_config(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("adapter_config.json");
    let text = fs::read_to_string(&path).expect("a config");
    let mut config: Value = serde_json::from_str(&text).expect("JSON");
    change(&mut config);
    fs::write(&path, config.to_string()).expect("it is written");
}

/// A folder of adapters.
pub(crate) struct Shelf {
    folder: TempDir,
}

impl Shelf {
    pub(crate) fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("a temporary folder"),
        }
    }

    /// A shelf with random adapters of rank 4, `a0`, `a1`, ….
    pub(crate) fn with_loras(count: u64) -> Self {
        let shelf = Self::new();
        for at in 0..count {
            shelf.add(&format!("a{at}"), Kind::Lora(4), at);
        }
        shelf
    }

    /// A shelf with an adapter of each kind, by its name in [`KINDS`].
    pub(crate) fn with_kinds() -> Self {
        let shelf = Self::new();
        for (seed, (name, kind)) in (50..).zip(KINDS) {
            shelf.add(name, kind, seed);
        }
        shelf
    }

    /// A shelf of its own with the same adapters, for a server beside another.
    pub(crate) fn twin(&self) -> Self {
        let twin = Self::new();
        for entry in fs::read_dir(self.folder.path()).expect("a folder") {
            let from = entry.expect("an entry").path();
            let name = from.file_name().expect("a name").to_owned();
            if from.is_file() || name.to_string_lossy().starts_with('.') {
                continue;
            }
            let to = twin.folder.path().join(name);
            fs::create_dir(&to).expect("a folder");
            for file in fs::read_dir(from).expect("a folder") {
                let file = file.expect("a file");
                fs::copy(file.path(), to.join(file.file_name())).expect("it is copied");
            }
        }
        twin
    }

    pub(crate) fn add(&self, name: &str, kind: Kind, seed: u64) {
        write_adapter(&self.path(name), kind, seed);
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A copy of an adapter under another name.
    pub(crate) fn copy(&self, from: &str, to: &str) {
        fs::create_dir_all(self.path(to)).expect("a folder");
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(self.path(from).join(name), self.path(to).join(name)).expect("a copy");
        }
    }
}

/// A model like the built-in one whose chat template shows tools in a form.
pub(crate) fn tool_model(mark: &str) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, bytes) in BUILTIN_FILES {
        fs::write(folder.path().join(name), bytes).expect("a file of the model");
    }
    let template = format!(
        "{{%- if tools %}}<|im_start|>system\nTools: {{% for tool in tools %}}{{{{ tool.function.name }}}}{{% endfor %}} Call with {mark}\
         <|im_end|>\n{{% endif %}}\
         {{%- for message in messages %}}<|im_start|>{{{{ message.role }}}}\n{{{{ message.content or '' }}}}\
         {{%- for call in message.tool_calls or [] %}}{{{{ call.function.name }}}} {{{{ call.function.arguments | tojson }}}}{{% endfor %}}\
         <|im_end|>\n{{% endfor %}}\
         {{%- if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
    );
    fs::write(folder.path().join("chat_template.jinja"), template).expect("a template");
    folder
}

/// A server that runs until it is dropped.
pub(crate) struct House {
    pub(crate) client: Client,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl House {
    /// A server of the built-in model with a shelf.
    pub(crate) fn open(shelf: &Shelf) -> Self {
        Self::with(shelf, |_| {})
    }

    /// The same with other options.
    pub(crate) fn with(shelf: &Shelf, change: impl FnOnce(&mut Options)) -> Self {
        Self::try_with(shelf, change).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The same where it may fail to start.
    pub(crate) fn try_with(
        shelf: &Shelf,
        change: impl FnOnce(&mut Options),
    ) -> Result<Self, ServeError> {
        let mut options = Options::new(BASE);
        options.adapter_dir = Some(shelf.folder.path().to_owned());
        change(&mut options);
        Self::start(builtin(), options)
    }

    /// A server of another model without adapters.
    pub(crate) fn of_model(folder: &Path) -> Self {
        let base = load(Source::Folder(folder.to_owned()), DType::F32);
        Self::start(base, Options::new(BASE)).unwrap_or_else(|error| panic!("{error}"))
    }

    pub(crate) fn start(base: Base, mut options: Options) -> Result<Self, ServeError> {
        options.address = SocketAddr::from(([127, 0, 0, 1], 0));
        let stop = Arc::new(AtomicBool::new(false));
        let of_thread = Arc::clone(&stop);
        let (sender, address) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let ready = move |address| {
                let _ = sender.send(address);
            };
            serve(base, None, options, ready, move || {
                of_thread.load(Ordering::SeqCst)
            })
        });
        match address.recv() {
            Ok(address) => Ok(Self {
                client: Client { address, key: None },
                stop,
                thread: Some(thread),
            }),
            Err(_) => match thread.join().expect("the server does not panic") {
                Err(error) => Err(error),
                Ok(()) => panic!("the server ended at once"),
            },
        }
    }

    /// Tells the server to end, and does not wait.
    pub(crate) fn tell_to_stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    /// Ends the server and waits for it.
    pub(crate) fn close(mut self) {
        self.tell_to_stop();
        let thread = self.thread.take().expect("it runs");
        let ended = thread.join().expect("the server does not panic");
        ended.expect("the server ends well");
    }

    /// The adapter's entry in `/v1/adapters`; null if there is none.
    pub(crate) fn adapter(&self, name: &str) -> Value {
        let list = self.client.get("/v1/adapters").ok();
        let data = list["data"].as_array().expect("a list");
        let found = data.iter().find(|about| about["id"] == name);
        found.cloned().unwrap_or_default()
    }

    /// Bytes of adapters in memory.
    pub(crate) fn adapter_bytes(&self) -> u64 {
        let list = self.client.get("/v1/adapters").ok();
        list["memory"]["used"].as_u64().expect("a number")
    }

    pub(crate) fn load(&self, name: &str, path: &str) -> super::client::Reply {
        let body = json!({"lora_name": name, "lora_path": path});
        self.client.post("/v1/load_lora_adapter", &body)
    }

    pub(crate) fn reload(&self, name: &str, path: &str) -> super::client::Reply {
        let body = json!({"lora_name": name, "lora_path": path, "load_inplace": true});
        self.client.post("/v1/load_lora_adapter", &body)
    }

    pub(crate) fn unload(&self, name: &str) -> super::client::Reply {
        let body = json!({"lora_name": name});
        self.client.post("/v1/unload_lora_adapter", &body)
    }

    /// The greedy text of 12 tokens.
    #[track_caller]
    pub(crate) fn greedy(&self, model: &str, prompt: &str) -> String {
        let answer = self.client.post("/v1/completions", &greedy(model, prompt));
        text_of(&answer.ok())
    }

    /// Waits until `is_so`.
    #[track_caller]
    pub(crate) fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !is_so(self) {
            assert!(begun.elapsed() < Duration::from_secs(20), "never: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// `running` or `waiting` of `/health`.
    pub(crate) fn load_of(&self, what: &str) -> u64 {
        let health = self.client.get("/health").ok();
        health[what].as_u64().expect("a number")
    }
}

impl Drop for House {
    fn drop(&mut self) {
        self.tell_to_stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                drop(ended.expect("the server does not panic"));
            }
        }
    }
}

/// A request for 12 greedy tokens that no end token ends.
pub(crate) fn greedy(model: &str, prompt: &str) -> Value {
    json!({"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": true})
}

/// One that goes on until the context is full or its client leaves.
pub(crate) fn endless(model: &str, prompt: &str) -> Value {
    json!({"model": model, "prompt": prompt, "max_tokens": 100_000, "temperature": 0, "ignore_eos": true, "stream": true})
}

/// The text of the first choice.
pub(crate) fn text_of(answer: &Value) -> String {
    let text = answer["choices"][0]["text"].as_str();
    text.unwrap_or_else(|| panic!("no text in {answer}"))
        .to_owned()
}

/// A prompt of about so many tokens, which begins in a way of its own.
pub(crate) fn long_prompt(beginning: &str, words: usize) -> String {
    let more = (0..words).map(|at| format!(" {}", ["the", "a", "of", "and", "to"][at * at % 5]));
    beginning.to_owned() + &more.collect::<String>()
}
