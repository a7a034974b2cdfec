//! The backward pass of a tile of queries and a key/value head.

use std::arch::x86_64::{_mm512_loadu_ps, _mm512_permutexvar_epi16, _mm512_storeu_si512};
use std::ops::{Range, RangeFrom};

use super::{
    Cut, KEY_ROWS, KEY_STEPS, PAIR, SCORES, Seen, Sizes, pair_tiles, round_straight, score,
    split_keys, turn_columns, turn_keys, unpack,
};
use crate::cpu::attention::backward::{KEPT_TILES, Task};
use crate::cpu::attention::columns::{Columns, cap_scores_with_slopes};
use crate::cpu::attention::sight::{KeyTile, QueryTile};
use crate::cpu::product::bf16::layout::{SIDE, STEP, TILE};
use crate::cpu::product::bf16::pack::{halves_by_turns, rounded};
use crate::cpu::product::bf16::rounded::{LeftTiles, RightTiles, multiply_rounded};
use crate::cpu::product::bf16::{Unit, with_unit};
use crate::cpu::product::mat::{Mat, MatMut};
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::exp;
use crate::view::View;

/// The gradients of a tile of queries and a key/value head.
pub(in crate::cpu::attention) fn backward(
    task: &Task<'_>,
    tile: &QueryTile<'_>,
    kv_head: usize,
    sum: usize,
) {
    let columns = Columns::new(tile, kv_head, task.shape);
    let sizes = Sizes::new(&columns, task.shape.head_size);
    let mut key_tiles = Vec::new();
    let span = tile.sight.span(&tile.queries);
    tile.sight
        .for_key_steps(span, STEP, |tile| key_tiles.push(tile));
    let kept = key_tiles.len().clamp(1, KEPT_TILES);
    let pairs = sizes.pairs;
    let scores = kept * pairs * SCORES;
    let slopes = task.shape.softcap.map_or(0, |_| scores);
    let tiles = pairs * (2 * (sizes.turned() + sizes.straight()) + SCORES)
        + scores
        + 2 * sizes.keys()
        + sizes.keys_turned()
        + SCORES;
    let numbers = pairs * (sizes.result() + 2 * PAIR) + SCORES + scores + slopes;
    with_scratch(tiles / 2 + numbers, |scratch| {
        let mut cut = Cut(scratch);
        let mut buffers = BackwardBuffers {
            queries: cut.u16s(pairs * sizes.turned()),
            grads: cut.u16s(pairs * sizes.turned()),
            query_rows: cut.u16s(pairs * sizes.straight()),
            grad_rows: cut.u16s(pairs * sizes.straight()),
            weights: cut.u16s(scores),
            score_rows: cut.u16s(pairs * SCORES),
            keys: cut.u16s(sizes.keys()),
            values: cut.u16s(sizes.keys()),
            keys_turned: cut.u16s(sizes.keys_turned()),
            score_columns: cut.u16s(SCORES),
            query_grads: cut.f32s(pairs * sizes.result()),
            lse: cut.f32s(pairs * PAIR),
            delta: cut.f32s(pairs * PAIR),
            scores: cut.f32s(SCORES),
            weight_grads: cut.f32s(scores),
            slopes: cut.f32s(slopes),
        };
        with_unit(|unit| {
            let part = Backward {
                unit,
                task,
                tile,
                kv_head,
                sum,
                columns,
                sizes,
            };
            part.run(&key_tiles, &mut buffers);
        });
    });
}

/// A tile of queries and a key/value head on the way back.
struct Backward<'a> {
    unit: Unit<'a>,
    task: &'a Task<'a>,
    tile: &'a QueryTile<'a>,
    kv_head: usize,
    /// Which sum of dk and dv it adds to.
    sum: usize,
    columns: Columns,
    sizes: Sizes,
}

struct BackwardBuffers<'a> {
    /// scale·q and do as right factors.
    queries: &'a mut [u16],
    grads: &'a mut [u16],
    /// The same as rows of right factors.
    query_rows: &'a mut [u16],
    grad_rows: &'a mut [u16],
    /// p of the tiles of keys that are kept, each a left factor, [keys / 16][pairs] tiles.
    weights: &'a mut [u16],
    /// ds of a tile of keys, likewise.
    score_rows: &'a mut [u16],
    /// A tile of keys and of values as left factors, and the keys turned round.
    keys: &'a mut [u16],
    values: &'a mut [u16],
    keys_turned: &'a mut [u16],
    /// ds of a pair as a right factor, [keys / 32][2] tiles.
    score_columns: &'a mut [u16],
    /// d(scale·q), [pairs][D][32].
    query_grads: &'a mut [f32],
    lse: &'a mut [f32],
    delta: &'a mut [f32],
    /// Scores of a pair.
    scores: &'a mut [f32],
    /// dp of the tiles of keys that are kept, each [pairs][keys][32].
    weight_grads: &'a mut [f32],
    /// The cap's slope at each score, likewise; empty where scores have no cap.
    slopes: &'a mut [f32],
}

impl Backward<'_> {
    fn run(&self, key_tiles: &[KeyTile], buffers: &mut BackwardBuffers<'_>) {
        let Self {
            task,
            tile,
            columns,
            sizes,
            ..
        } = self;
        let (rows, scale) = (tile.rows(), task.shape.scale);
        turn_columns(buffers.queries, columns, *sizes, (task.q, &rows), scale);
        turn_columns(buffers.grads, columns, *sizes, (task.do_, &rows), 1.0);
        round_straight(buffers.query_rows, columns, *sizes, (task.q, &rows), scale);
        round_straight(buffers.grad_rows, columns, *sizes, (task.do_, &rows), 1.0);
        buffers.query_grads.fill(0.0);
        task.pack_lse(&rows, self.kv_head, columns, buffers.lse);
        buffers.delta.fill(0.0);
        // Where not all tiles can be kept until δ is known, they are computed once more.
        let all_kept = key_tiles.len() <= KEPT_TILES;
        let slot = |i: usize| if all_kept { i } else { 0 };
        for (i, keys) in key_tiles.iter().enumerate() {
            let seen = self.seen(keys);
            self.weights(keys, &seen, slot(i), buffers);
            // o = p·v, so dv += pᵀ·do
            let (_, mut dv) = task.key_outputs(keys.rows.clone(), self.kv_head, self.sum);
            let weights = &buffers.weights[slot(i) * sizes.pairs * SCORES..];
            self.add_rows(&mut dv, &seen, weights, buffers.grad_rows);
        }
        let delta = buffers.delta.to_vec();
        for (i, keys) in key_tiles.iter().enumerate() {
            let seen = self.seen(keys);
            if !all_kept {
                self.weights(keys, &seen, slot(i), buffers);
            }
            self.score_gradients(keys, &seen, slot(i), &delta, buffers);
            // s = (scale·q)·kᵀ, so dk += dsᵀ·(scale·q)
            let (mut dk, _) = task.key_outputs(keys.rows.clone(), self.kv_head, self.sum);
            self.add_rows(&mut dk, &seen, buffers.score_rows, buffers.query_rows);
        }
        // The scores were (scale·q)·kᵀ, so dq = scale·ds·k
        buffers.delta.fill(scale);
        let mut dq = task.query_output(rows, self.kv_head);
        unpack(&mut dq, buffers.query_grads, buffers.delta, columns, *sizes);
    }

    /// What each pair sees of a tile of keys.
    fn seen(&self, keys: &KeyTile) -> Vec<Seen> {
        (0..self.sizes.pairs)
            .map(|pair| Seen::new(&self.columns, pair, self.tile, keys))
            .collect()
    }

    /// Where numbers of a pair lie, of the keys that it sees.
    fn scores(&self, slot: usize, pair: usize, seen: &Seen) -> Range<usize> {
        let first = (slot * self.sizes.pairs + pair) * SCORES;
        first + seen.all.start * PAIR..first + seen.all.end * PAIR
    }

    /// The tiles of a pair from the first key on that it sees, of [keys / 16][pairs].
    fn rows_from(&self, slot: usize, pair: usize, seen: &Seen) -> RangeFrom<usize> {
        let row = slot * KEY_ROWS + seen.all.start / SIDE;
        (row * self.sizes.pairs + pair) * TILE..
    }

    /// Rows of k or v of a tile.
    fn block<'v>(&self, view: View<'v>, keys: &KeyTile) -> Mat<'v> {
        let size = self.sizes.head;
        let across = self.kv_head * size..(self.kv_head + 1) * size;
        view.as_mat().block(keys.rows.clone(), across)
    }

    /// p and dp of a tile of keys, for each pair of panels those that it sees, and what they add to δ.
    fn weights(
        &self,
        keys: &KeyTile,
        seen: &[Seen],
        slot: usize,
        buffers: &mut BackwardBuffers<'_>,
    ) {
        let (task, sizes) = (self.task, self.sizes);
        split_keys(buffers.keys, self.block(task.k, keys), sizes);
        split_keys(buffers.values, self.block(task.v, keys), sizes);
        for (pair, seen) in seen.iter().enumerate().filter(|(_, s)| !s.all.is_empty()) {
            let turned = pair * sizes.turned()..(pair + 1) * sizes.turned();
            let part = self.scores(slot, pair, seen);
            // s = (scale·q)·kᵀ
            let right = &buffers.queries[turned.clone()];
            score(
                self.unit,
                buffers.scores,
                &seen.all,
                buffers.keys,
                right,
                sizes,
            );
            // o = p·v, so dp = do·vᵀ
            let grads = &mut buffers.weight_grads[(slot * sizes.pairs + pair) * SCORES..];
            let right = &buffers.grads[turned];
            score(self.unit, grads, &seen.all, buffers.values, right, sizes);
            let scores = &mut buffers.scores[seen.all.start * PAIR..seen.all.end * PAIR];
            if let Some(cap) = task.shape.softcap {
                cap_scores_with_slopes(scores, &mut buffers.slopes[part.clone()], cap);
            }
            seen.mask(scores.as_chunks_mut().0);
            let stats = pair * PAIR..(pair + 1) * PAIR;
            weigh(
                scores,
                &buffers.weight_grads[part],
                &buffers.lse[stats.clone()],
                &mut buffers.delta[stats],
                (
                    &mut buffers.weights[self.rows_from(slot, pair, seen)],
                    sizes.pairs,
                ),
            );
        }
    }

    /// ds of a tile of keys, and what it adds to d(scale·q).
    fn score_gradients(
        &self,
        keys: &KeyTile,
        seen: &[Seen],
        slot: usize,
        delta: &[f32],
        buffers: &mut BackwardBuffers<'_>,
    ) {
        let (task, sizes) = (self.task, self.sizes);
        turn_keys(buffers.keys_turned, self.block(task.k, keys), sizes);
        for (pair, seen) in seen.iter().enumerate().filter(|(_, s)| !s.all.is_empty()) {
            let part = self.scores(slot, pair, seen);
            let steps = seen.steps();
            let columns = &mut buffers.score_columns[..steps.len() * 2 * TILE];
            unweigh(
                &buffers.weights[self.rows_from(slot, pair, seen)],
                &buffers.weight_grads[part.clone()],
                (task.shape.softcap).map(|_| &buffers.slopes[part]),
                &delta[pair * PAIR..][..PAIR],
                (
                    &mut buffers.score_rows[self.rows_from(0, pair, seen)],
                    &mut *columns,
                ),
                sizes.pairs,
            );
            // s = (scale·q)·kᵀ, so d(scale·q) += ds·k
            let left = LeftTiles {
                tiles: &buffers.keys_turned[steps.start * TILE..],
                apart: KEY_STEPS,
                steps: steps.len(),
            };
            let to = &mut buffers.query_grads[pair * sizes.result()..][..sizes.result()];
            let mut to = MatMut::new(to, sizes.down() * SIDE, PAIR);
            multiply_rounded(self.unit, &mut to, true, left, pair_tiles(columns));
        }
    }

    /// Adds to dk or dv of a tile of keys: numbers [keys / 16][pairs] tiles times rows of the columns.
    fn add_rows(&self, to: &mut MatMut<'_>, seen: &[Seen], lefts: &[u16], rights: &[u16]) {
        let (sizes, count) = (self.sizes, to.rows());
        let mut first = 0;
        while first < count {
            // Neighbours see these keys, and the ones up to `end`.
            let sees = |seen: &&Seen| seen.all.contains(&first);
            let before = seen.iter().take_while(|seen| !sees(seen)).count();
            let steps = seen[before..].iter().take_while(sees).count();
            let edges = seen.iter().flat_map(|seen| [seen.all.start, seen.all.end]);
            let end = edges.filter(|edge| *edge > first).min();
            let end = end.unwrap_or(count).min(count);
            if steps > 0 {
                let left = LeftTiles {
                    tiles: &lefts[(first / SIDE * sizes.pairs + before) * TILE..],
                    apart: sizes.pairs,
                    steps,
                };
                let right = RightTiles {
                    tiles: &rights[before * sizes.straight()..],
                    apart: sizes.down(),
                };
                let mut to = to.window(first..end, 0..sizes.head);
                multiply_rounded(self.unit, &mut to, true, left, right);
            }
            first = end;
        }
    }
}

/// p = exp(s - lse) as rows of a left factor, whose tiles of 16 keys lie `apart` tiles from each other, and δ += Σ p · dp; scores and dp
/// [keys][32].
fn weigh(
    scores: &[f32],
    grads: &[f32],
    lse: &[f32],
    delta: &mut [f32],
    (to, apart): (&mut [u16], usize),
) {
    let keys = scores.len() / PAIR;
    assert!(grads.len() == scores.len() && keys.is_multiple_of(SIDE));
    assert!(((keys / SIDE).max(1) - 1) * apart * TILE + TILE <= to.len());
    wide!(weigh_wide(
        scores.as_chunks().0,
        grads.as_chunks().0,
        lse,
        delta,
        (to.as_mut_ptr(), apart),
    ));
}

/// # Safety
/// The processor has AVX-512 F and BF16; tiles for all keys can be written.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn weigh_wide(
    scores: &[[f32; PAIR]],
    grads: &[[f32; PAIR]],
    lse: &[f32],
    delta: &mut [f32],
    (to, apart): (*mut u16, usize),
) {
    let (mut base, mut sums) = ([0.0; PAIR], [0.0; PAIR]);
    base.copy_from_slice(lse);
    for (key, (scores, grads)) in scores.iter().zip(grads).enumerate() {
        let mut weights = [0.0; PAIR];
        for j in 0..PAIR {
            weights[j] = exp(scores[j] - base[j]);
            sums[j] += weights[j] * grads[j];
        }
        // SAFETY: by the contract of this function.
        unsafe {
            let to = to.add(key / SIDE * apart * TILE + key % SIDE * STEP);
            store_rounded(to, &weights);
        }
    }
    for (delta, sum) in delta.iter_mut().zip(sums) {
        *delta += sum;
    }
}

/// ds = p · (dp - δ), times the slopes where there are some, as rows of a left factor and as a right factor [keys / 32][2] tiles. p and the
/// rows lie as [`weigh`] puts them.
fn unweigh(
    weights: &[u16],
    grads: &[f32],
    slopes: Option<&[f32]>,
    delta: &[f32],
    (rows, columns): (&mut [u16], &mut [u16]),
    apart: usize,
) {
    let keys = grads.len() / PAIR;
    let tiles = ((keys / SIDE).max(1) - 1) * apart * TILE + TILE;
    assert!(keys.is_multiple_of(STEP) && columns.len() >= keys / STEP * 2 * TILE);
    assert!(weights.len() >= tiles && rows.len() >= tiles);
    assert!(slopes.is_none_or(|slopes| slopes.len() == grads.len()));
    wide!(unweigh_wide(
        weights.as_ptr(),
        grads.as_chunks().0,
        slopes.map(|slopes| slopes.as_chunks().0),
        delta,
        (rows.as_mut_ptr(), columns.as_mut_ptr()),
        apart,
    ));
}

/// # Safety
/// The processor has AVX-512 F, BW and BF16; tiles of all keys can be read and written.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn unweigh_wide(
    weights: *const u16,
    grads: &[[f32; PAIR]],
    slopes: Option<&[[f32; PAIR]]>,
    delta: &[f32],
    (rows, columns): (*mut u16, *mut u16),
    apart: usize,
) {
    let mut deltas = [0.0; PAIR];
    deltas.copy_from_slice(delta);
    let mut both = [[0.0; PAIR]; 2];
    for (key, grads) in grads.iter().enumerate() {
        let at = key / SIDE * apart * TILE + key % SIDE * STEP;
        // SAFETY: by the contract of this function; any bits are numbers.
        let weights = unsafe { weights.add(at).cast::<[u16; PAIR]>().read_unaligned() };
        let scores = &mut both[key % 2];
        for j in 0..PAIR {
            scores[j] = f32::from_bits(u32::from(weights[j]) << 16) * (grads[j] - deltas[j]);
        }
        if let Some(slopes) = slopes {
            for j in 0..PAIR {
                scores[j] *= slopes[key][j];
            }
        }
        // SAFETY: by the contract of this function.
        unsafe {
            store_rounded(rows.add(at), scores);
            if key % 2 == 1 {
                let to = columns.add(key / STEP * 2 * TILE + key % STEP / 2 * STEP);
                for half in 0..2 {
                    let [low, high] =
                        [0, 1].map(|i| _mm512_loadu_ps(both[i].as_ptr().add(half * SIDE)));
                    let turns = _mm512_permutexvar_epi16(halves_by_turns(), rounded(low, high));
                    _mm512_storeu_si512(to.add(half * TILE).cast(), turns);
                }
            }
        }
    }
}

/// Writes 32 numbers, rounded.
///
/// # Safety
/// The processor has AVX-512 F and BF16; 32 numbers can be written.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn store_rounded(to: *mut u16, from: &[f32; PAIR]) {
    // SAFETY: by the contract of this function.
    unsafe {
        let low = _mm512_loadu_ps(from.as_ptr());
        let high = _mm512_loadu_ps(from.as_ptr().add(SIDE));
        _mm512_storeu_si512(to.cast(), rounded(low, high));
    }
}
