#!/usr/bin/env bash
# Train with several processes on this machine, which compute together:
#   launch/local.sh 2 python -m cir_jax.train emoji_text --workdir runs/two
# Every process reads its own part of each batch; process 0 writes. When one fails, the others are ended.
set -euo pipefail
[ $# -ge 2 ] && [ "$1" -ge 1 ] || { sed -n '2,4p' "$0" | cut -c3-; exit 2; }
processes=$1
shift
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export CIR_JAX_COORDINATOR=localhost:$port CIR_JAX_PROCESSES=$processes
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for ((i = 0; i < processes; i++)); do
  CIR_JAX_PROCESS=$i "$@" &
done
status=0
for ((i = 0; i < processes; i++)); do
  wait -n || { status=$?; break; }
done
exit "$status"
