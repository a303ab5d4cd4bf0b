#!/usr/bin/env bash
# Runs OEL on this machine: makes .venv, installs requirements.txt, starts the default config.
#   bash launch/local.sh [--config.field=value ...]
#   CONFIG=configs/frozen_lake_qwen3_1p7b.py WORKDIR=runs/fl17b bash launch/local.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
make_venv
install requirements.txt
exec "$python" -m oel_jax.main \
  --config="${CONFIG:-configs/nano_frozen_lake.py}" --workdir="${WORKDIR:-runs/nano}" "$@"
