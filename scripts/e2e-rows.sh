#!/usr/bin/env bash
# Makes rows that lowrank reads of the E2E NLG dataset as the LoRA paper's authors published it (train.txt, valid.txt and
# test.txt, lines of `meaning||text`):
#
#     scripts/e2e-rows.sh SOURCE DIR [TRAIN [VALID [MEANINGS]]]
#
# writes DIR/train.jsonl and DIR/valid.jsonl with TRAIN (1500) and VALID (200) rows taken at even distances, and
# DIR/test.jsonl with MEANINGS (100) meanings taken at even distances and all texts of each. `all` takes everything.
# Nothing is drawn at random, so everybody gets the same rows.
set -euo pipefail

fail() { printf 'e2e-rows: %s\n' "$1" >&2; exit "${2:-1}"; }

[ $# -ge 2 ] && [ $# -le 5 ] || fail "usage: scripts/e2e-rows.sh SOURCE DIR [TRAIN [VALID [MEANINGS]]]" 2
source=$1
directory=$2
train=${3:-1500}
valid=${4:-200}
meanings=${5:-100}
for count in "$train" "$valid" "$meanings"; do
    [[ $count == all || $count =~ ^[1-9][0-9]*$ ]] || fail "a number of rows is 1 or greater, or all; not $count" 2
done
for name in train valid test; do
    [ -f "$source/$name.txt" ] || fail "$source/$name.txt is missing; SOURCE is the folder of the three files"
done

# As rows: FILE COUNT KEY, where KEY says what is counted: `line`, or `meaning` with all its lines.
rows() {
    awk -v count="$2" -v key="$3" '
        BEGIN { units = 0; lines = 0 }
        function trimmed(text) { gsub(/^[ \t\r]+|[ \t\r]+$/, "", text); return text }
        function quoted(text) {
            gsub(/\\/, "\\\\", text); gsub(/"/, "\\\"", text); gsub(/\t/, "\\t", text)
            return "\"" text "\""
        }
        {
            cut = index($0, "||")
            if (!cut) next
            meaning = trimmed(substr($0, 1, cut - 1)); text = trimmed(substr($0, cut + 2))
            unit = key == "line" ? units : (meaning in seen ? seen[meaning] : units)
            if (unit == units) { seen[meaning] = units; units++ }
            prompts[lines] = meaning; texts[lines] = text; unit_of[lines] = unit; lines++
        }
        END {
            if (count == "all") count = units
            if (count > units) { printf "%s has %d, not %d\n", FILENAME, units, count > "/dev/stderr"; exit 1 }
            # Unit u is taken where the count of taken ones, u * count / units, passes a whole number.
            for (i = 0; i < lines; i++) {
                u = unit_of[i]
                if (int((u + 1) * count / units) > int(u * count / units))
                    printf "{\"prompt\": %s, \"completion\": %s}\n", quoted_prompt(prompts[i]), quoted(texts[i])
            }
        }
        function quoted_prompt(text,    inner) { inner = quoted(text); return substr(inner, 1, length(inner) - 1) "\\n\"" }
    ' "$1"
}

mkdir -p "$directory"
rows "$source/train.txt" "$train" line > "$directory/train.jsonl.part"
rows "$source/valid.txt" "$valid" line > "$directory/valid.jsonl.part"
rows "$source/test.txt" "$meanings" meaning > "$directory/test.jsonl.part"
for name in train valid test; do mv "$directory/$name.jsonl.part" "$directory/$name.jsonl"; done
wc -l "$directory"/{train,valid,test}.jsonl | sed '$d' >&2
