//! Counts, bytes, times and other numbers as people read them.

use std::time::Duration;

/// Digits in groups of three: `134,515,008`.
pub fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Bytes in the unit that leaves few digits: `1.8 MiB`.
pub fn bytes(value: u64) -> String {
    let mut scaled = value as f64;
    let mut unit = "bytes";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if scaled < 1024.0 {
            break;
        }
        scaled /= 1024.0;
        unit = next;
    }
    if unit == "bytes" {
        format!("{value} bytes")
    } else {
        format!("{scaled:.1} {unit}")
    }
}

/// Bytes in powers of ten, as papers and disks count them: `37.7 MB`.
pub fn decimal_bytes(value: u64) -> String {
    let mut scaled = value as f64;
    let mut unit = "bytes";
    for next in ["kB", "MB", "GB", "TB", "PB"] {
        if scaled < 999.95 {
            break;
        }
        scaled /= 1000.0;
        unit = next;
    }
    if unit == "bytes" {
        format!("{value} bytes")
    } else {
        format!("{scaled:.1} {unit}")
    }
}

/// A time to a precision that fits its length: `4.20 ms`, `4.2 s`, `3 min 12 s`, `2 h 5 min`.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let whole = time.as_secs();
    match seconds {
        ..0.001 => format!("{:.0} µs", seconds * 1e6),
        ..0.1 => format!("{:.2} ms", seconds * 1e3),
        ..1.0 => format!("{:.0} ms", seconds * 1e3),
        ..10.0 => format!("{seconds:.1} s"),
        ..60.0 => format!("{whole} s"),
        ..3600.0 => format!("{} min {} s", whole / 60, whole % 60),
        ..172_800.0 => format!("{} h {} min", whole / 3600, whole / 60 % 60),
        _ => format!("{} days", whole / 86_400),
    }
}

/// A finite number in few characters: `2e-4`, `1.204`, `460.8k`, `134.5M`.
pub fn short(value: f64) -> String {
    let size = value.abs();
    if size < 1e-12 {
        "0".to_string()
    } else if size >= 1e6 {
        format!("{}M", trim(value / 1e6))
    } else if size >= 1e4 {
        format!("{}k", trim(value / 1e3))
    } else if size < 1e-3 {
        let text = format!("{value:.1e}");
        text.replace(".0e", "e")
    } else {
        trim(value)
    }
}

/// Four significant digits at most, without zeros at the end.
fn trim(value: f64) -> String {
    let whole = value.abs().log10().floor().max(-3.0) as i32;
    let decimals = usize::try_from(3 - whole).unwrap_or(0);
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_string()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_right() {
        let cases = [
            (0.0, "0"),
            (0.5, "0.5"),
            (2.0, "2"),
            (1.234_56, "1.235"),
            (0.012_345, "0.01235"),
            (2e-4, "2e-4"),
            (1.8e-4, "1.8e-4"),
            (-3.5, "-3.5"),
            (1250.0, "1250"),
            (10_000.0, "10k"),
            (12_500.0, "12.5k"),
            (3_000_000.0, "3M"),
        ];
        for (value, text) in cases {
            assert_eq!(short(value), text);
        }
    }

    #[test]
    fn decimal_bytes_are_powers_of_ten() {
        let cases = [
            (999, "999 bytes"),
            (37_748_736, "37.7 MB"),
            (999_990, "1.0 MB"),
            (349_200_000_000, "349.2 GB"),
        ];
        for (value, text) in cases {
            assert_eq!(decimal_bytes(value), text);
        }
    }

    #[test]
    fn counts_and_bytes() {
        let counts = [0, 999, 1000, 134_515_008].map(grouped);
        assert_eq!(counts, ["0", "999", "1,000", "134,515,008"]);
        let sizes = [0, 1023, 1024, 1_843_200, 5 << 30].map(bytes);
        assert_eq!(
            sizes,
            ["0 bytes", "1023 bytes", "1.0 KiB", "1.8 MiB", "5.0 GiB"]
        );
    }

    #[test]
    fn times() {
        let times = [0.000_21, 0.0042, 0.25, 4.2, 42.0, 192.0, 7500.0, 1e6];
        let texts = times.map(|seconds| duration(Duration::from_secs_f64(seconds)));
        assert_eq!(
            texts,
            [
                "210 µs",
                "4.20 ms",
                "250 ms",
                "4.2 s",
                "42 s",
                "3 min 12 s",
                "2 h 5 min",
                "11 days"
            ]
        );
        assert_eq!(duration(Duration::ZERO), "0 µs");
    }
}
