//! Benchmarks: what is measured, how often, and against which limit.
//!
//! Every limit is either a ratio of two programs measured side by side in one run, so that it says the same on any
//! machine, or a size.

pub mod api;
pub mod boot;
pub mod boot_trace;
pub mod hotadd;
pub mod launch;
pub mod many;
pub mod measure;
pub mod memory;
pub mod share;
pub mod startup;

use std::fmt;

use serde::Serialize;

/// What one program measured, round by round.
#[derive(Debug, Clone, Serialize)]
pub struct Series {
    /// The program.
    pub program: String,
    /// In each round, in the unit of the [`Finding`].
    pub values: Vec<f64>,
    /// The value in the middle.
    pub median: f64,
    /// The smallest value, which other work on the machine disturbed least.
    pub least: f64,
}

impl Series {
    /// The values of a program, at least one.
    pub fn new(program: impl Into<String>, values: Vec<f64>) -> Self {
        let mut sorted = values.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        let median =
            if sorted.len() % 2 == 1 { at(middle) } else { f64::midpoint(at(middle.wrapping_sub(1)), at(middle)) };
        Self { program: program.into(), values, median, least: at(0) }
    }
}

/// A quantity, what was measured of it, and its limit.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// What was measured.
    pub what: String,
    /// The unit of the series.
    pub unit: &'static str,
    /// What each program measured, Halyard first.
    pub series: Vec<Series>,
    /// What is compared with the limit.
    pub result: f64,
    /// What the result is.
    pub result_is: String,
    /// The most that the result may be.
    pub limit: f64,
    /// Whether it is no more than that.
    pub met: bool,
}

impl Finding {
    /// Halyard's median against the smallest median of the others.
    pub fn ratio(what: impl Into<String>, unit: &'static str, series: Vec<Series>, limit: f64) -> Self {
        let (own, others) = series.split_first().map_or((f64::NAN, &[][..]), |(own, others)| (own.median, others));
        let best = others.iter().min_by(|one, other| one.median.total_cmp(&other.median));
        let (name, other) = best.map_or(("nothing", f64::NAN), |best| (best.program.as_str(), best.median));
        let result_is = format!("times the median of {name}");
        Self::new(what, unit, (own / other, result_is), limit).with(series)
    }

    /// By how much Halyard's median is above that of the one other.
    pub fn difference(what: impl Into<String>, unit: &'static str, series: Vec<Series>, limit: f64) -> Self {
        let (own, other) = match series.as_slice() {
            [own, other] => (own.median, other.median),
            _ => (f64::NAN, f64::NAN),
        };
        Self::new(what, unit, (own - other, format!("{unit} more")), limit).with(series)
    }

    /// Halyard's median itself, beside those of others that have no say.
    pub fn absolute(what: impl Into<String>, unit: &'static str, series: Vec<Series>, limit: f64) -> Self {
        let own = series.first().map_or(f64::NAN, |own| own.median);
        Self::new(what, unit, (own, unit.to_owned()), limit).with(series)
    }

    /// Halyard's median itself.
    pub fn amount(what: impl Into<String>, unit: &'static str, series: Series, limit: f64) -> Self {
        Self::absolute(what, unit, vec![series], limit)
    }

    fn new(what: impl Into<String>, unit: &'static str, (result, result_is): (f64, String), limit: f64) -> Self {
        Self { what: what.into(), unit, series: Vec::new(), result, result_is, limit, met: result <= limit }
    }

    fn with(self, series: Vec<Series>) -> Self {
        Self { series, ..self }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.what)?;
        for Series { program, values, median, least } in &self.series {
            let unit = self.unit;
            match values.len() {
                1 => writeln!(f, "  {program:<24}{median:>9.2} {unit}")?,
                rounds => {
                    writeln!(f, "  {program:<24}{median:>9.2} {unit} (median of {rounds}, least {least:.2} {unit})")?;
                }
            }
        }
        let verdict = if self.met { "OK" } else { "MISSED" };
        writeln!(f, "  {verdict}: {:.2} {}; the limit is {:.2}", self.result, self.result_is, self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_least_values() {
        let series = Series::new("a", vec![3.0, 1.0, 2.0]);
        assert_eq!((series.median, series.least), (2.0, 1.0));
        assert_eq!(Series::new("b", vec![4.0, 1.0]).median, 2.5);
        assert_eq!(Series::new("c", vec![7.0]).median, 7.0);
    }

    #[test]
    fn the_ratio_is_that_to_the_best_of_the_others() {
        let series = |name, value| Series::new(name, vec![value]);
        let finding =
            Finding::ratio("time", "s", vec![series("own", 4.0), series("slow", 9.0), series("fast", 5.0)], 0.8);
        assert_eq!((finding.result, finding.met), (0.8, true));
        assert!(finding.to_string().contains("OK: 0.80 times the median of fast; the limit is 0.80"), "{finding}");
        let missed = Finding::ratio("time", "s", vec![series("own", 6.0), series("fast", 5.0)], 0.8);
        assert!(!missed.met && missed.to_string().contains("MISSED: 1.20"), "{missed}");
    }

    #[test]
    fn the_difference_is_that_to_the_other_and_others_have_no_say_in_an_amount() {
        let series = || vec![Series::new("own", vec![5.5]), Series::new("other", vec![4.0])];
        let finding = Finding::difference("time", "ms", series(), 2.0);
        assert_eq!((finding.result, finding.met), (1.5, true));
        assert!(!Finding::difference("time", "ms", series(), 1.0).met);
        assert!(!Finding::difference("time", "ms", vec![], 1.0).met);
        let finding = Finding::absolute("time", "ms", series(), 5.0);
        assert_eq!((finding.result, finding.met), (5.5, false));
    }

    #[test]
    fn nothing_to_compare_with_meets_no_limit() {
        assert!(!Finding::ratio("time", "s", vec![Series::new("own", vec![1.0])], 0.8).met);
    }
}
