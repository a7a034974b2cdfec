#!/usr/bin/env bash
# Makes rows that lowrank reads of SST-2 as three tables without a header (train.tsv, dev.tsv and test.tsv, lines of text, tab, 0 or 1):
#
#     scripts/sst2-rows.sh SOURCE DIR [TRAIN]
#
# writes DIR/train.tsv, DIR/valid.tsv and DIR/test.tsv with a header and the labels `negative` and `positive`. Of the training rows
# TRAIN (4000) are taken at even distances, or `all`. Nothing is drawn at random, so everybody gets the same rows.
set -euo pipefail

fail() { printf 'sst2-rows: %s\n' "$1" >&2; exit "${2:-1}"; }

[ $# -ge 2 ] && [ $# -le 3 ] || fail "usage: scripts/sst2-rows.sh SOURCE DIR [TRAIN]" 2
source=$1
directory=$2
train=${3:-4000}
[[ $train == all || $train =~ ^[1-9][0-9]*$ ]] || fail "a number of rows is 1 or greater, or all; not $train" 2
for name in train dev test; do
    [ -f "$source/$name.tsv" ] || fail "$source/$name.tsv is missing; SOURCE is the folder of the three files"
done

# As rows: FILE COUNT
rows() {
    awk -F '\t' -v count="$2" '
        BEGIN { units = 0 }
        NF != 2 || ($2 != "0" && $2 != "1") { printf "%s:%d is no text with 0 or 1 behind a tab\n", FILENAME, NR > "/dev/stderr"; exit 1 }
        { text[units] = $1; label[units] = $2 == "1" ? "positive" : "negative"; units++ }
        END {
            if (count == "all") count = units
            if (count > units) { printf "%s has %d, not %d\n", FILENAME, units, count > "/dev/stderr"; exit 1 }
            print "text\tlabel"
            for (u = 0; u < units; u++)
                if (int((u + 1) * count / units) > int(u * count / units)) print text[u] "\t" label[u]
        }
    ' "$1"
}

mkdir -p "$directory"
rows "$source/train.tsv" "$train" > "$directory/train.tsv.part"
rows "$source/dev.tsv" all > "$directory/valid.tsv.part"
rows "$source/test.tsv" all > "$directory/test.tsv.part"
for name in train valid test; do mv "$directory/$name.tsv.part" "$directory/$name.tsv"; done
wc -l "$directory"/{train,valid,test}.tsv | sed '$d' >&2
