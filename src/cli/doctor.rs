//! `innkeeper doctor`: the findings about this host, as lines or JSON.

use super::{Failure, Outcome, say, say_json};
use crate::wire::{Finding, Verdict};

/// Prints the findings. Errors: guests cannot run on this host (exit code 1).
pub fn run(findings: &[Finding], json: bool) -> Outcome {
    if json {
        say_json(&findings)?;
    } else {
        say(explain(findings))?;
    }
    let stoppers: Vec<&str> = findings
        .iter()
        .filter(|finding| finding.essential && finding.verdict == Verdict::Missing)
        .map(|finding| finding.title.as_str())
        .collect();
    if stoppers.is_empty() {
        Ok(())
    } else {
        Err(Failure::failed(format!("Guests cannot run on this host: {}.", stoppers.join(", "))))
    }
}

/// One line for each finding, and its remedy below it where there is something to do.
pub fn explain(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.title.chars().count()).max().unwrap_or(0);
    let mut lines = Vec::new();
    for finding in findings {
        let word = match finding.verdict {
            Verdict::Ok => "ok",
            Verdict::Degraded => "degraded",
            Verdict::Missing => "missing",
        };
        lines.push(format!("{word:<8}  {:<width$}  {}", finding.title, finding.detail).trim_end().to_owned());
        if finding.verdict != Verdict::Ok && !finding.remedy.is_empty() {
            lines.push(format!("{:10}{:width$}  → {}", "", "", finding.remedy));
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(title: &str, verdict: Verdict, essential: bool) -> Finding {
        let remedy = if verdict == Verdict::Ok { "" } else { "Do this." };
        Finding {
            id: title.to_lowercase(),
            title: title.into(),
            verdict,
            detail: "is so".into(),
            remedy: remedy.into(),
            essential,
        }
    }

    #[test]
    fn only_what_is_essential_and_missing_fails() {
        let good = [finding("KVM", Verdict::Ok, true), finding("passt", Verdict::Missing, false)];
        assert!(run(&good, false).is_ok());
        let bad = [finding("KVM", Verdict::Missing, true)];
        assert!(run(&bad, true).unwrap_err().to_string().contains("KVM"));
    }

    #[test]
    fn the_remedy_stands_below_what_is_wrong() {
        let text = explain(&[finding("KVM", Verdict::Ok, true), finding("Clock", Verdict::Degraded, false)]);
        assert_eq!(text, "ok        KVM    is so\ndegraded  Clock  is so\n                 → Do this.");
    }
}
