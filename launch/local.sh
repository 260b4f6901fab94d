#!/usr/bin/env bash
# Run a command as several processes on this machine, which compute together (train, embed, search, eval):
#   launch/local.sh 2 python -m cir_jax.train emoji_text --workdir runs/two
# Every process computes its own part; process 0 writes. When one fails, it is named and the others are ended.
set -euo pipefail
[ $# -ge 2 ] && [ "$1" -ge 1 ] || { sed -n '2,4p' "$0" | cut -c3-; exit 2; }
processes=$1
shift
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export CIR_JAX_COORDINATOR=localhost:$port CIR_JAX_PROCESSES=$processes

pids=()
for ((i = 0; i < processes; i++)); do
  CIR_JAX_PROCESS=$i "$@" &
  pids+=($!)
done
trap 'kill -KILL "${pids[@]}" 2>/dev/null || true; wait' EXIT
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM
trap : INT  # Ctrl-C reaches every process by itself; here they are waited for

status=0
# Sets `number` and `status` to those of the first process that has failed.
failed() {
  for number in "${!pids[@]}"; do
    kill -0 "${pids[number]}" 2>/dev/null && continue
    wait "${pids[number]}" || { status=$?; return 0; }
  done
  return 1
}
running() { [ -n "$(jobs -pr)" ]; }

while running && ! failed; do wait -n || true; done
failed || exit 0
if running; then
  echo "launch/local.sh: process $number of $processes ended with code $status; the others are ended" >&2
  case $status in
    130 | 143) patience=120 ;;  # they stop too, and save
    *) patience=5; kill -TERM "${pids[@]}" 2>/dev/null || true ;;
  esac
  for ((i = 0; i < 10 * patience; i++)); do running || break; sleep 0.1; done
fi
exit "$status"
