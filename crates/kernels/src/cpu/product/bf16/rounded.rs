//! Products of factors that lie in tiles already.

use super::ahead::Ahead;
use super::layout::{Parts, Run, SIDE, TILE, TILE_ROW};
use super::{Unit, panels, sum_window};
use crate::cpu::product::mat::MatMut;

/// A left factor that is rounded: for each 16 rows `steps` tiles one after the other, which begin `apart` tiles from the next ones.
#[derive(Clone, Copy)]
pub(crate) struct LeftTiles<'a> {
    pub(crate) tiles: &'a [u16],
    pub(crate) apart: usize,
    pub(crate) steps: usize,
}

/// A right factor that is rounded: for each step its tiles of columns one after the other, which begin `apart` tiles from the next ones.
#[derive(Clone, Copy)]
pub(crate) struct RightTiles<'a> {
    pub(crate) tiles: &'a [u16],
    pub(crate) apart: usize,
}

/// out (+)= left · right.
///
/// # Panics
/// If the tiles do not suffice.
pub(crate) fn multiply_rounded(
    unit: Unit<'_>,
    out: &mut MatMut<'_>,
    add: bool,
    left: LeftTiles<'_>,
    right: RightTiles<'_>,
) {
    let (rows, cols, steps) = (out.rows(), out.cols(), left.steps);
    let (down, across) = (rows.div_ceil(SIDE), cols.div_ceil(SIDE));
    assert!(down > 0 && across > 0 && steps > 0 && right.apart >= across);
    assert!(((down - 1) * left.apart + steps) * TILE <= left.tiles.len());
    assert!(((steps - 1) * right.apart + across) * TILE <= right.tiles.len());
    for panel in panels(across, unit.limits().together) {
        let columns = panel.start * SIDE..(panel.end * SIDE).min(cols);
        let b = right.tiles[panel.start * TILE..].as_ptr();
        for row in 0..down {
            let run = Run {
                a: left.tiles[row * left.apart * TILE..].as_ptr(),
                b,
                steps,
                parts: Parts::OneByOne,
                pairs: steps * SIDE,
                b_step: right.apart * TILE * size_of::<u16>(),
                a_row: TILE_ROW,
                a_step: TILE * size_of::<u16>(),
            };
            let rows = row * SIDE..((row + 1) * SIDE).min(rows);
            let mut window = out.window(rows, columns.clone());
            let nothing = &mut Ahead::default();
            sum_window(unit, &mut window, add, &[run], panel.len(), nothing);
        }
    }
}
