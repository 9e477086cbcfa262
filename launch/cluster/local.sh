#!/usr/bin/env bash
# Runs one command as several processes of this host, for trying out what later runs on many:
#
#   launch/cluster/local.sh 2 python -m launch.train --gin_file=configs/quickstart.gin --workdir=checkpoints/two \
#       --gin.TrainConfig.partitions=4
#
# With 4 in place of 2, or 1, the same command goes on from the last snapshot: partitions stay, processes come and go.
#
# The flags --coordinator, --num_processes and --process_id are added to the command. Each line of output begins with [process id].
# When one process fails, the others end too: by themselves within seconds, or by SIGTERM after GRACE_S (10) seconds, or SIGKILL after
# as long again. SIGTERM and SIGINT go to all. The status is that of the first process that failed, else 0.
#
# Set before: PORT, the coordinator's port (default: a free one); CUDA_VISIBLE_DEVICES or JAX_LOCAL_DEVICE_IDS do not work here, since
# all processes would take the same: with GPUs, each process takes an equal share of GPUS (default: all that nvidia-smi lists).
# JAX_PLATFORMS=cpu uses none; MeshConfig.cpu_devices then splits each process.
set -euo pipefail
# Each process gets a process group of its own: Ctrl-C comes to this script alone, which passes it on once.
set -m

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/cluster/local.sh N COMMAND [ARGUMENT ...], N processes; see the head of the file" >&2
    exit 2
fi
count=$1
shift

free_port() {
    local port
    for _ in {1..50}; do
        port=$((20000 + RANDOM % 12000))
        # Nothing listens where nothing answers.
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
    echo "found no free port; set PORT" >&2
    return 1
}

port=${PORT:-$(free_port)}
grace_s=${GRACE_S:-10}
gpus=${GPUS:-0}
if [[ -z ${GPUS:-} && ${JAX_PLATFORMS:-} != cpu ]] && command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
fi
if ((gpus % count)); then
    echo "$count processes cannot share $gpus GPUs equally; set GPUS to a multiple of $count, or JAX_PLATFORMS=cpu" >&2
    exit 2
fi

pids=()
forward() {
    local pid
    for pid in "${pids[@]}"; do
        kill "-$1" "$pid" 2>/dev/null || true
    done
}
trap 'forward TERM' TERM
trap 'forward INT' INT

for ((i = 0; i < count; i++)); do
    (
        trap - TERM INT
        if ((gpus)); then
            share=$((gpus / count))
            JAX_LOCAL_DEVICE_IDS=$(seq -s, $((i * share)) $(((i + 1) * share - 1)))
            export JAX_LOCAL_DEVICE_IDS
        fi
        exec "$@" "--coordinator=127.0.0.1:$port" "--num_processes=$count" "--process_id=$i"
    ) > >(trap '' TERM INT; exec sed -u "s/^/[$i] /") 2> >(trap '' TERM INT; exec sed -u "s/^/[$i] /" >&2) &
    pids+=("$!")
done

# `wait` returns early when a signal comes in; who still runs is asked each time.
status=0
ended=()
while ((${#ended[@]} < count)); do
    for ((i = 0; i < count; i++)); do
        if [[ " ${ended[*]-} " == *" $i "* ]] || kill -0 "${pids[i]}" 2>/dev/null; then
            continue
        fi
        code=0
        wait "${pids[i]}" || code=$?
        ended+=("$i")
        if ((code && !status)); then
            status=$code
            failed_at=$SECONDS
        fi
    done
    if ((status && SECONDS - failed_at > 2 * grace_s)); then
        forward KILL
    elif ((status && SECONDS - failed_at > grace_s)); then
        forward TERM
    fi
    sleep 0.1 &
    wait "$!" || true
done
wait
exit "$status"
