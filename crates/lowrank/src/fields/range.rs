//! The numbers that a setting takes.

/// A range with its words.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// What a number must be: "greater than 0".
    pub words: &'static str,
    /// All of which hold.
    pub limits: &'static [Limit],
}

/// A limit of a range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    /// x ≥ it
    AtLeast(f64),
    /// x > it
    Above(f64),
    /// x ≤ it
    AtMost(f64),
    /// x < it
    Below(f64),
}

impl Limit {
    fn holds(self, x: f64) -> bool {
        match self {
            Self::AtLeast(limit) => x >= limit,
            Self::Above(limit) => x > limit,
            Self::AtMost(limit) => x <= limit,
            Self::Below(limit) => x < limit,
        }
    }

    /// The keyword of a JSON schema that says it, and its number.
    pub fn keyword(self) -> (&'static str, f64) {
        match self {
            Self::AtLeast(limit) => ("minimum", limit),
            Self::Above(limit) => ("exclusiveMinimum", limit),
            Self::AtMost(limit) => ("maximum", limit),
            Self::Below(limit) => ("exclusiveMaximum", limit),
        }
    }
}

impl Range {
    /// Something is counted, and there is some of it.
    pub const COUNT: Self = Self {
        words: "1 or greater",
        limits: &[Limit::AtLeast(1.0)],
    };
    /// A rank: above any useful one, and any model's width.
    pub const RANK: Self = Self {
        words: "from 1 to 65536",
        limits: &[Limit::AtLeast(1.0), Limit::AtMost(65_536.0)],
    };
    /// x > 0
    pub const POSITIVE: Self = Self {
        words: "greater than 0",
        limits: &[Limit::Above(0.0)],
    };
    /// x ≥ 0
    pub const NOT_NEGATIVE: Self = Self {
        words: "0 or greater",
        limits: &[Limit::AtLeast(0.0)],
    };
    /// 0 ≤ x < 1
    pub const BELOW_ONE: Self = Self {
        words: "at least 0 and less than 1",
        limits: &[Limit::AtLeast(0.0), Limit::Below(1.0)],
    };
    /// 0 ≤ x ≤ 1
    pub const SHARE: Self = Self {
        words: "from 0 to 1",
        limits: &[Limit::AtLeast(0.0), Limit::AtMost(1.0)],
    };

    fn holds(&self, x: f64) -> bool {
        x.is_finite() && self.limits.iter().all(|limit| limit.holds(x))
    }

    /// What is wrong with a number, in words that follow its setting's name; `whose` says which of several it is.
    ///
    /// The engine computes in 32 bits, where a number may turn out as zero, one or infinite: it must be in the range there.
    fn problem(&self, value: f64, whose: &str) -> Option<String> {
        let words = self.words;
        let held = f64::from(value as f32);
        if self.holds(held) {
            return None;
        }
        let shown = shown(value);
        if !self.holds(value) {
            return Some(format!("must be {words}{whose}, not {shown}"));
        }
        Some(if held.is_infinite() {
            format!(
                "must be {words}{whose}, and no larger than 3.4e38, the largest 32-bit number; it is {shown}"
            )
        } else {
            format!("must be {words}{whose}, not {shown}, which is {held} as a 32-bit number")
        })
    }
}

/// A number as a person would write it: 1e-60 without its zeros.
fn shown(value: f64) -> String {
    if value == 0.0 || (1e-6..1e16).contains(&value.abs()) {
        value.to_string()
    } else {
        format!("{value:e}")
    }
}

/// A value of numbers that have a range.
pub trait Number {
    /// Calls `each` with every number; where there are several, with the pattern that it stands behind.
    fn each(&self, each: &mut dyn FnMut(f64, Option<&str>));

    /// Adds what is out of the range to `problems`; `name` is what the setting is called.
    fn check(&self, range: Range, name: &dyn Fn() -> String, problems: &mut Vec<String>) {
        self.each(&mut |number, pattern| {
            let whose = pattern.map_or(String::new(), |pattern| format!(" for {pattern}"));
            let problem = range.problem(number, &whose);
            problems.extend(problem.map(|problem| format!("{} {problem}", name())));
        });
    }
}

impl Number for f64 {
    fn each(&self, each: &mut dyn FnMut(f64, Option<&str>)) {
        each(*self, None);
    }
}

impl Number for u64 {
    fn each(&self, each: &mut dyn FnMut(f64, Option<&str>)) {
        each(*self as f64, None);
    }
}

impl Number for usize {
    fn each(&self, each: &mut dyn FnMut(f64, Option<&str>)) {
        each(*self as f64, None);
    }
}

impl<T: Number> Number for Option<T> {
    fn each(&self, each: &mut dyn FnMut(f64, Option<&str>)) {
        if let Some(number) = self {
            number.each(each);
        }
    }
}

impl<T: Number> Number for Vec<(String, T)> {
    fn each(&self, each: &mut dyn FnMut(f64, Option<&str>)) {
        for (pattern, number) in self {
            number.each(&mut |number, _| each(number, Some(pattern)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_of_range_is_said_with_the_number() {
        let problems = |value: f64, range: Range| {
            let mut problems = Vec::new();
            value.check(range, &|| "x".to_owned(), &mut problems);
            problems.join("; ")
        };
        assert_eq!(problems(1.0, Range::COUNT), "");
        assert_eq!(problems(0.0, Range::COUNT), "x must be 1 or greater, not 0");
        assert_eq!(problems(0.0, Range::NOT_NEGATIVE), "");
        assert_eq!(problems(1.0, Range::SHARE), "");
        assert_eq!(
            problems(1.0, Range::BELOW_ONE),
            "x must be at least 0 and less than 1, not 1"
        );
        assert_eq!(
            problems(1e-60, Range::POSITIVE),
            "x must be greater than 0, not 1e-60, which is 0 as a 32-bit number"
        );
        assert_eq!(
            problems(f64::NAN, Range::POSITIVE),
            "x must be greater than 0, not NaN"
        );
        let mut found = Vec::new();
        vec![("a".to_owned(), 2_usize), ("b".to_owned(), 0)].check(
            Range::COUNT,
            &|| "rank_pattern".to_owned(),
            &mut found,
        );
        assert_eq!(found, ["rank_pattern must be 1 or greater for b, not 0"]);
    }
}
