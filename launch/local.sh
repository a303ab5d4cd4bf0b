#!/usr/bin/env bash
# Runs OEL on this machine: makes .venv, installs requirements.txt, starts the default config.
#   bash launch/local.sh [--config.field=value ...]
#   CONFIG=configs/frozen_lake_qwen3_1p7b.py WORKDIR=runs/fl17b bash launch/local.sh
# JAX='jax[cuda12]' installs JAX for a GPU; --dry_run prints the commands and does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/arguments.sh
source launch/venv.sh
read_arguments 0 "$@"
check_config "${CONFIG:-configs/nano_frozen_lake.py}"
command=("$python" -m oel_jax.main --config="$config" --workdir="${WORKDIR:-runs/nano}")
[ ${#flags[@]} -eq 0 ] || command+=("${flags[@]}")  # bash 3.2 knows no empty list
if [ -n "$dry_run" ]; then
  bash launch/install.sh --dry_run
  run "${command[@]}"
  exit
fi
make_venv
install requirements.txt
install_accelerator
exec "${command[@]}"
