//! Keys for the counter-based generator: every random draw of a run is a function of its seed and of where it is used.

/// A key that depends on both arguments (SplitMix64's finaliser over their combination).
pub(crate) fn mix(key: u64, place: u64) -> u64 {
    let mut z = key
        .wrapping_add(place.wrapping_mul(0x9e37_79b9_7f4a_7c15))
        .wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
