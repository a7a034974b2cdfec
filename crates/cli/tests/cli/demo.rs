//! The demonstration, whole.

use super::support::json_of;

#[test]
fn names_and_things_arrive_in_the_text() {
    let demo = json_of(&["demo", "--quiet"]);
    let tasks = demo["tasks"].as_array().expect("tasks");
    assert_eq!(tasks.len(), 2);
    let (mut expected, mut arrived) = (0.0, 0.0);
    for task in tasks {
        let count = |key: &str| task["carried"][key].as_f64().expect("a count");
        // Every row has one word at least.
        assert!(count("expected") >= 64.0, "{task}");
        assert!(count("adapter") >= 0.93 * count("expected"), "{task}");
        assert!(count("base") < 0.5 * count("expected"), "{task}");
        expected += count("expected");
        arrived += count("adapter");
    }
    assert!(arrived >= 0.95 * expected, "{arrived} of {expected}");
}
