#!/usr/bin/env bash
# Trains on two ranks whose only connection is a network of their own: two network namespaces of this machine, with a cable between them.
#
#   scripts/check_ranks.sh LOWRANK [bits] [link] [speed]
#
#   bits    two ranks across the cable end with the bits of one without MPI, and the bytes go through the cable
#   link    the cable is cut in the middle of a run: both ranks are gone by --network-timeout and a second, and the run resumes
#   speed   full fine-tuning over 1 Gb/s takes what docs/distributed.md says, within 20 percent; for a quiet machine with two cores
#
# Needs root, Open MPI (mpirun.openmpi), iproute2 with tc, and python3. mpirun reaches the second namespace by `ip netns exec` in place of ssh.
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit 2
fi
lowrank=$(realpath "$1")
shift
[ $# -gt 0 ] || set -- bits link speed
builtin=$(realpath "$(dirname "$0")/../crates/lowrank/builtin")
for program in mpirun.openmpi ip tc python3; do
    command -v "$program" >/dev/null || { echo "$program is missing; on Debian: apt-get install openmpi-bin iproute2 python3" >&2; exit 3; }
done

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
folder=$(mktemp -d -t check-ranks.XXXXXX)
first=lowrank-a-$$ second=lowrank-b-$$
network=10.77.$(($$ % 250)) # several of these scripts may run side by side
end_all() { # every process in the namespaces, stopped or not
    local name
    for name in "$first" "$second"; do
        # shellcheck disable=SC2046 # a list of ids
        kill -KILL $(ip netns pids "$name") 2>/dev/null || true
    done
}
take_down() {
    status=$?
    trap - EXIT
    end_all
    wait
    ip netns del "$first" 2>/dev/null || true
    ip netns del "$second" 2>/dev/null || true
    rm -rf "$folder"
    exit "$status"
}
trap take_down EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

fail() {
    echo "FAILED: $1" >&2
    exit 1
}

ip netns add "$first"
ip netns add "$second"
ip link add cable netns "$first" type veth peer name cable netns "$second"
ip -n "$first" address add "$network.1/24" dev cable
ip -n "$second" address add "$network.2/24" dev cable
for name in "$first" "$second"; do
    ip -n "$name" link set lo up
    ip -n "$name" link set cable up
done

# In place of ssh: the first argument is the host, the others are a command for the shell there.
cat >"$folder/agent" <<AGENT
#!/bin/sh
shift
exec ip netns exec $second unshare --uts sh -c 'hostname second; exec sh -c "\$*"' sh "\$@"
AGENT
chmod +x "$folder/agent"

# Two ranks with the arguments of lowrank, one in each namespace.
two_ranks() {
    # Open MPI takes ranks with one host's name for neighbours, which share memory.
    exec ip netns exec "$first" unshare --uts sh -c 'hostname first; exec "$@"' sh \
        mpirun.openmpi --mca plm_rsh_agent "$folder/agent" --mca plm rsh --host "$network.1:1,$network.2:1" -n 2 --bind-to none \
        --mca pml ob1 --mca btl tcp,self --mca btl_tcp_if_include "$network.0/24" --mca oob_tcp_if_include "$network.0/24" \
        "$lowrank" "$@" </dev/null
}

# Bytes that went through the cable, both ways.
cable_bytes() {
    ip -n "$first" -s -j link show cable | python3 -c 'import json, sys; s = json.load(sys.stdin)[0]["stats64"]; print(s["rx"]["bytes"] + s["tx"]["bytes"])'
}

ranks() { # ids of the ranks
    local name
    for name in "$first" "$second"; do
        ip netns pids "$name"
    done | while read -r id; do
        [ "$(readlink "/proc/$id/exe")" = "$lowrank" ] && echo "$id"
    done || true
}

mkdir "$folder/data"
head -n 60 "$builtin/tasks/cards/train.jsonl" >"$folder/data/train.jsonl"
shared=(train --data "$folder/data" --recompute none --threads 1 --batch-size 2)
cd "$folder"

check_bits() {
    local common=("${shared[@]}" --model builtin:tiny --gradient-accumulation-steps 8 --max-steps 10 --save-steps 5) before method bytes
    for method in lora full; do
        "$lowrank" "${common[@]}" --method "$method" --output "one-$method" --quiet >/dev/null
        before=$(cable_bytes)
        (two_ranks "${common[@]}" --method "$method" --output "two-$method") >out.txt 2>&1 || { cat out.txt >&2; fail "two ranks, $method"; }
        bytes=$(($(cable_bytes) - before))
        for file in $(cd "one-$method" && find . -name '*.safetensors'); do
            cmp "one-$method/$file" "two-$method/$file" || fail "other bits across the cable: $method"
        done
        [ "$bytes" -gt 1000000 ] || fail "only $bytes bytes went through the cable"
        echo "bits: $method on two ranks as on one; $bytes bytes through the cable"
    done
}

check_link() {
    local timeout=5 launcher begun seconds code
    (two_ranks "${shared[@]}" --model builtin:tiny --gradient-accumulation-steps 8 --max-steps 100000 --save-steps 5 --network-timeout "$timeout" \
        --output cut) >cut.txt 2>&1 &
    launcher=$!
    for _ in $(seq 600); do
        [ ! -d cut/checkpoints/step-10 ] || break
        sleep 0.05
    done
    [ "$(ranks | wc -l)" -eq 2 ] || { cat cut.txt >&2; fail "no two ranks"; }
    ip -n "$second" link set cable down
    begun=$(date +%s%N)
    for _ in $(seq 600); do
        [ -n "$(ranks)" ] || break
        sleep 0.05
    done
    seconds=$(($(date +%s%N) - begun))
    echo "link: cut; ranks gone after $((seconds / 1000000)) ms, with --network-timeout $timeout"
    for _ in $(seq 100); do
        kill -0 "$launcher" 2>/dev/null || break
        sleep 0.1
    done
    if kill -0 "$launcher" 2>/dev/null; then
        echo "link: mpirun waits for its daemon beyond the cable, 10 seconds later still"
        kill -TERM "$launcher"
        for _ in $(seq 50); do
            kill -0 "$launcher" 2>/dev/null || break
            sleep 0.1
        done
        ! kill -0 "$launcher" 2>/dev/null || echo "link: SIGTERM does not end it either"
        end_all
    fi
    code=0
    wait "$launcher" || code=$?
    ip -n "$second" link set cable up
    grep -a 'waited' cut.txt || { cat cut.txt >&2; fail "no rank says what it waited for"; }
    [ "$code" -ne 0 ] || fail "the job ended with 0"
    [ "$seconds" -lt $(((timeout + 1) * 1000000000 + 500000000)) ] || fail "the ranks stayed for too long"
    end_all
    # Stopped after some steps more, in good order.
    "$lowrank" train --output cut --resume >resumed.txt 2>&1 &
    launcher=$!
    sleep 2
    kill -USR1 "$launcher"
    wait "$launcher" || true
    grep -E 'resuming after step|stopped by' resumed.txt || { cat resumed.txt >&2; fail "the run does not resume"; }
}

# A llama of 15 million random weights in bf16.
make_model() {
    mkdir model
    cp "$builtin"/{tokenizer,tokenizer_config}.json model/
    python3 - <<'PY'
import json, random

random.seed(1)
hidden, intermediate, layers, vocabulary = 512, 1536, 4, 2048
config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_size": hidden, "intermediate_size": intermediate,
          "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": vocabulary, "max_position_embeddings": 128,
          "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0}
json.dump(config, open("model/config.json", "w"))
shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
for layer in range(layers):
    block = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "mlp.down_proj": (hidden, intermediate)}
    block |= {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"} | {f"mlp.{name}_proj": (intermediate, hidden) for name in ("gate", "up")}
    shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
header, tensors = {}, bytearray()
high = bytes(0x3C if byte % 2 else 0xBC for byte in range(256))  # between 0.008 and 0.03, of both signs
for name, shape in shapes.items():
    count = shape[0] * (shape[1] if len(shape) > 1 else 1)
    values = bytearray(b"\x80\x3f") * count  # ones
    if len(shape) > 1:
        values[0::2], values[1::2] = random.randbytes(count), random.randbytes(count).translate(high)
    header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [len(tensors), len(tensors) + len(values)]}
    tensors += values
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
open("model/model.safetensors", "wb").write(len(text).to_bytes(8, "little") + text + tensors)
PY
}

# The median of a run's seconds a step, without the first ones.
step_seconds() { # RUN…
    python3 - "$@" <<'PY'
import json, statistics, sys

seconds = []
for run in sys.argv[1:]:
    steps = [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
    seconds += [step["tokens"] / step["tokens_per_second"] for step in steps if "tokens_per_second" in step][2:]
print(statistics.median(seconds))
PY
}

check_speed() {
    local name round links
    make_model
    local common=("${shared[@]}" --model "$folder/model" --method full --max-steps 12 --save-steps 1000 --no-shuffle --quiet)
    uptime
    for round in 1 2 3; do
        # The share of one rank: as many micro-batches as each of the two takes. Two at once, since the two ranks share this machine's memory.
        for name in a b; do
            "$lowrank" "${common[@]}" --gradient-accumulation-steps 4 --output "alone-$name-$round" >/dev/null &
        done
        wait
        for name in "$first" "$second"; do
            tc -n "$name" qdisc add dev cable root tbf rate 1gbit burst 256kb latency 100ms
        done
        for links in 1 2; do
            (OMPI_MCA_btl_tcp_links=$links two_ranks "${common[@]}" --gradient-accumulation-steps 8 --output "links-$links-$round") >out.txt 2>&1 ||
                { cat out.txt >&2; fail "two ranks"; }
        done
        for name in "$first" "$second"; do
            tc -n "$name" qdisc del dev cable root
        done
        (two_ranks "${common[@]}" --gradient-accumulation-steps 8 --output "fast-$round") >out.txt 2>&1 || { cat out.txt >&2; fail "two ranks"; }
        rm -rf ./*-"$round"/checkpoints ./*-"$round"/*.safetensors
    done
    uptime
    python3 - "$(step_seconds alone-*)" "$(step_seconds links-2-*)" "$(step_seconds links-1-*)" "$(step_seconds fast-*)" model/model.safetensors <<'PY'
import os, sys

alone, two, one_link, fast = map(float, sys.argv[1:5])
size = 2 * os.path.getsize(sys.argv[5])  # f32 for each value of bf16
ranks, rate, latency = 2, 1e9 / 8, 30e-6
exchange = 2 * (ranks - 1) / ranks * size / rate + 2 * (ranks - 1) * latency
expected = alone + exchange
print(f"speed: C {alone:.3f} s, B {size / 1e6:.1f} MB, exchange {exchange:.3f} s, expected {expected:.3f} s a step")
print(f"speed: found {two:.3f} s ({100 * (two / expected - 1):+.1f} %) with two connections between the ranks (btl_tcp_links 2)")
print(f"speed: found {one_link:.3f} s ({100 * (one_link / expected - 1):+.1f} %) with one, Open MPI's default; {fast:.3f} s without a limit")
sys.exit(abs(two / expected - 1) > 0.2)
PY
}

for part in "$@"; do
    case $part in
    bits | link | speed) "check_$part" ;;
    *) fail "there is no part $part; give bits, link or speed" ;;
    esac
done
echo "all that was asked for holds"
