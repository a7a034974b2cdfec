use std::ops::Range;

use lowrank_kernels::{
    Dropout, LowRank, RowClasses, Tensor, Workspace, low_rank_backward_hidden,
    low_rank_backward_input, low_rank_backward_weights, low_rank_forward, reference,
};

use crate::common::{assert_close, check_gradient, dot, random, same_bits_on_any_threads, wide};

struct Case {
    tokens: usize,
    rows: Range<usize>,
    inputs: usize,
    outputs: usize,
    rank: usize,
    offset: usize,
    dropout: Option<Dropout>,
}

const DROPOUT: Option<Dropout> = Some(Dropout { p: 0.25, key: 77 });
const SCALE: f32 = 1.75;

fn case(
    (tokens, rows): (usize, Range<usize>),
    (inputs, outputs): (usize, usize),
    rank: usize,
    offset: usize,
    dropout: Option<Dropout>,
) -> Case {
    Case {
        tokens,
        rows,
        inputs,
        outputs,
        rank,
        offset,
        dropout,
    }
}

fn cases() -> Vec<Case> {
    vec![
        case((1, 0..1), (1, 1), 1, 0, None),
        case((1, 0..1), (70, 33), 8, 5, None),
        case((3, 1..3), (130, 65), 4, 0, DROPOUT),
        case((67, 0..67), (65, 130), 3, 0, None),
        case((140, 5..137), (66, 40), 8, 7, DROPOUT),
        case((530, 2..529), (21, 19), 16, 0, DROPOUT),
        case((66, 0..66), (40, 24), 64, 1, None),
    ]
}

struct Values {
    x: Tensor,
    a: Tensor,
    b: Tensor,
    dy: Tensor,
    base: Tensor,
}

impl Values {
    fn of(case: &Case) -> Self {
        let out = case.offset + case.outputs + 2;
        Self {
            x: random(case.tokens, case.inputs, 1),
            a: random(case.rank, case.inputs, 2),
            b: random(case.outputs, case.rank, 3),
            dy: random(case.tokens, out, 4),
            base: random(case.tokens, out, 5),
        }
    }

    fn branch(&self, case: &Case) -> LowRank<'_> {
        LowRank {
            a: self.a.view(),
            b: self.b.view(),
            scale: SCALE,
            out_offset: case.offset,
            dropout: case.dropout,
        }
    }

    fn forward(&self, case: &Case) -> (Tensor, Tensor) {
        self.forward_of(case, RowClasses::PROMPT)
    }

    fn forward_of(&self, case: &Case, classes: RowClasses) -> (Tensor, Tensor) {
        let mut y = self.base.clone();
        let mut u = random(case.rows.len(), case.rank, 6);
        low_rank_forward(
            y.view_mut(),
            u.view_mut(),
            self.x.view(),
            case.rows.clone(),
            &self.branch(case),
            classes,
            &Workspace::new(),
        );
        (y, u)
    }

    /// dx, da and db.
    fn backward(&self, case: &Case, u: &Tensor) -> [Tensor; 3] {
        let mut dx = Tensor::zeros(case.tokens, case.inputs);
        let mut da = Tensor::zeros(case.rank, case.inputs);
        let mut db = Tensor::zeros(case.outputs, case.rank);
        let (rows, branch) = (case.rows.clone(), self.branch(case));
        let (dy, x) = (self.dy.view(), self.x.view());
        let mut du = random(case.rows.len(), case.rank, 7);
        low_rank_backward_hidden(du.view_mut(), dy, rows.clone(), &branch);
        low_rank_backward_input(dx.view_mut(), du.view(), rows.clone(), &branch);
        let (da_out, db_out) = (da.view_mut(), db.view_mut());
        let saved = (u.view(), du.view());
        low_rank_backward_weights(da_out, db_out, dy, x, saved, rows, &branch);
        [dx, da, db]
    }
}

/// The whole output, with the branch added to the base where it belongs.
fn expected(case: &Case, base: &[f64], x: &[f64], a: &[f64], b: &[f64]) -> Vec<f64> {
    let width = base.len() / case.tokens;
    let rows = case.rows.start * case.inputs..case.rows.end * case.inputs;
    let scale = f64::from(SCALE);
    let branch = reference::low_rank(
        &x[rows],
        a,
        b,
        case.rank,
        scale,
        case.dropout,
        case.rows.start,
    );
    let mut y = base.to_vec();
    for (i, row) in branch.chunks_exact(case.outputs).enumerate() {
        for (j, x) in row.iter().enumerate() {
            y[(case.rows.start + i) * width + case.offset + j] += x;
        }
    }
    y
}

#[test]
fn forward_is_the_reference_and_touches_nothing_else() {
    for case in cases() {
        let values = Values::of(&case);
        let expected = expected(
            &case,
            &wide(&values.base),
            &wide(&values.x),
            &wide(&values.a),
            &wide(&values.b),
        );
        for first_generated in [0, case.tokens / 2, case.tokens] {
            if case.dropout.is_some() && first_generated < case.rows.end {
                continue; // Generated rows drop nothing.
            }
            let classes = RowClasses::generated_from(first_generated);
            let (y, _) = values.forward_of(&case, classes);
            assert_close(&format!("rank {}", case.rank), &y, &expected, 3e-6);
            let (y, base) = (y.to_vec(), values.base.to_vec());
            let width = values.base.cols();
            for i in 0..y.len() {
                let (row, column) = (i / width, i % width);
                let columns = case.offset..case.offset + case.outputs;
                if !case.rows.contains(&row) || !columns.contains(&column) {
                    assert_eq!(
                        y[i].to_bits(),
                        base[i].to_bits(),
                        "row {row} column {column}"
                    );
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "dropout is for training")]
fn generated_rows_drop_nothing() {
    let case = case((3, 1..3), (20, 10), 4, 0, DROPOUT);
    Values::of(&case).forward_of(&case, RowClasses::generated_from(2));
}

#[test]
fn gradients_are_finite_differences() {
    for case in cases() {
        let values = Values::of(&case);
        let (_, u) = values.forward(&case);
        let [dx, da, db] = values.backward(&case, &u);
        let (base, x, a, b) = (
            wide(&values.base),
            wide(&values.x),
            wide(&values.a),
            wide(&values.b),
        );
        let g = wide(&values.dy);
        let loss = |x: &[f64], a: &[f64], b: &[f64]| dot(&g, &expected(&case, &base, x, a, b));
        let name = format!("{} tokens, rank {}", case.tokens, case.rank);
        check_gradient(&format!("dx {name}"), &values.x, &dx, 1e-5, |x| {
            loss(x, &a, &b)
        });
        check_gradient(&format!("da {name}"), &values.a, &da, 1e-5, |a| {
            loss(&x, a, &b)
        });
        check_gradient(&format!("db {name}"), &values.b, &db, 1e-5, |b| {
            loss(&x, &a, b)
        });
    }
}

#[test]
fn gradients_accumulate_and_each_is_optional() {
    for case in cases() {
        let values = Values::of(&case);
        let (_, u) = values.forward(&case);
        let [dx, da, db] = values.backward(&case, &u);
        let (mut dx2, mut da2, mut db2) = (dx.clone(), da.clone(), db.clone());
        let lr = values.branch(&case);
        let (dy, x, rows) = (values.dy.view(), values.x.view(), case.rows.clone());
        let mut du = random(case.rows.len(), case.rank, 8);
        low_rank_backward_hidden(du.view_mut(), dy, rows.clone(), &lr);
        low_rank_backward_input(dx2.view_mut(), du.view(), rows.clone(), &lr);
        let (da_out, db_out) = (da2.view_mut(), db2.view_mut());
        low_rank_backward_weights(da_out, db_out, dy, x, (u.view(), du.view()), rows, &lr);
        for (once, twice) in [(&dx, &dx2), (&da, &da2), (&db, &db2)] {
            let doubled: Vec<f64> = wide(once).iter().map(|x| 2.0 * x).collect();
            assert_close("twice the gradient", twice, &doubled, 1e-6);
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    for case in cases() {
        let values = Values::of(&case);
        same_bits_on_any_threads(|| {
            let (y, u) = values.forward(&case);
            let [dx, da, db] = values.backward(&case, &u);
            vec![y, u, dx, da, db]
        });
    }
}

#[test]
fn dropout_keeps_the_right_share_and_always_the_same_one() {
    let dropout = Dropout { p: 0.3, key: 5 };
    let factors: Vec<f32> = (0..200)
        .flat_map(|row| (0..200).map(move |col| dropout.factor(row, col)))
        .collect();
    let dropped = factors.iter().filter(|&&factor| factor == 0.0).count();
    // 40,000 draws: five standard deviations are 0.0115.
    let share = dropped as f64 / factors.len() as f64;
    assert!((share - 0.3).abs() < 0.0115, "{share} were dropped");
    let kept = 1.0 / (1.0 - 0.3_f32);
    assert!(
        factors
            .iter()
            .all(|&factor| factor == 0.0 || factor == kept)
    );
    let again = (0..200).flat_map(|row| (0..200).map(move |col| dropout.factor(row, col)));
    assert!(factors.iter().copied().eq(again));
    let other = Dropout { key: 6, ..dropout };
    assert!((0..200).any(|col| other.factor(0, col) != dropout.factor(0, col)));
    assert!((0..200).any(|col| dropout.factor(1, col) != dropout.factor(0, col)));
}
