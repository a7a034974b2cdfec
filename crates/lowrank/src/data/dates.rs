//! Dates for the chat templates that write today's.

use std::time::{SystemTime, UNIX_EPOCH};

/// Now, in seconds; taken when the template is compiled, so that one run renders one date.
pub(crate) fn seconds_since_1970() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(0))
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// The formats of dates that chat templates use, in UTC: there is no safe way to ask the system for its time zone.
///
/// # Errors
/// With the letter of a format that is not among them.
pub(super) fn strftime(format: &str, seconds: i64) -> Result<String, String> {
    let (day, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, date) = civil(day);
    let hour = second / 3600;
    let hour12 = (hour + 11) % 12 + 1;
    let month_name = MONTHS[(month - 1) as usize];
    let day_name = DAYS[(day + 4).rem_euclid(7) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut code = chars.next();
        let plain = code == Some('-');
        if plain {
            code = chars.next();
        }
        let number = |value: i64| {
            if plain {
                value.to_string()
            } else {
                format!("{value:02}")
            }
        };
        let piece = match code {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100),
            Some('m') => number(month),
            Some('d') => number(date),
            Some('e') => format!("{date:2}"),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('H') => number(hour),
            Some('I') => number(hour12),
            Some('M') => number(second / 60 % 60),
            Some('S') => number(second % 60),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('j') => format!("{:03}", day - days_before(year) + 1),
            Some('F') => format!("{year}-{month:02}-{date:02}"),
            Some('T') => format!("{hour:02}:{:02}:{:02}", second / 60 % 60, second % 60),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            other => return Err(other.map(String::from).unwrap_or_default()),
        };
        out.push_str(&piece);
    }
    Ok(out)
}

/// Days from 1970-01-01 to the first of January of `year`.
fn days_before(year: i64) -> i64 {
    let y = year - 1;
    365 * (year - 1970) + (y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400)) - 477
}

/// Year, month and day of a day counted from 1970-01-01 in the Gregorian calendar.
fn civil(day: i64) -> (i64, i64, i64) {
    let mut year = 1970 + day.div_euclid(366);
    while days_before(year + 1) <= day {
        year += 1;
    }
    let leap = days_before(year + 1) - days_before(year) == 366;
    let mut left = day - days_before(year);
    for (at, length) in [
        31,
        if leap { 29 } else { 28 },
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ]
    .iter()
    .enumerate()
    {
        if left < *length {
            return (year, at as i64 + 1, left + 1);
        }
        left -= length;
    }
    (year, 12, 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_formatted_as_python_does() {
        for (seconds, expected) in [
            (
                0,
                "1970-01-01 Thu Thursday 01 Jan January 1 001 00:00:00 12 AM 70",
            ),
            (
                951_782_400 + 86_399,
                "2000-02-29 Tue Tuesday 29 Feb February 29 060 23:59:59 11 PM 00",
            ),
            (
                1_785_499_200,
                "2026-07-31 Fri Friday 31 Jul July 31 212 12:00:00 12 PM 26",
            ),
            (
                1_735_689_599,
                "2024-12-31 Tue Tuesday 31 Dec December 31 366 23:59:59 11 PM 24",
            ),
            (
                4_107_542_399,
                "2100-02-28 Sun Sunday 28 Feb February 28 059 23:59:59 11 PM 00",
            ),
        ] {
            assert_eq!(
                strftime("%Y-%m-%d %a %A %d %b %B %-d %j %H:%M:%S %I %p %y", seconds).unwrap(),
                expected
            );
        }
        assert_eq!(strftime("%Q", 0), Err("Q".to_owned()));
    }
}
