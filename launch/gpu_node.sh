#!/usr/bin/env bash
# Run a command on all GPUs of this machine:
#   launch/gpu_node.sh python -m cir_jax.train emoji_text --workdir runs/gpu
# One process has all of them (CUDA_VISIBLE_DEVICES chooses some): there is one copy of the model, of the compiled
# program and of the data pipeline, mesh.tensor may span the GPUs, and a signal reaches the process that saves.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,5p' "$0" | cut -c3-; exit 2; }
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
[ "$gpus" -ge 1 ] || { echo "launch/gpu_node.sh: nvidia-smi lists no GPU on $(hostname)" >&2; exit 1; }
unset CIR_JAX_COORDINATOR CIR_JAX_PROCESSES CIR_JAX_PROCESS
# Where CUDA does not start, an error, not a run on the processors. JAX would leave a quarter of the memory unused.
export JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
exec "$@"
