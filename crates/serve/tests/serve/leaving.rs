//! Clients that leave: their rows and their places in the queue are free at once. And servers that leave: what they say in the end.

use std::time::Duration;

use serde_json::json;

use super::house::{BASE, House, Shelf, endless, greedy, long_prompt};

fn is_idle(house: &House) -> bool {
    house.load_of("running") + house.load_of("waiting") == 0
}

#[test]
fn a_client_that_leaves_a_stream_is_worked_for_no_longer() {
    let shelf = Shelf::with_loras(1);
    let house = House::open(&shelf);
    for model in [BASE, "a0"] {
        for n in [1, 4] {
            let mut ask = endless(model, "Leaves");
            ask["n"] = json!(n);
            let mut stream = house.client.open("/v1/completions", &ask);
            stream.next().expect("it runs");
            house.until("all choices run", |house| house.load_of("running") == n);
            drop(stream);
            house.until("its rows are free", is_idle);
        }
    }
    assert_eq!(house.adapter("a0")["running"], 0);
}

#[test]
fn a_client_that_leaves_without_a_stream_is_worked_for_no_longer() {
    let shelf = Shelf::new();
    let house = House::open(&shelf);
    let mut ask = endless(BASE, "Leaves");
    ask["stream"] = false.into();
    ask["n"] = json!(16);
    house
        .client
        .leave("/v1/completions", &ask, Duration::from_millis(50));
    house.until("its rows are free", is_idle);
}

#[test]
fn a_client_that_leaves_the_queue_is_forgotten() {
    let shelf = Shelf::new();
    let house = House::with(&shelf, |options| {
        options.max_num_seqs = 1;
        options.max_waiting = 8;
    });
    for stream in [false, true] {
        let mut first = house
            .client
            .open("/v1/completions", &endless(BASE, "First"));
        first.next().expect("it runs");
        for _ in 0..4 {
            let mut ask = endless(BASE, "Waits");
            ask["stream"] = stream.into();
            house
                .client
                .leave("/v1/completions", &ask, Duration::from_millis(5));
        }
        // The one under way goes on, and nobody waits.
        house.until("nobody waits", |house| house.load_of("waiting") == 0);
        assert_eq!(house.load_of("running"), 1, "stream: {stream}");
        drop(first);
        house.until("nothing is under way", is_idle);
    }
}

#[test]
fn a_client_that_leaves_while_its_prompt_is_read_is_worked_for_no_longer() {
    let shelf = Shelf::new();
    let house = House::with(&shelf, |options| options.prompt_piece = 1);
    // Somebody is being answered, so the prompt is read in pieces of one token.
    let mut other = house
        .client
        .open("/v1/completions", &endless(BASE, "Other"));
    other.next().expect("it runs");
    let mut ask = endless(BASE, &long_prompt("Long", 400));
    ask["max_tokens"] = json!(10);
    house
        .client
        .leave("/v1/completions", &ask, Duration::from_millis(20));
    house.until("only the other is left", |house| {
        house.load_of("running") <= 1 && house.load_of("waiting") == 0
    });
    assert!(other.next().is_some(), "it was not read to its end first");
}

#[test]
fn many_that_come_and_leave_lose_nothing_of_the_others() {
    let shelf = Shelf::with_loras(3);
    let house = House::with(&shelf, |options| options.max_num_seqs = 4);
    let models = ["a0", "a1", "a2", BASE];
    let alone = models.map(|model| house.greedy(model, "Stays"));
    std::thread::scope(|scope| {
        for at in 0..6_u64 {
            let house = &house;
            scope.spawn(move || {
                for turn in 0..8 {
                    let model = models[((at + turn) % 4) as usize];
                    let after = Duration::from_millis((at * 7 + turn * 3) % 20);
                    house
                        .client
                        .leave("/v1/completions", &endless(model, "Leaves"), after);
                }
            });
        }
        for (model, text) in models.iter().zip(&alone) {
            let house = &house;
            scope.spawn(move || {
                for _ in 0..6 {
                    let answer = house
                        .client
                        .post("/v1/completions", &greedy(model, "Stays"));
                    assert_eq!(answer.ok()["choices"][0]["text"], **text);
                }
            });
        }
    });
    house.until("nothing is under way", is_idle);
    for name in ["a0", "a1", "a2"] {
        assert_eq!(house.adapter(name)["running"], 0, "{name}");
    }
}

#[test]
fn a_server_that_ends_says_so_to_everybody() {
    let shelf = Shelf::new();
    let house = House::with(&shelf, |options| {
        options.drain_timeout = Duration::from_secs(2);
        options.max_num_seqs = 1;
    });
    // More than can be done in that time.
    let mut ask = endless(BASE, "Runs on");
    ask["prompt"] = json!(vec!["Runs on"; 8]);
    ask["n"] = json!(16);
    let mut stream = house.client.open("/v1/completions", &ask);
    stream.next().expect("it runs");
    house.tell_to_stop();
    house.until("it takes no more", |house| {
        house.client.get("/ready").status == 503
    });
    assert_eq!(house.client.get("/health").status, 200);
    let refused = house.client.post("/v1/completions", &greedy(BASE, "Late"));
    assert_eq!(
        (refused.status, refused.code()),
        (503, "shutting_down".to_owned())
    );
    assert!(refused.header("retry-after").is_some());
    // The one under way goes on until its time is over, and is told.
    let (events, _) = stream.rest();
    let last = events.last().expect("an event");
    assert_eq!(last["error"]["code"], "shutting_down", "{last}");
    house.close();
}

#[test]
fn a_stop_string_is_an_answers_end_and_no_abort() {
    let shelf = Shelf::new();
    let house = House::open(&shelf);
    let text = house.greedy(BASE, "Once");
    let middle: String = text.chars().skip(1).take(2).collect();
    let counted = |name: &str| -> f64 {
        let metrics = house.client.get("/metrics").text();
        let lines = metrics.lines().filter(|line| line.starts_with(name));
        lines
            .filter_map(|line| line.split(' ').next_back()?.parse::<f64>().ok())
            .sum()
    };
    let stopped = r#"vllm:request_success_total{finished_reason="stop"}"#;
    let before = counted(stopped);
    let mut ask = endless(BASE, "Once");
    ask["stream"] = false.into();
    ask["stop"] = json!(middle);
    let answer = house.client.post("/v1/completions", &ask).ok();
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    // Other tests of this process count, too.
    house.until("it is counted", |_| counted(stopped) > before);
}
