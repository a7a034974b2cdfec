//! Which labels were predicted for which: the confusion table.

use std::collections::{BTreeMap, BTreeSet};

use serde::ser::{Serialize, SerializeMap, Serializer};
use unicode_width::UnicodeWidthStr;

use super::text::{GAP, MOST_LABELS, NAME_WIDTH, columns, shortened, told_apart};
use super::{Counts, share};
use crate::units::grouped;

/// How often each label was predicted for each gold label. Pairs that did not occur take no room, so that there may be any
/// number of labels.
///
/// It serializes to an object of objects, `{"gold label": {"predicted label": count}}`, without counts of 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confusion {
    labels: Vec<String>,
    /// By gold and predicted label.
    cells: BTreeMap<(u32, u32), u64>,
}

/// Fewer terminal columns than these say nothing of a name.
const LEAST_NAME_WIDTH: usize = 4;

impl Confusion {
    /// A table without rows, of labels that have these names.
    pub(super) fn new(labels: Vec<String>) -> Self {
        Self {
            labels,
            cells: BTreeMap::new(),
        }
    }

    /// Counts a row.
    pub(super) fn add(&mut self, gold: u32, predicted: u32) {
        *self.cells.entry((gold, predicted)).or_insert(0) += 1;
    }

    /// The names of labels 0, 1, ….
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// How many rows of the label `gold` were predicted to be `predicted`.
    pub fn count(&self, gold: u32, predicted: u32) -> u64 {
        self.cells.get(&(gold, predicted)).copied().unwrap_or(0)
    }

    /// The counts of each label.
    pub(super) fn counts(&self) -> Vec<Counts> {
        let mut counts = vec![Counts::default(); self.labels.len()];
        for (&(gold, predicted), &count) in &self.cells {
            counts[gold as usize].gold += count;
            counts[predicted as usize].predicted += count;
            if gold == predicted {
                counts[gold as usize].correct += count;
            }
        }
        counts
    }

    /// The table in at most `width` columns of a terminal: a line for each gold label, a column for each predicted one. Names are
    /// shortened where they must be, and numbered where they could then be mistaken. Where labels are more than 12, or do
    /// not fit in any way, it is the list of the pairs that were mistaken most often.
    pub fn render(&self, width: usize) -> String {
        let grid = if self.labels.len() <= MOST_LABELS {
            self.grid(width)
        } else {
            None
        };
        grid.unwrap_or_else(|| self.pairs(width))
    }

    /// The table, if it fits.
    fn grid(&self, width: usize) -> Option<String> {
        let longest = self.labels.iter().map(|name| name.width()).max()?;
        let longest = longest.clamp(LEAST_NAME_WIDTH, NAME_WIDTH);
        let fitting = |grid: String| fits(&grid, width).then_some(grid);
        if let Some(of_rows) = told_apart(&self.labels, longest) {
            for name_width in (LEAST_NAME_WIDTH..=longest).rev() {
                if let Some(of_columns) = told_apart(&self.labels, name_width)
                    && let Some(grid) = fitting(self.grid_with(&of_rows, &of_columns))
                {
                    return Some(grid);
                }
            }
        }
        let numbers: Vec<String> = (0..self.labels.len()).map(|n| n.to_string()).collect();
        let digits = numbers.iter().map(String::len).max()?;
        (LEAST_NAME_WIDTH..=longest).rev().find_map(|name_width| {
            let numbered = numbers.iter().zip(&self.labels);
            let numbered: Vec<String> = numbered
                .map(|(number, name)| format!("{number:>digits$} {}", shortened(name, name_width)))
                .collect();
            fitting(self.grid_with(&numbered, &numbers))
        })
    }

    /// The table with these names for its lines and its columns.
    fn grid_with(&self, of_rows: &[String], of_columns: &[String]) -> String {
        let first = of_rows.iter().map(|name| name.width()).max().unwrap_or(0);
        let first = first.max("gold".width());
        let mut rows = vec![
            ["gold".to_owned()]
                .into_iter()
                .chain(of_columns.to_vec())
                .collect(),
        ];
        rows.extend((0..).zip(of_rows).map(|(gold, name)| {
            let counts =
                (0..self.labels.len() as u32).map(|label| grouped(self.count(gold, label)));
            [name.clone()].into_iter().chain(counts).collect()
        }));
        format!(
            "{}predicted\n{}",
            " ".repeat(first + GAP),
            columns(&rows, 1)
        )
    }

    /// The pairs that were mistaken most often, as many as a terminal shows.
    fn pairs(&self, width: usize) -> String {
        let counts = self.counts();
        let rows: u64 = counts.iter().map(|counts| counts.gold).sum();
        let mut pairs: Vec<((u32, u32), u64)> = self
            .cells
            .iter()
            .filter(|((gold, predicted), _)| gold != predicted)
            .map(|(&pair, &count)| (pair, count))
            .collect();
        let wrong: u64 = pairs.iter().map(|(_, count)| count).sum();
        // Pairs that are as frequent keep the order of the labels.
        pairs.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
        let all = pairs.len();
        pairs.truncate(MOST_LABELS);
        let summary = format!(
            "{} labels; {} of {} rows are wrong.\n",
            grouped(self.labels.len() as u64),
            grouped(wrong),
            grouped(rows)
        );
        if pairs.is_empty() {
            return summary;
        }
        let heading = if all > pairs.len() {
            format!(
                "The {} most frequent of {} pairs that were mistaken:\n",
                pairs.len(),
                grouped(all as u64)
            )
        } else {
            String::new()
        };
        let longest = self.labels.iter().map(|name| name.width()).max();
        let longest = longest.unwrap_or(0).min(width).max(LEAST_NAME_WIDTH);
        let mut table = String::new();
        for name_width in (LEAST_NAME_WIDTH..=longest).rev() {
            table = self.list(&pairs, &counts, name_width);
            if fits(&table, width) {
                break;
            }
        }
        summary + &heading + &table
    }

    /// A line for each of the pairs, with names of so many terminal columns.
    fn list(&self, pairs: &[((u32, u32), u64)], counts: &[Counts], name_width: usize) -> String {
        let shown: BTreeSet<u32> = pairs.iter().flat_map(|&((g, p), _)| [g, p]).collect();
        let names: Vec<String> = shown
            .iter()
            .map(|&label| self.labels[label as usize].clone())
            .collect();
        let short = told_apart(&names, name_width).unwrap_or_else(|| {
            let numbered = shown.iter().zip(&names);
            numbered
                .map(|(label, name)| format!("{label} {}", shortened(name, name_width)))
                .collect()
        });
        let short: BTreeMap<u32, String> = shown.into_iter().zip(short).collect();
        let head = ["gold", "predicted", "rows", "of gold"];
        let mut lines = vec![head.map(str::to_owned).to_vec()];
        lines.extend(pairs.iter().map(|&((gold, predicted), count)| {
            let part = share(count, counts[gold as usize].gold);
            vec![
                short[&gold].clone(),
                short[&predicted].clone(),
                grouped(count),
                format!("{:.0}%", 100.0 * part),
            ]
        }));
        columns(&lines, 2)
    }
}

impl Serialize for Confusion {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut lines = serializer.serialize_map(Some(self.labels.len()))?;
        for (gold, name) in (0..).zip(&self.labels) {
            lines.serialize_entry(name, &Line { table: self, gold })?;
        }
        lines.end()
    }
}

/// The predictions for one gold label.
struct Line<'a> {
    table: &'a Confusion,
    gold: u32,
}

impl Serialize for Line<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let cells = self
            .table
            .cells
            .range((self.gold, 0)..=(self.gold, u32::MAX));
        serializer.collect_map(
            cells.map(|(&(_, predicted), count)| (&self.table.labels[predicted as usize], count)),
        )
    }
}

fn fits(text: &str, width: usize) -> bool {
    text.lines().all(|line| line.width() <= width)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn confusion(labels: &[&str], cells: &[(u32, u32, u64)]) -> Confusion {
        let mut confusion = Confusion::new(labels.iter().map(|&name| name.to_owned()).collect());
        for &(gold, predicted, count) in cells {
            *confusion.cells.entry((gold, predicted)).or_insert(0) += count;
        }
        confusion
    }

    /// Twenty newsgroups' names share their beginnings.
    fn similar() -> Confusion {
        let labels = [
            "comp.graphics",
            "comp.os.ms-windows.misc",
            "comp.sys.ibm.pc.hardware",
            "comp.sys.mac.hardware",
            "rec.autos",
            "rec.motorcycles",
            "talk.politics.guns",
            "talk.politics.misc",
        ];
        let cells: Vec<_> = (0..64)
            .map(|i| {
                (
                    i / 8,
                    i % 8,
                    if i / 8 == i % 8 {
                        1300
                    } else {
                        u64::from(i * 7 % 11)
                    },
                )
            })
            .collect();
        confusion(&labels, &cells)
    }

    #[test]
    fn a_line_is_a_gold_label() {
        let three = confusion(
            &["negative", "neutral", "positive"],
            &[
                (0, 0, 431),
                (0, 1, 10),
                (0, 2, 3),
                (1, 1, 1300),
                (2, 0, 7),
                (2, 2, 400),
            ],
        );
        insta::assert_snapshot!(three.render(60), @r"
                  predicted
        gold      negative  neutral  positive
        negative       431       10         3
        neutral          0    1,300         0
        positive         7        0       400
        ");
        assert_eq!(three.render(120), three.render(60));
        insta::assert_snapshot!(three.render(30), @r"
                  predicted
        gold      nega…  neut…  posi…
        negative    431     10      3
        neutral       0  1,300      0
        positive      7      0    400
        ");
    }

    #[test]
    fn names_that_could_be_mistaken_are_numbered_as_labels_are() {
        insta::assert_snapshot!(similar().render(80), @r"
                                  predicted
        gold                          0      1      2      3      4      5      6      7
        0 comp.graphics           1,300      7      3     10      6      2      9      5
        1 comp.os.ms-windows.mi…      1  1,300      4      0      7      3     10      6
        2 comp.sys.ibm.pc.hardw…      2      9  1,300      1      8      4      0      7
        3 comp.sys.mac.hardware       3     10      6  1,300      9      5      1      8
        4 rec.autos                   4      0      7      3  1,300      6      2      9
        5 rec.motorcycles             5      1      8      4      0  1,300      3     10
        6 talk.politics.guns          6      2      9      5      1      8  1,300      0
        7 talk.politics.misc          7      3     10      6      2      9      5  1,300
        ");
        insta::assert_snapshot!(similar().render(120), @r"
                                    predicted
        gold                            0      1      2      3      4      5      6      7
        0 comp.graphics             1,300      7      3     10      6      2      9      5
        1 comp.os.ms-windows.misc       1  1,300      4      0      7      3     10      6
        2 comp.sys.ibm.pc.hardware      2      9  1,300      1      8      4      0      7
        3 comp.sys.mac.hardware         3     10      6  1,300      9      5      1      8
        4 rec.autos                     4      0      7      3  1,300      6      2      9
        5 rec.motorcycles               5      1      8      4      0  1,300      3     10
        6 talk.politics.guns            6      2      9      5      1      8  1,300      0
        7 talk.politics.misc            7      3     10      6      2      9      5  1,300
        ");
    }

    #[test]
    fn what_does_not_fit_is_a_list_of_pairs() {
        insta::assert_snapshot!(similar().render(60), @r"
        8 labels; 281 of 10,681 rows are wrong.
        The 12 most frequent of 56 pairs that were mistaken:
        gold                   predicted              rows  of gold
        comp.graphics          comp.sys.mac.hardware    10       1%
        comp.os.ms-windows.m…  talk.politics.guns       10       1%
        comp.sys.mac.hardware  comp.os.ms-windows.m…    10       1%
        rec.motorcycles        talk.politics.misc       10       1%
        talk.politics.misc     comp.sys.ibm.pc.hard…    10       1%
        comp.graphics          talk.politics.guns        9       1%
        comp.sys.ibm.pc.hard…  comp.os.ms-windows.m…     9       1%
        comp.sys.mac.hardware  rec.autos                 9       1%
        rec.autos              talk.politics.misc        9       1%
        talk.politics.guns     comp.sys.ibm.pc.hard…     9       1%
        talk.politics.misc     rec.motorcycles           9       1%
        comp.sys.ibm.pc.hard…  rec.autos                 8       1%
        ");
        // Where not even that fits, the names are as short as they can be.
        insta::assert_snapshot!(similar().render(30), @r"
        8 labels; 281 of 10,681 rows are wrong.
        The 12 most frequent of 56 pairs that were mistaken:
        gold    predicted  rows  of gold
        0 com…  3 com…       10       1%
        1 com…  6 tal…       10       1%
        3 com…  1 com…       10       1%
        5 rec…  7 tal…       10       1%
        7 tal…  2 com…       10       1%
        0 com…  6 tal…        9       1%
        2 com…  1 com…        9       1%
        3 com…  4 rec…        9       1%
        4 rec…  7 tal…        9       1%
        6 tal…  2 com…        9       1%
        7 tal…  5 rec…        9       1%
        2 com…  4 rec…        8       1%
        ");
    }

    #[test]
    fn many_labels_are_a_list_of_pairs() {
        let names: Vec<String> = (0..77)
            .map(|label| format!("intent number {label}"))
            .collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let right = (0..77).map(|label| (label, label, 10));
        let mut cells: Vec<_> = right.collect();
        insta::assert_snapshot!(confusion(&names, &cells).render(80), @"77 labels; 0 of 770 rows are wrong.");
        cells.extend([(5, 7, 3), (76, 0, 30), (5, 8, 3)]);
        insta::assert_snapshot!(confusion(&names, &cells).render(80), @r"
        77 labels; 36 of 806 rows are wrong.
        gold              predicted        rows  of gold
        intent number 76  intent number 0    30      75%
        intent number 5   intent number 7     3      19%
        intent number 5   intent number 8     3      19%
        ");
        cells.extend((10..40).map(|label| (label, label + 1, 1)));
        let all = confusion(&names, &cells).render(80);
        assert!(all.contains("The 12 most frequent of 33 pairs"), "{all}");
        assert_eq!(all.lines().count(), 2 + 1 + MOST_LABELS, "{all}");
    }

    #[test]
    fn no_width_is_exceeded() {
        let few = confusion(&["a", "b"], &[(0, 0, 5), (1, 0, 3)]);
        for width in 60..130 {
            for table in [&similar(), &few] {
                assert!(fits(&table.render(width), width), "{}", table.render(width));
            }
        }
        // Nothing fits in so little, and nothing fails.
        for width in [0, 1, 10] {
            assert!(!similar().render(width).is_empty());
        }
    }
}
