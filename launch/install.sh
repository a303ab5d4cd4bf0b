#!/usr/bin/env bash
# Makes .venv and installs what a run needs, once; later calls do nothing unless something changed.
#   bash launch/install.sh                      # JAX for the CPU
#   JAX='jax[cuda12]' bash launch/install.sh    # NVIDIA GPUs
#   JAX='jax[tpu]' bash launch/install.sh       # a TPU machine
# PYTHON=python3.12 names the Python that .venv is made with; --dry_run prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/arguments.sh
source launch/venv.sh
read_arguments 0 "$@"
[ ${#flags[@]} -eq 0 ] || fail "${flags[0]} is no option of $0"
if [ -n "$dry_run" ]; then
  run "${PYTHON:-python3}" -m venv .venv
  run "$python" -m pip install -r requirements.txt
  [ -z "${JAX:-}" ] || run "$python" -m pip install -r requirements.txt "$JAX"
else
  make_venv
  install requirements.txt
  install_accelerator
fi
