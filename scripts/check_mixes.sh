#!/bin/sh
# Random mixes of requests on a model of real size: each must get the ids and the log-probabilities, bit for bit, that it gets
# alone, with every engine that the machine has.
#
#   scripts/check_mixes.sh MODEL_FOLDER [MIXES]
set -eu
[ $# -ge 1 ] || { echo "usage: $0 MODEL_FOLDER [MIXES]" >&2; exit 2; }
[ -f "$1/config.json" ] || { echo "$0: $1 has no config.json; give a model's folder" >&2; exit 2; }
LOWRANK_MIXES_MODEL=$(cd "$1" && pwd) LOWRANK_MIXES=${2:-100} \
    cargo test --release -p lowrank --test mixes -- --nocapture
