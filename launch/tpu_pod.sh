#!/usr/bin/env bash
# Run a command on all hosts of a TPU slice, in a folder that is on each of them:
#   launch/tpu_pod.sh NAME ZONE FOLDER python -m cir_jax.train CONFIG --workdir gs-mount/run
# JAX learns from the TPU which process is which. WORKDIR and data lie where all hosts see them (README.md).
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,4p' "$0" | cut -c3-; exit 2; }
name=$1 zone=$2 folder=$3
shift 3
printf -v command '%q ' "$@"
printf -v place '%q' "$folder"
# Where the TPU does not start, an error, not a run on the processors.
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd $place && CIR_JAX_PROCESSES=auto JAX_PLATFORMS=tpu,cpu exec $command"
