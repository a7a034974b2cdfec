//! Which requests are taken up, when, and what becomes of those that are not.

use std::time::{Duration, Instant};

use serde_json::json;

use super::house::{BASE, House, Shelf, endless, greedy, long_prompt};

#[test]
fn a_full_queue_says_when_to_come_back() {
    let shelf = Shelf::with_loras(1);
    let house = House::with(&shelf, |options| {
        options.max_num_seqs = 1;
        options.max_waiting = 2;
    });
    let mut streams = vec![
        house
            .client
            .open("/v1/completions", &endless(BASE, "First")),
    ];
    streams[0].next().expect("it runs");
    std::thread::scope(|scope| {
        let waits = |model: &'static str| {
            let client = &house.client;
            scope.spawn(move || client.post("/v1/completions", &greedy(model, "Waits")))
        };
        let waiting = [waits(BASE), waits("a0")];
        house.until("two wait", |house| house.load_of("waiting") == 2);
        // Gateways read which adapters are waited for; the base is none.
        house.until("the adapter that waits is named", |house| {
            let metrics = house.client.get("/metrics").text();
            metrics.contains(r#"waiting_lora_adapters="a0""#)
        });
        for stream in [false, true] {
            let mut ask = greedy(BASE, "Too many");
            ask["stream"] = stream.into();
            let refused = house.client.post("/v1/completions", &ask);
            assert_eq!(
                (refused.status, refused.code()),
                (429, "queue_full".to_owned())
            );
            let after = refused.header("retry-after").expect("a time");
            assert!(after.parse::<u64>().expect("seconds") >= 1);
            // Clients are not told that another try is of no use.
            assert_eq!(refused.header("x-should-retry"), None);
        }
        // Those that wait are answered.
        streams.clear();
        for asked in waiting {
            assert_eq!(asked.join().expect("an answer").status, 200);
        }
    });
    house.greedy(BASE, "Room again");
}

#[test]
fn a_rare_adapter_does_not_wait_for_a_busy_one() {
    let shelf = Shelf::with_loras(2);
    let house = House::with(&shelf, |options| options.max_num_seqs = 1);
    let mut first = house.client.open("/v1/completions", &endless("a0", "Busy"));
    first.next().expect("it runs");
    std::thread::scope(|scope| {
        let timed = |model: &'static str, tokens: u64| {
            let mut ask = greedy(model, "Mine");
            ask["max_tokens"] = json!(tokens);
            let client = &house.client;
            scope.spawn(move || {
                client.post("/v1/completions", &ask).ok();
                Instant::now()
            })
        };
        let busy: Vec<_> = (0..10).map(|_| timed("a0", 40)).collect();
        house.until("the busy ones wait", |house| house.load_of("waiting") >= 8);
        let rare = timed("a1", 5);
        drop(first);
        let rare = rare.join().expect("an answer");
        let before = busy
            .into_iter()
            .map(|asked| asked.join().expect("an answer"));
        let before = before.filter(|ended| *ended < rare).count();
        assert!(
            before <= 4,
            "{before} of the busy adapter came before the rare one"
        );
    });
}

#[test]
fn a_deadline_holds_in_the_queue_and_under_way() {
    let shelf = Shelf::new();
    let house = House::with(&shelf, |options| options.max_num_seqs = 1);
    let mut ask = endless(BASE, "Late");
    ask["stream"] = false.into();
    ask["n"] = json!(8);
    ask["timeout"] = json!(0.1);
    let begun = Instant::now();
    let late = house.client.post("/v1/completions", &ask);
    assert_eq!((late.status, late.code()), (408, "timeout".to_owned()));
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(late.header("x-should-retry"), Some("false"));
    house.until("nothing is under way", |house| {
        house.load_of("running") + house.load_of("waiting") == 0
    });
    // In the queue; what has not begun is an HTTP error, also where a stream was asked for.
    let mut first = house
        .client
        .open("/v1/completions", &endless(BASE, "First"));
    first.next().expect("it runs");
    let mut ask = greedy(BASE, "Waits");
    ask["timeout"] = json!(0.05);
    ask["stream"] = true.into();
    let late = house.client.post("/v1/completions", &ask);
    assert_eq!((late.status, late.code()), (408, "timeout".to_owned()));
    drop(first);
    // Under way, the stream ends with an error in place of [DONE].
    let mut ask = endless(BASE, "Streams");
    ask["timeout"] = json!(0.2);
    ask["n"] = json!(4);
    let mut stream = house.client.open("/v1/completions", &ask);
    let mut last = json!(null);
    while let Some(event) = stream.next() {
        last = event;
    }
    assert_eq!(last["error"]["code"], "timeout", "{last}");
}

#[test]
fn the_servers_own_deadline_is_the_longest() {
    let shelf = Shelf::new();
    let house = House::with(&shelf, |options| {
        options.caps.timeout = Some(Duration::from_millis(100));
        options.max_num_seqs = 1;
    });
    let mut ask = endless(BASE, "Late");
    ask["stream"] = false.into();
    ask["n"] = json!(8);
    ask["timeout"] = json!(1000);
    assert_eq!(house.client.post("/v1/completions", &ask).code(), "timeout");
}

#[test]
fn a_request_that_can_never_fit_is_refused_while_others_go_on() {
    let shelf = Shelf::new();
    let house = House::with(&shelf, |options| {
        // One block of 128 rows: 5 layers of keys and values of 64 numbers.
        options.kv_cache_memory = Some(2 * 128 * 5 * 2 * 64 * 4);
    });
    let mut first = house.client.open("/v1/completions", &{
        let mut ask = endless(BASE, "First");
        ask["max_tokens"] = json!(100);
        ask
    });
    first.next().expect("it runs");
    let long = greedy(BASE, &long_prompt("Long", 300));
    let refused = house.client.post("/v1/completions", &long);
    assert_eq!(
        (refused.status, refused.code()),
        (400, "cache_too_small".to_owned())
    );
    // One that says nothing of its length takes what there is.
    let chat = json!({"model": BASE, "messages": [{"role": "user", "content": "Hi"}]});
    assert_eq!(house.client.post("/v1/chat/completions", &chat).status, 200);
    first.all();
}

#[test]
fn a_server_that_is_told_to_stop_ends_what_is_under_way() {
    let shelf = Shelf::new();
    let house = House::open(&shelf);
    let ask = endless(BASE, "Drains");
    let whole = house.client.open("/v1/completions", &ask).all().len();
    let mut stream = house.client.open("/v1/completions", &ask);
    stream.next().expect("it runs");
    house.tell_to_stop();
    std::thread::sleep(Duration::from_millis(120));
    // New ones are not taken, and those under way come to their ends.
    let refused = std::net::TcpStream::connect(house.client.address);
    if refused.is_ok()
        && let Some(answer) = house
            .client
            .raw(b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    {
        assert_eq!(answer.status, 503);
    }
    assert_eq!(stream.all().len(), whole - 1);
    house.close();
}

#[test]
fn a_server_that_is_told_to_stop_waits_no_longer_than_it_should() {
    let shelf = Shelf::new();
    let house = House::with(&shelf, |options| {
        options.drain_timeout = Duration::from_millis(200);
    });
    // A connection that never says anything, and one that stops in the middle of a request.
    let _silent = house.client.connect();
    let mut half = house.client.connect();
    std::io::Write::write_all(
        &mut half,
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 100\r\n\r\n{",
    )
    .expect("it is sent");
    let mut ask = endless(BASE, "Long");
    ask["n"] = json!(16);
    let mut stream = house.client.open("/v1/completions", &ask);
    stream.next().expect("it runs");
    let begun = Instant::now();
    house.close();
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
}

#[test]
fn whoever_is_being_answered_goes_on_while_a_long_prompt_is_read() {
    let shelf = Shelf::new();
    let house = House::with(&shelf, |options| options.prompt_piece = 16);
    let mut ask = endless(BASE, "Answers");
    ask["max_tokens"] = json!(400);
    let mut stream = house.client.open("/v1/completions", &ask);
    stream.next().expect("it runs");
    std::thread::scope(|scope| {
        let long = scope.spawn(|| {
            let ask = greedy(BASE, &long_prompt("Long", 400));
            house.client.post("/v1/completions", &ask).ok();
        });
        // 400 tokens in pieces of 16 are 25 steps, each of which answers this one, too.
        let mut between = 0;
        while !long.is_finished() && stream.next().is_some() {
            between += 1;
        }
        assert!(between >= 20, "{between} tokens came meanwhile");
        long.join().expect("an answer");
    });
}
