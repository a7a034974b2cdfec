//! Adapters that are loaded, replaced and forgotten while requests go on.

use lowrank::Workspace;
use lowrank::generate::{GenerateOptions, PromptIds, generate};
use lowrank::model::AdapterSet;
use lowrank::tuning;
use serde_json::{Value, json};

use super::house::{
    BASE, House, KINDS, Kind, NETWORK, Shelf, builtin, edit_config, endless, greedy, long_prompt,
    text_of,
};

/// Greedy text and how much of the prompt was computed before.
fn with_cache(house: &House, body: &Value) -> (String, u64) {
    let answer = house.client.post("/v1/completions", body).ok();
    let cached = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
    (text_of(&answer), cached.as_u64().expect("a number"))
}

#[test]
fn a_reload_under_the_same_name_reuses_no_old_keys() {
    let shelf = Shelf::with_loras(2);
    let house = House::open(&shelf);
    let prompt = long_prompt("Once", 200);
    let ask = greedy("x", &prompt);
    assert_eq!(house.load("x", "a0").status, 200);
    let (of_a0, first) = with_cache(&house, &ask);
    let (again, cached) = with_cache(&house, &ask);
    assert_eq!((first, again), (0, of_a0.clone()));
    assert!(cached >= 128, "{cached}");
    assert_eq!(house.adapter("x")["generation"], 1);
    assert_eq!(house.reload("x", "a1").status, 200);
    let (of_a1, cached) = with_cache(&house, &ask);
    assert_eq!(
        (cached, house.adapter("x")["generation"].clone()),
        (0, json!(2))
    );
    assert_eq!(of_a1, House::open(&shelf.twin()).greedy("a1", &prompt));
    assert_ne!(of_a1, of_a0);
    // Files that were replaced where they lie are another content, too.
    shelf.copy("a0", "a1");
    assert_eq!(house.reload("x", "a1").status, 200);
    assert_eq!(with_cache(&house, &ask).0, of_a0);
    // What has not changed is no new generation and keeps what was computed.
    assert_eq!(house.reload("x", "a1").status, 200);
    assert_eq!(house.adapter("x")["generation"], 3);
    assert!(with_cache(&house, &ask).1 >= 128);
}

#[test]
fn a_name_never_collides_with_a_cache_salt() {
    let shelf = Shelf::with_loras(2);
    let house = House::open(&shelf);
    let prompt = long_prompt("Salt", 200);
    let mut all = Vec::new();
    for model in [BASE, "a0", "a1"] {
        for salt in [None, Some("a0"), Some("a1"), Some("1"), Some(BASE)] {
            let mut ask = greedy(model, &prompt);
            ask["cache_salt"] = json!(salt);
            let (text, cached) = with_cache(&house, &ask);
            assert_eq!(cached, 0, "{model} with the salt {salt:?}");
            all.push((model, text));
            assert!(with_cache(&house, &ask).1 >= 128);
        }
    }
    // The salt changes nothing else.
    let twin = shelf.twin();
    for (model, text) in &all {
        assert_eq!(*text, House::open(&twin).greedy(model, &prompt));
    }
}

#[test]
fn the_prompt_cache_never_crosses_adapters() {
    let shelf = Shelf::with_kinds();
    let house = House::open(&shelf);
    let prompt = long_prompt("Cross", 200);
    let mut texts = Vec::new();
    for model in KINDS.map(|(name, _)| name).into_iter().chain([BASE]) {
        let (text, cached) = with_cache(&house, &greedy(model, &prompt));
        assert_eq!(cached, 0, "{model}");
        let (again, cached) = with_cache(&house, &greedy(model, &prompt));
        assert!(cached >= 128, "{model}: {cached}");
        assert_eq!(again, text, "{model}");
        texts.push(text);
    }
    let twin = shelf.twin();
    let fresh = House::open(&twin);
    for ((name, _), text) in KINDS.iter().zip(&texts) {
        assert_eq!(*text, fresh.greedy(name, &prompt), "{name}");
    }
}

#[test]
fn one_requests_weights_leave_another_in_flight_alone() {
    let shelf = Shelf::with_loras(2);
    let house = House::open(&shelf);
    let mixed = |weights: [f64; 2]| {
        let mut ask = greedy(BASE, "Weights of");
        ask["max_tokens"] = json!(60);
        ask["adapters"] =
            json!([{"id": "a0", "weight": weights[0]}, {"id": "a1", "weight": weights[1]}]);
        ask
    };
    let text = |weights| text_of(&house.client.post("/v1/completions", &mixed(weights)).ok());
    let weights = [[0.5, 0.25], [2.0, 0.0], [-1.0, 3.0]];
    let alone = weights.map(text);
    assert_ne!(alone[0], alone[1]);
    std::thread::scope(|scope| {
        let asked = weights.map(|weights| scope.spawn(move || text(weights)));
        let together = asked.map(|asked| asked.join().expect("an answer"));
        assert_eq!(together, alone);
    });
    // Adapter a0 alone with the weight 1 is a0.
    assert_eq!(text([1.0, 0.0])[..8], {
        let mut ask = greedy("a0", "Weights of");
        ask["max_tokens"] = json!(60);
        text_of(&house.client.post("/v1/completions", &ask).ok())[..8].to_owned()
    });
}

#[test]
fn a_mix_of_what_cannot_be_mixed_is_refused() {
    let shelf = Shelf::with_kinds();
    let house = House::open(&shelf);
    let ask = |model: &str, adapters: Value| {
        let mut ask = greedy(model, "Mix");
        ask["adapters"] = adapters;
        house.client.post("/v1/completions", &ask)
    };
    assert_eq!(
        ask(BASE, json!([{"id": "lora"}, {"id": "wide"}])).status,
        200
    );
    assert_eq!(
        ask(BASE, json!([{"id": "lora"}, {"id": "bitfit"}])).code(),
        "invalid_value"
    );
    assert_eq!(ask("lora", json!([{"id": "wide"}])).code(), "invalid_value");
    assert_eq!(
        ask(BASE, json!([{"id": "nobody"}])).code(),
        "model_not_found"
    );
    assert_eq!(
        ask(BASE, json!([{"id": "lora", "weight": 1e9}])).code(),
        "invalid_value"
    );
    assert_eq!(ask(BASE, json!([])).status, 200);
}

#[test]
fn unloading_gives_the_memory_back() {
    let shelf = Shelf::with_loras(3);
    let house = House::open(&shelf);
    assert_eq!(house.adapter_bytes(), 0);
    for (name, from) in [("x", "a0"), ("y", "a1"), ("z", "a2")] {
        assert_eq!(house.load(name, from).status, 200);
        house.greedy(name, "Bytes");
    }
    let mut mix = greedy(BASE, "Bytes");
    mix["adapters"] = json!([{"id": "x"}, {"id": "y"}]);
    house.client.post("/v1/completions", &mix).ok();
    let all = house.adapter_bytes();
    assert!(all > 0);
    for (left, name) in [(2, "x"), (1, "y"), (0, "z")] {
        let answer = house.unload(name);
        let expected = format!("Success: LoRA adapter '{name}' removed successfully.");
        assert_eq!(answer.text(), expected);
        // Requests that are just over may still hold it for a moment.
        house.until("the bytes are free", |house| {
            house.adapter_bytes() == all / 3 * left
        });
        assert_eq!(
            house
                .client
                .post("/v1/completions", &greedy(name, "Bytes"))
                .code(),
            "model_not_found"
        );
        assert_eq!(house.unload(name).code(), "lora_adapter_not_found");
    }
}

#[test]
fn loading_while_others_generate_disturbs_nobody() {
    let shelf = Shelf::with_loras(4);
    let house = House::open(&shelf);
    house.load("x", "a0");
    let mut ask = greedy("x", "While others");
    ask["max_tokens"] = json!(200);
    let alone = text_of(&house.client.post("/v1/completions", &ask).ok());
    ask["stream"] = true.into();
    let mut streams = vec![
        house.client.open("/v1/completions", &ask),
        house.client.open("/v1/completions", &ask),
    ];
    let mut texts = [String::new(), String::new()];
    for turn in 0..40 {
        let of_turn = format!("a{}", turn % 4);
        // Those that are under way keep what they began with.
        match turn % 3 {
            0 => assert_eq!(house.reload("x", &of_turn).status, 200),
            1 => assert_eq!(house.load(&format!("y{turn}"), &of_turn).status, 200),
            _ => assert_eq!(house.unload(&format!("y{}", turn - 1)).status, 200),
        }
        for (stream, text) in streams.iter_mut().zip(&mut texts) {
            let event = stream.next().expect("it goes on");
            text.push_str(event["choices"][0]["text"].as_str().expect("text"));
        }
    }
    for (mut stream, mut text) in streams.into_iter().zip(texts) {
        while let Some(event) = stream.next() {
            text.push_str(event["choices"][0]["text"].as_str().expect("text"));
        }
        assert_eq!(text, alone);
    }
}

#[test]
fn every_one_of_many_adapters_can_be_used() {
    let shelf = Shelf::with_kinds();
    let house = House::with(&shelf, |options| {
        options.adapter_dir = None;
        options.adapters = KINDS
            .map(|(name, _)| (name.to_owned(), shelf.path(name)))
            .into();
    });
    let mut texts: Vec<String> = KINDS
        .iter()
        .map(|(name, _)| house.greedy(name, "The first"))
        .collect();
    texts.push(house.greedy(BASE, "The first"));
    let mut different = texts.clone();
    different.sort();
    different.dedup();
    assert_eq!(different.len(), texts.len(), "{texts:?}");
}

/// DoRA, LoRA and no adapter, one after the other and in one batch: what the engine makes of them without a server.
#[test]
fn magnitudes_are_served_as_the_engine_has_them() {
    let shelf = Shelf::with_kinds();
    let models = ["dora", "wide", BASE, "dora", "lora"];
    let names = ["dora", "wide", "lora"];
    let adapters = names.map(|name| {
        let loaded = tuning::load(&shelf.path(name), NETWORK.config());
        loaded.expect("it loads").adapter
    });
    let set = adapters.each_ref();
    let tokenizer = builtin().tokenizer;
    let ids = tokenizer.encode("Company", false).expect("tokens");
    let prompts = models.map(|model| {
        let adapter = names.iter().position(|name| *name == model);
        PromptIds::new(ids.clone(), adapter)
    });
    let (set, options) = (AdapterSet::new(&set), GenerateOptions::greedy(12, &[]));
    let made = generate(
        &NETWORK,
        set,
        &prompts,
        &options,
        &Workspace::new(),
        |_, _| true,
    );
    let expected: Vec<String> = made
        .iter()
        .map(|made| tokenizer.decode(&made.ids, true).expect("a text"))
        .collect();
    assert_ne!(expected[0], expected[1]);
    assert_ne!(expected[0], expected[2]);
    let house = House::open(&shelf);
    let alone = models.map(|model| house.greedy(model, "Company"));
    assert_eq!(alone.to_vec(), expected);
    std::thread::scope(|scope| {
        let house = &house;
        let asked = models.map(|model| scope.spawn(move || house.greedy(model, "Company")));
        let together = asked.map(|asked| asked.join().expect("an answer"));
        assert_eq!(together.to_vec(), expected);
    });
}

#[test]
fn a_row_without_an_adapter_beside_one_with_it_stays_the_bases() {
    let shelf = Shelf::with_kinds();
    let house = House::open(&shelf);
    let models = [
        "lora", BASE, "dora", "lora", "ia3", BASE, "top", "prefix", "lora", "layers", BASE,
    ];
    let alone = models.map(|model| house.greedy(model, "Company"));
    for turn in 0..models.len() {
        std::thread::scope(|scope| {
            let mut asked: Vec<_> = (0..models.len())
                .map(|at| (at + turn) % models.len())
                .map(|at| {
                    (
                        at,
                        scope.spawn({
                            let house = &house;
                            move || house.greedy(models[at], "Company")
                        }),
                    )
                })
                .collect();
            for (at, asked) in asked.drain(..) {
                assert_eq!(
                    asked.join().expect("an answer"),
                    alone[at],
                    "{}",
                    models[at]
                );
            }
        });
    }
}

#[test]
fn more_adapters_than_there_is_memory_for_take_turns() {
    let shelf = Shelf::with_loras(8);
    let alone: Vec<String> = {
        let house = House::open(&shelf);
        (0..8)
            .map(|at| house.greedy(&format!("a{at}"), "Turns"))
            .collect()
    };
    let one = {
        let house = House::open(&shelf);
        house.greedy("a0", "Turns");
        house.adapter_bytes()
    };
    let house = House::with(&shelf, |options| {
        options.adapter_memory = Some(2 * one);
        options.max_num_seqs = 3;
    });
    house.load("kept", "a0");
    let pinned = house
        .client
        .post("/v1/adapters/kept/pin", &json!({"pinned": true}));
    assert_eq!(pinned.ok()["pinned"], true);
    std::thread::scope(|scope| {
        for turn in 0..4 {
            let (house, alone) = (&house, &alone);
            scope.spawn(move || {
                for at in 0..8 {
                    let at = (at * 3 + turn) % 8;
                    assert_eq!(house.greedy(&format!("a{at}"), "Turns"), alone[at]);
                }
            });
        }
    });
    house.until("no more than the limit is in memory", |house| {
        house.greedy("a1", "Turns");
        house.adapter_bytes() <= 2 * one
    });
    assert_eq!(house.adapter("kept")["resident"], true);
}

#[test]
fn the_same_values_under_two_names_are_held_once() {
    let shelf = Shelf::with_loras(1);
    shelf.copy("a0", "twin");
    let house = House::open(&shelf);
    let text = house.greedy("a0", "Twins");
    let bytes = house.adapter_bytes();
    assert_eq!(house.greedy("twin", "Twins"), text);
    assert_eq!(house.load("third", "a0").status, 200);
    assert_eq!(house.adapter_bytes(), bytes);
    house.unload("a0");
    assert_eq!(house.greedy("twin", "Twins"), text);
    assert_eq!(house.adapter_bytes(), bytes);
}

#[test]
fn models_name_their_parent_and_no_path_of_the_server() {
    let shelf = Shelf::with_loras(2);
    let house = House::open(&shelf);
    house.load("x", "a0");
    let list = house.client.get("/v1/models").ok();
    assert_eq!(list["object"], "list");
    assert_eq!(
        (&list["data"][0]["id"], &list["data"][0]["parent"]),
        (&json!(BASE), &Value::Null)
    );
    // What lies in the folder is offered before anybody has asked for it.
    for (at, name, generation) in [(1, "a0", 0), (2, "a1", 0), (3, "x", 1)] {
        let model = &list["data"][at];
        assert_eq!(
            (&model["id"], &model["parent"]),
            (&json!(name), &json!(BASE))
        );
        assert_eq!(model["lowrank"]["generation"], generation);
    }
    let folder = shelf.path("").display().to_string();
    for path in [
        "/v1/models",
        "/v1/models/x",
        "/v1/adapters",
        "/openapi.json",
        "/metrics",
    ] {
        assert!(
            !house
                .client
                .get(path)
                .text()
                .contains(folder.trim_end_matches('/')),
            "{path}"
        );
    }
    assert_eq!(house.client.get("/v1/models/x").ok()["id"], "x");
    assert_eq!(
        house.client.get("/v1/models/nobody").code(),
        "model_not_found"
    );
    let taken = house.load("x", "a1");
    assert_eq!(
        (taken.status, taken.code()),
        (400, "lora_adapter_already_loaded".to_owned())
    );
    let stale = json!({"lora_name": "x", "lora_path": "a1", "load_inplace": true, "expected_generation": 7});
    let stale = house.client.post("/v1/load_lora_adapter", &stale);
    assert_eq!(
        (stale.status, stale.code()),
        (409, "generation_conflict".to_owned())
    );
    assert_eq!(
        house.load("y", "a1").text(),
        "Success: LoRA adapter 'y' added successfully."
    );
}

#[test]
fn a_name_with_slashes_is_found() {
    let shelf = Shelf::new();
    let house = House::with(&shelf, |options| options.name = "hub/some-model".to_owned());
    for path in ["/v1/models/hub/some-model", "/v1/models/hub%2Fsome-model"] {
        assert_eq!(
            house.client.get(path).ok()["id"],
            "hub/some-model",
            "{path}"
        );
    }
}

#[test]
fn the_base_is_as_fast_with_a_hundred_adapters_loaded() {
    let shelf = Shelf::with_loras(4);
    let twin = shelf.twin();
    let (plain, full) = (House::open(&twin), House::open(&shelf));
    for at in 0..100 {
        assert_eq!(
            full.load(&format!("x{at}"), &format!("a{}", at % 4)).status,
            200
        );
    }
    let mut ask = greedy(BASE, "Fast");
    ask["max_tokens"] = json!(150);
    let time = |house: &House| {
        let begun = std::time::Instant::now();
        house.client.post("/v1/completions", &ask).ok();
        begun.elapsed().as_secs_f64()
    };
    // Other tests share the machine, so the least of many times counts; a base that paid for its adapters would be slower each time.
    let mut least = (f64::INFINITY, f64::INFINITY);
    for _ in 0..60 {
        least = (least.0.min(time(&plain)), least.1.min(time(&full)));
        if least.1 < 1.3 * least.0 {
            return;
        }
    }
    panic!("{} s against {} s", least.1, least.0);
}

#[test]
fn a_config_without_the_name_of_its_base_loads() {
    let shelf = Shelf::with_loras(2);
    edit_config(&shelf.path("a0"), |config| {
        config["base_model_name_or_path"] = Value::Null;
    });
    edit_config(&shelf.path("a1"), |config| {
        config
            .as_object_mut()
            .expect("an object")
            .remove("base_model_name_or_path");
    });
    let house = House::open(&shelf);
    for name in ["a0", "a1"] {
        house.greedy(name, "Nameless");
    }
}

#[test]
fn unloading_with_sixteen_choices_under_way_ends_nothing() {
    let shelf = Shelf::with_loras(2);
    let house = House::open(&shelf);
    house.load("x", "a0");
    let mut ask = endless("x", "Sixteen");
    ask["n"] = json!(16);
    ask["max_tokens"] = json!(60);
    ask["temperature"] = json!(0.8);
    ask["seed"] = json!(5);
    let mut stream = house.client.open("/v1/completions", &ask);
    stream.next().expect("it has begun");
    assert_eq!(house.unload("x").status, 200);
    assert_eq!(house.load("x", "a1").status, 200);
    let events = stream.all();
    let ends = events
        .iter()
        .filter(|event| event["choices"][0]["finish_reason"] == "length");
    assert_eq!(ends.count(), 16);
    house.greedy("x", "Sixteen");
    house.until("nothing is under way", |house| {
        house.load_of("running") == 0
    });
}

#[test]
fn an_adapter_shows_what_it_is() {
    let shelf = Shelf::with_loras(1);
    shelf.add("wide", Kind::Wide(8), 3);
    let house = House::open(&shelf);
    house.greedy("wide", "What");
    let about = house.adapter("wide");
    assert_eq!(
        (&about["method"], &about["rank"]),
        (&json!("lora"), &json!(8))
    );
    assert!(about["bytes"].as_u64() > Some(0), "{about}");
    assert!(about["last_used"].is_u64(), "{about}");
    assert_eq!(
        (&about["requests"], &about["running"]),
        (&json!(1), &json!(0))
    );
    // What nobody has asked for is not in memory yet, and what is pinned is.
    assert_eq!(house.adapter("a0")["resident"], false);
    let pinned = house.client.post("/v1/adapters/a0/pin", &json!({})).ok();
    assert_eq!(
        (&pinned["resident"], &pinned["pinned"]),
        (&json!(true), &json!(true))
    );
    house.close();
    let house = House::open(&shelf);
    assert_eq!(house.adapter("a0")["resident"], true);
    assert_eq!(house.adapter("wide")["resident"], false);
}
