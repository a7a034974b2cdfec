//! What a request gets does not depend on others: in any mix and order, with and without a cache, it is bit for bit what it gets alone.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use lowrank::kernels::CounterRng;
use serde_json::{Value, json};

use super::gather;
use super::house::{BASE, House, KINDS, Kind, Shelf, long_prompt};

const REQUESTS: usize = 200;

struct Random(CounterRng);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        (self.0.next_f64() * end as f64) as usize
    }

    fn one<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }

    fn is(&mut self, one_in: usize) -> bool {
        self.below(one_in) == 0
    }
}

/// A request and its route.
fn request(random: &mut Random, at: usize) -> (&'static str, Value) {
    let mut body = json!({
        "model": random.one(&KINDS.map(|(name, _)| name).into_iter().chain([BASE, BASE, "a0", "a1"]).collect::<Vec<_>>()),
        "seed": at,
        "max_tokens": 1 + random.below(20),
        "temperature": random.one(&[0.0, 0.0, 0.7, 1.3]),
        "stream": random.is(2),
    });
    let options = [
        ("top_p", json!(0.9)),
        ("top_k", json!(20)),
        ("min_p", json!(0.05)),
        ("presence_penalty", json!(0.7)),
        ("frequency_penalty", json!(-0.4)),
        ("repetition_penalty", json!(1.2)),
        ("logit_bias", json!({"300": 3, "400": -100})),
        ("stop", json!([" the", "e"])),
        ("stop", json!("\n")),
        ("n", json!(3)),
        ("ignore_eos", json!(true)),
    ];
    for (name, value) in options {
        if random.is(4) {
            body[name] = value;
        }
    }
    if random.is(8) {
        body["model"] = json!(BASE);
        body["adapters"] = json!([{"id": "lora", "weight": random.one(&[0.5, 1.0])}, {"id": "wide", "weight": 0.25}]);
    }
    // Beginnings of more than a block of the cache, which many have in common.
    let beginning = ["Once", "There was a", "First"][random.below(3)];
    let prompt = match random.below(3) {
        0 => long_prompt(beginning, 140 + random.below(100)),
        1 => long_prompt(beginning, 200) + random.one(&[" end", " 漢字", " and"]),
        _ => beginning.to_owned(),
    };
    if random.is(3) {
        if random.is(2) {
            body["logprobs"] = json!(true);
            body["top_logprobs"] = json!(random.below(4));
        }
        body["messages"] =
            json!([{"role": "system", "content": beginning}, {"role": "user", "content": prompt}]);
        return ("/v1/chat/completions", body);
    }
    if random.is(2) {
        body["logprobs"] = json!(random.below(4));
    }
    body["echo"] = random.is(4).into();
    body["prompt"] = if random.is(6) {
        json!([prompt, "Short", [5, 6, 7]])
    } else {
        json!(prompt)
    };
    ("/v1/completions", body)
}

/// The choices and the tokens that were counted.
fn ask(house: &House, path: &str, body: &Value) -> Value {
    if body["stream"] == true {
        let mut body = body.clone();
        body["stream_options"] = json!({"include_usage": true});
        let mut events = house.client.open(path, &body).all();
        let usage = events.pop().expect("the usage");
        return json!({"choices": gather::choices(&events), "made": usage["usage"]["completion_tokens"]});
    }
    let answer = house.client.post(path, body).ok();
    json!({"choices": answer["choices"], "made": answer["usage"]["completion_tokens"]})
}

/// The shelf that both servers have: an adapter of every kind, and two that are replaced all the while.
fn shelf() -> Shelf {
    let shelf = Shelf::with_kinds();
    shelf.add("a0", Kind::Lora(4), 1);
    shelf.add("a1", Kind::Lora(4), 2);
    shelf.add("b0", Kind::Lora(16), 3);
    shelf
}

#[test]
fn any_request_gets_in_company_what_it_gets_alone() {
    let shelf = shelf();
    let mut random = Random(CounterRng::new(11));
    let requests: Vec<_> = (0..REQUESTS).map(|at| request(&mut random, at)).collect();
    // Alone: one after the other, and no prompt shares anything with an earlier one.
    let alone: Vec<Value> = {
        let house = House::open(&shelf);
        let ask_alone = |(at, (path, body)): (usize, &(&str, Value))| {
            let mut body = body.clone();
            body["cache_salt"] = json!(at.to_string());
            body["stream"] = false.into();
            ask(&house, path, &body)
        };
        requests.iter().enumerate().map(ask_alone).collect()
    };
    let house = House::with(&shelf, |options| {
        options.max_num_seqs = 12;
        options.prompt_piece = 24;
    });
    let (next, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let mut order: Vec<usize> = (0..REQUESTS).collect();
    for at in (1..REQUESTS).rev() {
        order.swap(at, random.below(at + 1));
    }
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..12)
            .map(|_| {
                scope.spawn(|| {
                    while let Some(at) = order.get(next.fetch_add(1, Ordering::SeqCst)) {
                        let (path, body) = &requests[*at];
                        if at % 7 == 0 {
                            // Somebody asks the same and leaves.
                            let after = Duration::from_millis((*at % 30) as u64);
                            house.client.leave(path, body, after);
                        }
                        let answer = ask(&house, path, body);
                        assert_eq!(answer, alone[*at], "{at}: {path} {body}");
                    }
                })
            })
            .collect();
        // Others are loaded and unloaded, and those in use are loaded again.
        scope.spawn(|| {
            for turn in 0.. {
                if is_over.load(Ordering::SeqCst) {
                    break;
                }
                let name = format!("x{}", turn % 3);
                // A request may be loading it at this moment.
                let reload = |name: &str, path: &str| {
                    let status = || house.reload(name, path).status;
                    let settled = std::iter::repeat_with(status).find(|status| *status != 429);
                    assert_eq!(settled, Some(200));
                };
                reload(&name, ["b0", "a0", "wide"][turn % 3]);
                reload("a0", "a0");
                if turn % 2 == 0 {
                    assert_eq!(house.unload(&name).status, 200);
                }
                if turn % 5 == 0 {
                    house.unload("a1");
                    house.load("a1", "a1");
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let results: Vec<_> = asking
            .into_iter()
            .map(std::thread::ScopedJoinHandle::join)
            .collect();
        is_over.store(true, Ordering::SeqCst);
        for result in results {
            if let Err(panic) = result {
                std::panic::resume_unwind(panic);
            }
        }
    });
    house.until("nothing is under way", |house| {
        house.load_of("running") + house.load_of("waiting") == 0
    });
}

#[test]
fn an_adapter_that_is_replaced_answers_as_one_of_its_two_generations() {
    let shelf = shelf();
    let house = House::open(&shelf);
    let prompt = long_prompt("Replaced", 180);
    let of_both = ["a0", "a1"].map(|name| house.greedy(name, &prompt));
    assert_ne!(of_both[0], of_both[1]);
    house.load("x", "a0");
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for turn in 0.. {
                if is_over.load(Ordering::SeqCst) {
                    break;
                }
                assert_eq!(house.reload("x", ["a1", "a0"][turn % 2]).status, 200);
            }
        });
        let asking: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| (0..10).all(|_| of_both.contains(&house.greedy("x", &prompt)))))
            .collect();
        let all: Vec<bool> = asking
            .into_iter()
            .map(|asked| asked.join().unwrap_or(false))
            .collect();
        is_over.store(true, Ordering::SeqCst);
        assert!(all.iter().all(|is_right| *is_right));
    });
}
