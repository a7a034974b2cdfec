//! Slips in JSON that are often made, each with its mend: what people and programs write that JSON does not have.

use super::BYTE_ORDER_MARK;

/// What may have gone wrong in a row. `at` is where the parser stopped, in bytes of the row, and `what` is what it said.
pub(super) fn hint(row: &[u8], at: usize, what: &str) -> &'static str {
    let has = |text: &str| {
        let mut parts = row.windows(text.len());
        parts.any(|part| part == text.as_bytes())
    };
    let after = |text: &str| has(&format!(": {text}")) || has(&format!(":{text}"));
    let rest = row.get(at..).unwrap_or_default();
    let next = rest.trim_ascii_start();
    let comment = |text: &[u8]| {
        [b"//".as_slice(), b"/*", b"#"]
            .iter()
            .any(|c| text.starts_with(c))
    };
    if what.contains("hex escape") || what.contains("surrogate") {
        return if has("\\u") && row.windows(3).any(is_surrogate) {
            "; the row has half of a surrogate pair, which is no character: repair the text, \
             or write the rows anew from text that is valid Unicode"
        } else {
            ""
        };
    }
    if row.starts_with(BYTE_ORDER_MARK) {
        return "; a byte order mark stands before the row, as where files were put together or a mark was written \
                twice; remove it: sed 's/^\\xEF\\xBB\\xBF//'";
    }
    if row.ends_with(b"\x1A") {
        return "; the row ends with Ctrl-Z (0x1A), which DOS put at the end of files; remove it: tr -d '\\032'";
    }
    if what == "trailing characters" {
        if rest.contains(&b'\r') || row[..at.min(row.len())].ends_with(b"\r") {
            return "; the lines end with CR alone; write them with LF: tr '\\r' '\\n'";
        }
        if next == b"," {
            return "; remove the comma at the end of the line";
        }
        if next.starts_with(b"{")
            || next
                .strip_prefix(b",")
                .is_some_and(|next| next.trim_ascii_start().starts_with(b"{"))
        {
            return "; another object follows on the line, and each row needs a line of its own: jq -c . rewrites them \
                    (remove commas between them first)";
        }
    }
    if comment(row) || comment(next) {
        "; JSON has no comments, so remove it"
    } else if row.starts_with(b"{'") {
        "; this is a Python dict, and json.dumps(row) writes it as JSON"
    } else if ["NaN", "Infinity", "-Infinity"].into_iter().any(after) {
        "; NaN and Infinity are not JSON, so leave the field out or write null"
    } else if ["None", "True", "False"].into_iter().any(after) {
        "; None, True and False are Python's, and json.dumps(row) writes them as JSON"
    } else if what.starts_with("trailing comma") {
        "; remove the comma before the closing bracket"
    } else {
        ""
    }
}

/// The beginning of \uD800 to \uDFFF, after its backslash.
fn is_surrogate(part: &[u8]) -> bool {
    matches!(part, [b'u', b'd' | b'D', digit] if matches!(digit, b'8' | b'9' | b'a'..=b'f' | b'A'..=b'F'))
}
