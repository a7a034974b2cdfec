//! The pieces that a micro-batch is computed in.
//!
//! The gradients of a micro-batch are sums over its rows, so it may be cut between rows: a piece goes forward and back before the next one
//! begins, and what blocks keep is kept of one piece. Where there are threads and memory for several, teams of threads compute them beside
//! each other. How a micro-batch is cut depends on its rows and on what is trained alone.

use lowrank_kernels::team_count;

use crate::data::Example;
use crate::data::batches::prompt_groups;
use crate::model::{Adapter, Batch, ModelConfig};

/// The rows of each piece. With `share_prompts`, rows that have the same prompt stay together.
pub(super) fn pieces<'e>(
    model: &ModelConfig,
    adapter: &Adapter,
    rows: &[&'e Example],
    share_prompts: bool,
) -> Vec<Vec<&'e Example>> {
    let units: Vec<Vec<usize>> = if share_prompts {
        prompt_groups(rows.iter().copied())
    } else {
        (0..rows.len()).map(|row| vec![row]).collect()
    };
    let virtual_tokens = adapter.virtual_tokens();
    let own = virtual_tokens.prefix + virtual_tokens.infix;
    let tokens_of = |unit: &Vec<usize>| {
        let all: usize = unit.iter().map(|&row| rows[row].ids.len() + own).sum();
        let again = (unit.len() - 1) * rows[unit[0]].prompt().len();
        all.saturating_sub(again)
    };
    let tokens: Vec<usize> = units.iter().map(tokens_of).collect();
    let total: usize = tokens.iter().sum();
    let count = Batch::pieces(model, adapter.parameters(), total);
    if count == 1 {
        return vec![rows.to_vec()];
    }
    let mut pieces = vec![Vec::new(); count];
    let mut before = 0;
    for (unit, tokens) in units.iter().zip(tokens) {
        // The piece in which the middle of the unit lies.
        let piece = (2 * before + tokens) * count / (2 * total);
        pieces[piece.min(count - 1)].extend(unit.iter().map(|&row| rows[row]));
        before += tokens;
    }
    pieces.retain(|piece| !piece.is_empty());
    pieces
}

/// Teams of threads that compute so many pieces, where memory allows it: one where a gradient is large.
pub(crate) fn teams(model: &ModelConfig, adapter: &Adapter, pieces: usize) -> usize {
    if Batch::go_side_by_side(model, adapter.parameters()) {
        team_count(pieces)
    } else {
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::presets;
    use crate::settings::TrainConfig;
    use crate::tuning::Method;

    fn row(prompt: u32, length: usize) -> Example {
        Example {
            ids: vec![prompt; length],
            prompt_len: 4.min(length),
            ..Example::default()
        }
    }

    fn cut(method: Method, rows: &[Example], share: bool) -> Vec<Vec<usize>> {
        let model = presets::config("smollm2-135m").unwrap();
        let adapter = TrainConfig::new(method, "m", "", "").lay_out(&model);
        let rows: Vec<&Example> = rows.iter().collect();
        let pieces = pieces(&model, &adapter.unwrap(), &rows, share);
        let lengths = |piece: Vec<&Example>| piece.iter().map(|row| row.ids.len()).collect();
        pieces.into_iter().map(lengths).collect()
    }

    #[test]
    fn pieces_are_a_power_of_two_of_about_the_same_size() {
        let rows = |lengths: &[usize]| -> Vec<Example> {
            lengths.iter().map(|&length| row(1, length)).collect()
        };
        let lora = |lengths: &[usize]| cut(Method::Lora, &rows(lengths), false);
        assert_eq!(lora(&[]), [[0; 0]; 1]);
        assert_eq!(lora(&[100, 156]), [[100, 156]]);
        assert_eq!(lora(&[100, 157]), [[100], [157]]);
        assert_eq!(lora(&[256; 4]), [[256, 256], [256, 256]]);
        assert_eq!(lora(&[1024; 2]), [[1024], [1024]]);
        assert_eq!(lora(&[3000]), [[3000]]);
        assert_eq!(lora(&[55; 128]).len(), 16);
        assert!(lora(&[55; 128]).iter().all(|piece| piece.len() == 8));
        // Another gradient of every weight would take more than what the blocks keep.
        assert_eq!(cut(Method::Full, &rows(&[256; 4]), false).len(), 1);
    }

    #[test]
    fn full_training_has_one_gradient_at_a_time() {
        let model = presets::config("smollm2-135m").unwrap();
        let laid_out = |method| {
            let train = TrainConfig::new(method, "m", "", "");
            train.lay_out(&model).unwrap()
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(8).build();
        pool.unwrap().install(|| {
            assert_eq!(teams(&model, &laid_out(Method::Lora), 16), 4);
            assert_eq!(teams(&model, &laid_out(Method::Full), 16), 1);
        });
    }

    #[test]
    fn rows_of_one_prompt_stay_together() {
        let rows: Vec<Example> = (0..6).map(|i| row(i % 2, 100 + i as usize)).collect();
        let pieces = cut(Method::Lora, &rows, true);
        assert_eq!(pieces, [[100, 102, 104], [101, 103, 105]]);
    }
}
