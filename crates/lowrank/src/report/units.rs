//! Counts, bytes and times as people read them.

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

#[cfg(test)]
mod tests {
    use super::*;

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
