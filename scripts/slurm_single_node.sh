#!/usr/bin/env bash
# Runs a command under srun, on a Slurm of its own with this machine as the only node, and takes it down again.
#
#   scripts/slurm_single_node.sh [arguments of srun] COMMAND [its arguments]
#   scripts/slurm_single_node.sh --batch SCRIPT
#
# For example: scripts/slurm_single_node.sh --mpi=pmix -n 2 target/debug/examples/ranks
#
# With --batch the script is run by sbatch with two tasks, and what it printed is printed. Needs root, and Debian's packages slurm-wlm and munge,
# and for --mpi=pmix libpmix-dev, whose link libpmix.so the plugin loads. All files are in a temporary folder. Set SLURM_SINGLE_NODE_LOGS=1
# to see the logs after an error.
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
fi
for program in munged slurmctld slurmd srun; do
    if ! command -v "$program" > /dev/null; then
        echo "$program is missing; on Debian: apt-get install slurm-wlm munge" >&2
        exit 3
    fi
done

folder=$(mktemp -d -t slurm.XXXXXX)
chmod 755 "$folder"
mkdir -p "$folder"/{state,spool,log,munge}
host=$(hostname -s)
cpus=$(nproc)

# Ports that nobody has, most probably: other instances may run.
port=$((20000 + $$ % 20000))

# cgroups are not ours in a container, so processes are tracked by their group.
cat > "$folder/slurm.conf" << EOF
ClusterName=single
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=10 State=UP OverSubscribe=FORCE:8
EOF
export SLURM_CONF=$folder/slurm.conf

pids=()
take_down() {
    status=$?
    trap - EXIT
    if [ "$status" -ne 0 ] && [ -n "${SLURM_SINGLE_NODE_LOGS:-}" ]; then
        tail -n 30 "$folder"/log/* >&2 || true
    fi
    # A step that cannot report its end tries for minutes.
    for _ in $(seq 50); do
        [ -n "$(squeue -h 2> /dev/null)" ] || break
        sleep 0.1
    done
    for pid in "${pids[@]}"; do
        kill "$pid" 2> /dev/null || true
    done
    for _ in $(seq 30); do
        kill -0 "${pids[@]}" 2> /dev/null || break
        sleep 0.1
    done
    # What is left, such as the daemons of steps, which are nobody's children, has the folder in its environment.
    for process in /proc/[0-9]*; do
        pid=${process#/proc/}
        if [ "$pid" != $$ ] && [ "$pid" != "$PPID" ] && tr '\0' '\n' 2> /dev/null < "$process/environ" | grep -qx "SLURM_CONF=$SLURM_CONF"; then
            kill -9 "$pid" 2> /dev/null || true
        fi
    done
    rm -rf "$folder"
    exit "$status"
}
trap take_down EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

head -c 1024 /dev/urandom > "$folder/munge/key"
chmod 700 "$folder/munge"
chmod 400 "$folder/munge/key"
# --force: munged dislikes temporary folders, which everybody may write to.
munged --foreground --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
    --pid-file="$folder/munge/pid" --seed-file="$folder/munge/seed" --log-file="$folder/log/munged" \
    > "$folder/log/munged.err" 2>&1 &
pids+=($!)
for _ in $(seq 50); do
    [ -S "$folder/munge/socket" ] && break
    sleep 0.1
done
slurmctld -D > "$folder/log/slurmctld.err" 2>&1 &
pids+=($!)
slurmd -D > "$folder/log/slurmd.err" 2>&1 &
pids+=($!)
for _ in $(seq 150); do
    if [ "$(sinfo -h -o %T 2> /dev/null)" = idle ]; then
        break
    fi
    sleep 0.2
done

if [ "$1" = --batch ]; then
    status=0
    sbatch --wait --ntasks=2 --overcommit --output="$folder/log/batch.txt" "$2" > /dev/null || status=$?
    cat "$folder/log/batch.txt"
    exit "$status"
else
    srun --overcommit "$@" &
    # In the background, so that a signal to this script is heard at once.
    wait $!
fi
