//! How pages say sizes, times and shares: small values that print themselves the way people say them.

use std::fmt;
use time::OffsetDateTime;

/// A number of bytes; prints "512 B", "1.5 GiB".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::types::show_size(self.0))
    }
}

/// A span of time; prints its largest unit, "45 s", "3 min", "5 h", "2 days".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub seconds: u64,
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = self.seconds;
        match s {
            0..60 => write!(f, "{s} s"),
            60..3600 => write!(f, "{} min", s / 60),
            3600..172_800 => write!(f, "{} h", s / 3600),
            _ => write!(f, "{} days", s / 86_400),
        }
    }
}

/// A point in time, and the clock reading of the page that shows it. Both are milliseconds since 1970, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    pub at_ms: i64,
    pub now_ms: i64,
}

impl Moment {
    pub fn new(at_ms: i64, now_ms: i64) -> Moment {
        Moment { at_ms, now_ms }
    }

    /// "just now", "3 min ago", "in 12 days".
    pub fn ago(&self) -> String {
        let away = self.now_ms.saturating_sub(self.at_ms);
        let span = Span { seconds: away.unsigned_abs() / 1000 };
        match (span.seconds, away < 0) {
            (0..5, _) => "just now".to_owned(),
            (_, false) => format!("{span} ago"),
            (_, true) => format!("in {span}"),
        }
    }

    /// Seconds from then to now, negative for what is to come; the page counts on from it.
    pub fn age_s(&self) -> i64 {
        self.now_ms.saturating_sub(self.at_ms) / 1000
    }

    /// "2026-11-22 10:42:01 UTC".
    pub fn exact(&self) -> String {
        self.parts().map_or_else(
            || "unknown".to_owned(),
            |[y, mo, d, h, mi, s]| format!("{y:04}-{mo:02}-{d:02} {h:02}:{mi:02}:{s:02} UTC"),
        )
    }

    /// For `<time datetime>`: "2026-11-22T10:42:01Z".
    pub fn iso(&self) -> String {
        self.parts()
            .map_or_else(String::new, |[y, mo, d, h, mi, s]| format!("{y:04}-{mo:02}-{d:02}T{h:02}:{mi:02}:{s:02}Z"))
    }

    fn parts(&self) -> Option<[i32; 6]> {
        let t = OffsetDateTime::from_unix_timestamp(self.at_ms.div_euclid(1000)).ok()?;
        let (hour, minute, second) = t.to_hms();
        Some([
            t.year(),
            i32::from(u8::from(t.month())),
            i32::from(t.day()),
            i32::from(hour),
            i32::from(minute),
            i32::from(second),
        ])
    }
}

/// A share of a whole, 0 to 100.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Percent(u8);

impl Percent {
    /// `part` of `whole`; an empty whole counts as nothing used, more than the whole as all of it.
    pub fn of(part: u64, whole: u64) -> Percent {
        let share = (u128::from(part) * 100).checked_div(u128::from(whole)).unwrap_or(0);
        Percent(u8::try_from(share.min(100)).unwrap_or(100))
    }

    pub fn value(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} %", self.0)
    }
}

/// "1 guest", "2 guests".
pub fn count(n: usize, one: &str, many: &str) -> String {
    if n == 1 { format!("1 {one}") } else { format!("{n} {many}") }
}

/// The points of an SVG polyline over a 100 × 20 box for values 0..=100, oldest first; empty for fewer than two values.
pub fn spark_points(values: &[u8]) -> String {
    let Some(steps) = values.len().checked_sub(1).filter(|&steps| steps > 0) else { return String::new() };
    let point = |(i, &v): (usize, &u8)| {
        let y_tenths = 195 - u32::from(v.min(100)) * 19 / 10;
        format!("{},{}.{}", i * 100 / steps, y_tenths / 10, y_tenths % 10)
    };
    values.iter().enumerate().map(point).collect::<Vec<_>>().join(" ")
}

/// A SHA-256 in hexadecimal as pairs in capitals, "AB:CD:…", the way browsers show certificates.
pub fn fingerprint(sha256: &[u8]) -> String {
    sha256.iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_use_their_largest_unit() {
        let said: Vec<String> =
            [0, 59, 60, 3599, 3600, 172_799, 172_800].map(|seconds| Span { seconds }.to_string()).to_vec();
        assert_eq!(said, ["0 s", "59 s", "1 min", "59 min", "1 h", "47 h", "2 days"]);
    }

    #[test]
    fn moments_know_past_and_future() {
        assert_eq!(Moment::new(0, 3_000).ago(), "just now");
        assert_eq!(Moment::new(0, 180_000).ago(), "3 min ago");
        assert_eq!(Moment::new(86_400_000 * 12, 0).ago(), "in 12 days");
        assert_eq!(Moment::new(i64::MIN, i64::MAX).exact(), "unknown");
    }

    #[test]
    fn exact_times_are_utc_to_the_second() {
        let at = Moment::new(1_795_344_121_999, 0);
        assert_eq!(at.exact(), "2026-11-22 10:42:01 UTC");
        assert_eq!(at.iso(), "2026-11-22T10:42:01Z");
    }

    #[test]
    fn shares_stay_between_nothing_and_all() {
        assert_eq!(Percent::of(1, 0).value(), 0);
        assert_eq!(Percent::of(1, 3).value(), 33);
        assert_eq!(Percent::of(u64::MAX, 1).value(), 100);
    }

    #[test]
    fn a_sparkline_spans_its_box() {
        assert_eq!(spark_points(&[]), "");
        assert_eq!(spark_points(&[7]), "");
        assert_eq!(spark_points(&[0, 100, 255]), "0,19.5 50,0.5 100,0.5");
    }

    #[test]
    fn one_thing_is_not_many() {
        assert_eq!((count(1, "guest", "guests"), count(0, "guest", "guests")), ("1 guest".into(), "0 guests".into()));
        assert_eq!(fingerprint(&[0xab, 1]), "AB:01");
    }
}
