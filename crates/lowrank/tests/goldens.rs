//! The engine against PyTorch, transformers and PEFT; `scripts/goldens.py` writes what it is compared with.

mod common;

use common::{ADAPTERS, Comparison, Golden, MODELS};

/// The goldens cover what the list of cases says: a file that lost its gradients would pass every comparison of them.
#[test]
fn the_goldens_are_complete() {
    for case in MODELS {
        let golden = Golden::in_folder(&case.folder());
        let weights = Golden::read(&case.folder().join("model.safetensors"));
        let names = |file: &Golden, prefix| -> Vec<String> {
            file.below(prefix)
                .map(|(name, _)| name.to_owned())
                .collect()
        };
        let rows = golden.rows();
        assert_eq!(rows.len(), 3, "{}", case.name);
        for (n, row) in rows.iter().enumerate() {
            assert_eq!(row.ids.len(), row.labels.len());
            assert_eq!(
                golden.values(&format!("logits.{n}")).shape,
                [row.ids.len(), 97]
            );
            assert!(!golden.greedy(n).is_empty());
        }
        let untied = weights.below("lm_head.").count() == 1;
        assert_eq!(untied, !case.tied, "{}", case.name);
        let tuned = if case.fully_tuned {
            names(&weights, "")
        } else {
            Vec::new()
        };
        assert_eq!(names(&golden, "grad."), tuned, "{}", case.name);
    }
    for case in ADAPTERS {
        let golden = Golden::in_folder(&case.folder());
        let pefts = Golden::read(&case.folder().join("adapter_model.safetensors"));
        let (name, prefix) = (case.name, if case.parts { "init." } else { "" });
        let start = if case.parts { &golden } else { &pefts };
        assert!(start.below(prefix).count() > 0, "{name}");
        for (key, values) in start.below(prefix) {
            assert_eq!(
                golden.values(&format!("grad.{key}")).shape,
                values.shape,
                "{name}"
            );
            assert_eq!(
                golden.values(&format!("final.{key}")).shape,
                values.shape,
                "{name}"
            );
        }
        assert_eq!(
            golden.below("grad.").count(),
            golden.below("final.").count(),
            "{name}"
        );
        assert_eq!(
            golden.below("smoothed.grad.").count() > 0,
            case.smoothed,
            "{name}"
        );
        assert_eq!(golden.values("losses").shape, [10], "{name}");
        assert_eq!(
            golden.values("losses").data[0].to_bits(),
            golden.scalar("loss").to_bits(),
            "{name}"
        );
        assert_eq!(
            golden.below("logits.").count(),
            Golden::in_folder(&case.model_folder()).rows().len(),
            "{name}"
        );
    }
}

#[test]
fn a_comparison_passes_what_is_close_enough() {
    let mut comparison = Comparison::new("close");
    comparison.values("tensor", &[1.0, -2.000_1], &[1.000_1, -2.0]);
    comparison.values("zeros", &[0.0], &[0.0]);
    comparison.scalar("scalar", 3.0, 3.0);
    comparison.finish();
}

#[test]
#[should_panic(expected = "far: 4 of 5 differ")]
fn a_comparison_lists_every_difference() {
    let mut comparison = Comparison::new("far");
    comparison.values("same", &[1.0], &[1.0]);
    comparison.values("different", &[1.0, 2.001], &[1.0, 2.0]);
    comparison.values("not a number", &[f32::NAN, 2.0], &[1.0, 2.0]);
    comparison.values("not zero", &[1e-9], &[0.0]);
    comparison.values("shorter", &[1.0], &[1.0, 2.0]);
    comparison.finish();
}

#[test]
#[should_panic(
    expected = "grad.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: not computed"
)]
fn a_comparison_misses_no_tensor() {
    let case = ADAPTERS
        .iter()
        .find(|case| case.name == "q_v")
        .expect("the case is listed");
    let golden = Golden::in_folder(&case.folder());
    let mut comparison = Comparison::new("missing");
    comparison.scalar("loss", golden.scalar("loss"), golden.scalar("loss"));
    comparison.below(&golden, "grad.", |_| None);
    comparison.finish();
}
