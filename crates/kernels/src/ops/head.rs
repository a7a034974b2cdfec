//! The output head and the losses on it: logits = h·Wᵀ for hidden rows h [n, C] and V tokens.
//!
//! Rows are taken in chunks, so a T×V matrix never exists. dh overwrites; dW accumulates.
//!
//! Some rows of W may be others for some of the hidden rows ([`OwnRows`]): logits[:, ids] = h·Rᵀ in place of W's. W's rows of these
//! tokens then do nothing, and get no gradient.
//!
//! Logits may be divided and capped ([`LogitScaling`]).
//!
//! The loss of a row with target t, following Hugging Face's label smoothing ε, is
//! (1 - ε) · (lse - logit_t) + ε · (lse - mean(logit)).

use std::ops::Range;

use crate::cpu;
use crate::cpu::head::Replacement;
use crate::cpu::product::term::Left;
use crate::ops::linear::{
    linear_backward_input, linear_backward_left, linear_backward_weight, linear_forward_as,
};
use crate::profile::op;
use crate::types::classes::RowClasses;
use crate::types::compute::ComputeDType;
use crate::types::head::{CrossEntropy, HeadWeight, LogitScaling, OwnRows};
use crate::types::linear::{Layout, Weight};
use crate::types::pauses::Pauses;
use crate::view::{View, ViewMut};
use crate::workspace::Workspace;

/// Numbers of a chunk of logits, at most, unless that is less than a few rows: 40 MiB. Each chunk reads the whole table twice.
const CHUNK: usize = 10 * 1024 * 1024;
/// Rows of a chunk, at least and at most. Fewer would widen a bf16 table too often; more gain
/// nothing.
const CHUNK_ROWS: Range<usize> = 32..256;
/// Rows of a chunk at most where there are pauses between chunks.
const ROWS_BETWEEN_PAUSES: usize = 8;

/// logits = h·Wᵀ, scaled, overwritten; logits [n, V], h [n, C], whose rows are of these classes.
///
/// # Panics
/// If the shapes do not match.
pub fn head_logits(
    logits: ViewMut<'_>,
    h: View<'_>,
    w: Weight<'_>,
    scaling: LogitScaling,
    classes: RowClasses,
) {
    logits_of(logits, h, w, scaling, classes, ComputeDType::F32);
}

fn logits_of(
    mut logits: ViewMut<'_>,
    h: View<'_>,
    w: Weight<'_>,
    scaling: LogitScaling,
    classes: RowClasses,
    compute: ComputeDType,
) {
    linear_forward_as(logits.reborrow(), h, w, None, classes, compute);
    if scaling != LogitScaling::NONE {
        cpu::head::scale_logits(logits, scaling);
    }
}

/// The logits of tokens with rows of their own, in place of what [`head_logits`] wrote for them; logits [n, V], h [n, C].
///
/// A row's bits are those that it has alone, among rows of its class.
///
/// # Panics
/// If the shapes do not match, or rows or ids are not among the logits.
pub fn head_own_logits(
    mut logits: ViewMut<'_>,
    h: View<'_>,
    own: &[OwnRows<'_>],
    scaling: LogitScaling,
    classes: RowClasses,
    ws: &Workspace,
) {
    check_own(own, h.rows(), h.cols(), logits.cols());
    for own in own.iter().filter(|own| !own.rows.is_empty()) {
        let h = h.slice_rows(own.rows.clone());
        let mut part = ws.take(h.rows(), own.ids.len());
        let w = own.weight();
        head_logits(part.view_mut(), h, w, scaling, classes.skip(own.rows.start));
        let rows = logits.reborrow().slice_rows(own.rows.clone());
        cpu::head::set_columns(rows, own.ids, part.view());
        ws.give(part);
    }
}

impl<'a> OwnRows<'a> {
    fn weight(&self) -> Weight<'a> {
        Weight {
            view: self.values,
            layout: Layout::OutIn,
        }
    }

    /// What of it is within some of the hidden rows, counted from the first of them.
    fn within(&self, rows: &Range<usize>) -> Option<Self> {
        let start = self.rows.start.max(rows.start);
        let end = self.rows.end.min(rows.end);
        (start < end).then(|| Self {
            rows: start - rows.start..end - rows.start,
            ..self.clone()
        })
    }
}

fn check_own(own: &[OwnRows<'_>], rows: usize, hidden: usize, vocabulary: usize) {
    for own in own {
        own.values
            .assert_shape("a head's own rows", own.ids.len(), hidden);
        assert!(own.rows.end <= rows, "a head's own rows and hidden rows");
        let past = own.ids.iter().find(|id| **id as usize >= vocabulary);
        assert!(
            past.is_none(),
            "a head's own rows and its vocabulary of {vocabulary}"
        );
    }
}

/// For each row the logarithm of the target's probability, the log-sum-exp, the mean logit, and
/// whether the target has the largest logit; all overwritten.
///
/// h [n, C]; all slices hold n elements.
///
/// # Panics
/// If the shapes do not match or a target is not below V.
pub fn head_log_probs<'a>(
    log_prob: &mut [f64],
    lse: &mut [f64],
    mean_logit: &mut [f64],
    correct: &mut [bool],
    h: View<'_>,
    w: impl Into<HeadWeight<'a>>,
    scaling: LogitScaling,
    targets: &[u32],
    ws: &Workspace,
) {
    let (_op, w) = (op("cross-entropy", || 0.0), w.into());
    check(h, w, targets);
    let n = h.rows();
    assert_eq!(log_prob.len(), n, "log probabilities and rows");
    assert_eq!(lse.len(), n, "log-sum-exps and rows");
    assert_eq!(mean_logit.len(), n, "mean logits and rows");
    assert_eq!(correct.len(), n, "correct flags and rows");
    let step = head_chunk_rows(w.weight.outputs(), h.rows());
    let chunks = Chunks {
        h,
        w,
        scaling,
        compute: ComputeDType::F32,
        gradients: false,
        step,
    };
    chunks.for_each(ws, |rows, logits, _| {
        cpu::head::log_probs(
            logits.as_view(),
            &targets[rows.clone()],
            &mut log_prob[rows.clone()],
            &mut lse[rows.clone()],
            &mut mean_logit[rows.clone()],
            &mut correct[rows],
        );
    });
}

/// The gradient of Σ over rows of coef · loss; dh [n, C] is overwritten, dw (in w's layout) added to. Where the head has rows of its
/// own, dw is of these.
///
/// h [n, C], lse as [`head_log_probs`] gave it. The logits are computed again, as they are; `compute` is that of the gradients.
///
/// # Panics
/// If the shapes do not match or a target is not below V.
pub fn head_backward<'a>(
    dh: ViewMut<'_>,
    dw: Option<ViewMut<'_>>,
    h: View<'_>,
    w: impl Into<HeadWeight<'a>>,
    scaling: LogitScaling,
    targets: &[u32],
    lse: &[f64],
    coef: &[f32],
    label_smoothing: f32,
    compute: ComputeDType,
    ws: &Workspace,
) {
    let (_op, w) = (op("cross-entropy", || 0.0), w.into());
    check(h, w, targets);
    assert_eq!(lse.len(), h.rows(), "log-sum-exps and rows");
    assert_eq!(coef.len(), h.rows(), "coefficients and rows");
    let mut grads = Gradients {
        dh: Some(dh),
        dw,
        h,
        w,
        scaling,
        compute,
        ws,
    };
    grads.check();
    let step = head_chunk_rows(w.weight.outputs(), h.rows());
    let chunks = Chunks {
        h,
        w,
        scaling,
        compute: ComputeDType::F32,
        gradients: true,
        step,
    };
    chunks.for_each(ws, |rows, mut logits, kept| {
        let (targets, lse, coef) = (
            &targets[rows.clone()],
            &lse[rows.clone()],
            &coef[rows.clone()],
        );
        cpu::head::loss_gradients(logits.reborrow(), targets, lse, coef, label_smoothing);
        grads.add(rows, logits, kept);
    });
}

/// The sum of the losses of all rows and its gradient in one pass.
///
/// dh [n, C] is overwritten, dw (in w's layout) added to; h [n, C]. Where the head has rows of its own, dw is of these. `compute` is that
/// of the products, but [`ComputeDType::Bf16x2`] that of the gradients alone. There are `pauses` before and behind each product; chunks are
/// smaller then.
///
/// # Panics
/// If the shapes do not match or a target is not below V.
pub fn cross_entropy_forward_backward<'a>(
    dh: Option<ViewMut<'_>>,
    dw: Option<ViewMut<'_>>,
    h: View<'_>,
    w: impl Into<HeadWeight<'a>>,
    scaling: LogitScaling,
    targets: &[u32],
    label_smoothing: f32,
    compute: ComputeDType,
    pauses: Pauses<'_>,
    ws: &Workspace,
) -> CrossEntropy {
    let (_op, w) = (op("cross-entropy", || 0.0), w.into());
    check(h, w, targets);
    let mut grads = Gradients {
        dh,
        dw,
        h,
        w,
        scaling,
        compute,
        ws,
    };
    grads.check();
    let by = grads.replacement();
    let mut total = CrossEntropy {
        loss_sum: 0.0,
        correct: 0,
    };
    let mut step = head_chunk_rows(w.weight.outputs(), h.rows());
    // A row's loss and the gradient of a hidden row have the same bits in any chunk. dW is a sum over rows, and has not.
    if pauses.are_used() && grads.dw.is_none() {
        step = step.min(ROWS_BETWEEN_PAUSES);
    }
    pauses.pause();
    let chunks = Chunks {
        h,
        w,
        scaling,
        compute: match compute {
            ComputeDType::Bf16 => compute,
            ComputeDType::Bf16x2 | ComputeDType::F32 => ComputeDType::F32,
        },
        gradients: by != Replacement::Anything,
        step,
    };
    chunks.for_each(ws, |rows, mut logits, kept| {
        pauses.pause();
        let targets = &targets[rows.clone()];
        let results = cpu::head::losses(logits.reborrow(), targets, label_smoothing, by);
        // In the order of the rows, whatever thread computed them.
        for (loss, correct) in results {
            total.loss_sum += loss;
            total.correct += usize::from(correct);
        }
        if by == Replacement::RoundedGradients {
            grads.set_rounded(rows, logits.as_view());
        } else {
            grads.add(rows, logits, kept);
        }
        pauses.pause();
    });
    total
}

fn check(h: View<'_>, w: HeadWeight<'_>, targets: &[u32]) {
    let HeadWeight { weight: w, own } = w;
    check_own(own, h.rows(), h.cols(), w.outputs());
    assert_eq!(h.cols(), w.inputs(), "hidden size and inputs of the head");
    assert_eq!(targets.len(), h.rows(), "targets and rows");
    if let Some(largest) = targets.iter().max() {
        assert!(
            (*largest as usize) < w.outputs(),
            "target {largest} is past the vocabulary of {}",
            w.outputs()
        );
    }
}

/// Rows of `rows` whose logits exist at the same time, at most: chunks are about equally large.
pub fn head_chunk_rows(vocabulary: usize, rows: usize) -> usize {
    let most = (CHUNK / vocabulary.max(1)).clamp(CHUNK_ROWS.start, CHUNK_ROWS.end);
    rows.div_ceil(rows.div_ceil(most).max(1))
}

/// Logits of hidden rows, some rows at a time.
struct Chunks<'a> {
    h: View<'a>,
    w: HeadWeight<'a>,
    scaling: LogitScaling,
    /// How the factors of the logits are read.
    compute: ComputeDType,
    /// Whether their gradients are wanted.
    gradients: bool,
    /// Rows of a chunk.
    step: usize,
}

impl Chunks<'_> {
    /// Calls `work` with the logits of one chunk after the other, and where their gradients go back through a cap with a second copy of them.
    fn for_each(
        self,
        ws: &Workspace,
        mut work: impl FnMut(Range<usize>, ViewMut<'_>, Option<View<'_>>),
    ) {
        let Self { h, w, scaling, .. } = self;
        let vocabulary = w.weight.outputs();
        let step = self.step.min(h.rows());
        if step == 0 {
            return;
        }
        let mut buffer = ws.take(step, vocabulary);
        let mut kept =
            (self.gradients && scaling.softcap.is_some()).then(|| ws.take(step, vocabulary));
        for start in (0..h.rows()).step_by(step) {
            let rows = start..(start + step).min(h.rows());
            let mut logits = buffer.view_mut().slice_rows(0..rows.len());
            let h = h.slice_rows(rows.clone());
            let classes = RowClasses::PROMPT;
            logits_of(
                logits.reborrow(),
                h,
                w.weight,
                scaling,
                classes,
                self.compute,
            );
            let own: Vec<_> = w.own.iter().filter_map(|own| own.within(&rows)).collect();
            head_own_logits(logits.reborrow(), h, &own, scaling, classes, ws);
            let copy = kept.as_mut().map(|kept| {
                let mut copy = kept.view_mut().slice_rows(0..rows.len());
                copy.copy_from(logits.as_view());
                kept.view().slice_rows(0..rows.len())
            });
            work(rows, logits, copy);
        }
        ws.give(buffer);
        if let Some(kept) = kept {
            ws.give(kept);
        }
    }
}

/// Where the gradients of a chunk's logits go.
struct Gradients<'a> {
    dh: Option<ViewMut<'a>>,
    dw: Option<ViewMut<'a>>,
    h: View<'a>,
    w: HeadWeight<'a>,
    scaling: LogitScaling,
    compute: ComputeDType,
    ws: &'a Workspace,
}

impl Gradients<'_> {
    fn check(&self) {
        if let Some(dh) = &self.dh {
            dh.assert_shape(
                "the gradient of the hidden rows",
                self.h.rows(),
                self.h.cols(),
            );
        }
        if let Some(dw) = &self.dw {
            for of in self.trained() {
                dw.assert_shape("the gradient of the head", of.rows(), of.cols());
            }
        }
    }

    /// What `dw` is the gradient of.
    fn trained(&self) -> Vec<View<'_>> {
        match self.w.own {
            [] => vec![self.w.weight.view],
            own => own.iter().map(|own| own.values).collect(),
        }
    }

    /// What logits are replaced by.
    fn replacement(&self) -> Replacement {
        match (&self.dh, &self.dw) {
            (None, None) => Replacement::Anything,
            // A product rounds them anyway, and nothing else reads them.
            (Some(_), None)
                if self.compute.rounds_here()
                    && self.scaling == LogitScaling::NONE
                    && self.w.own.is_empty() =>
            {
                Replacement::RoundedGradients
            }
            _ => Replacement::Gradients,
        }
    }

    /// The gradient of some hidden rows from those of their logits in bf16.
    fn set_rounded(&mut self, rows: Range<usize>, dlogits: View<'_>) {
        if let Some(dh) = &mut self.dh {
            let dh = dh.reborrow().slice_rows(rows);
            let dlogits = Left::Narrow(cpu::head::rounded_gradients(dlogits));
            linear_backward_left(dh, dlogits, self.w.weight, false, self.compute);
        }
    }

    /// `logits` are those whose gradients these are, where they have a cap.
    fn add(&mut self, rows: Range<usize>, mut dlogits: ViewMut<'_>, logits: Option<View<'_>>) {
        if self.dh.is_none() && self.dw.is_none() {
            return;
        }
        if self.scaling != LogitScaling::NONE {
            cpu::head::scale_gradients(dlogits.reborrow(), logits, self.scaling);
        }
        // logits = h·Wᵀ, so dh = dlogits·W and dW += dlogitsᵀ·h; for the tokens of own rows R the same with R in place of W.
        let own: Vec<_> = self
            .w
            .own
            .iter()
            .filter_map(|own| own.within(&rows))
            .collect();
        let taken: Vec<_> = own
            .iter()
            .map(|own| {
                let mut part = self.ws.take(own.rows.len(), own.ids.len());
                let from = dlogits.reborrow().slice_rows(own.rows.clone());
                cpu::head::take_columns(part.view_mut(), from, own.ids);
                part
            })
            .collect();
        let dlogits = dlogits.as_view();
        if let Some(dh) = &mut self.dh {
            let mut dh = dh.reborrow().slice_rows(rows.clone());
            linear_backward_input(dh.reborrow(), dlogits, self.w.weight, false, self.compute);
            for (own, part) in own.iter().zip(&taken) {
                let dh = dh.reborrow().slice_rows(own.rows.clone());
                linear_backward_input(dh, part.view(), own.weight(), true, self.compute);
            }
        }
        if let Some(dw) = &mut self.dw {
            let h = self.h.slice_rows(rows);
            if self.w.own.is_empty() {
                let (dw, layout) = (dw.reborrow(), self.w.weight.layout);
                linear_backward_weight(dw, dlogits, h, layout, self.compute);
            }
            for (own, part) in own.iter().zip(&taken) {
                let (dw, h) = (dw.reborrow(), h.slice_rows(own.rows.clone()));
                linear_backward_weight(dw, part.view(), h, Layout::OutIn, self.compute);
            }
        }
        for part in taken {
            self.ws.give(part);
        }
    }
}
