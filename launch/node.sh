#!/usr/bin/env bash
# Runs OEL on this machine with all its GPUs: one process, which sees every GPU.
#   bash launch/node.sh CONFIG.py[:preset] [--config.field=value ...]
#   WORKDIR=runs/fl8b bash launch/node.sh configs/frozen_lake_qwen3_8b.py --config.rounds=2
# JAX='jax[cuda13]' or JAX=jax (the CPU) installs another JAX than 'jax[cuda12]'. --dry_run prints
# the commands and does nothing. The same command resumes where the run stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/arguments.sh
read_arguments 1 "$@"
check_config "${words[0]}"

# JAX takes 75 % of a GPU's memory unless it is told to take more.
run export "XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
run env "JAX=${JAX:-jax[cuda12]}" bash launch/install.sh
run exec .venv/bin/python -S launch/logged.py "$workdir/logs/process-0.log" \
  .venv/bin/python -m oel_jax.main --config="$config" --workdir="$workdir" "${flags[@]}"
