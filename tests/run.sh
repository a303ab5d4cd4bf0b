#!/usr/bin/env bash
# Sets up .venv (shared with launch/local.sh) and runs the tests; arguments go to pytest:
#   bash tests/run.sh -k workdir
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
make_venv
install requirements.txt
install tests/requirements.txt

# Some tests compare with transformers' own models, which need PyTorch. On Linux its default build
# comes with gigabytes of CUDA libraries, so only a CPU build is installed without being asked.
torch=torch==2.13.0
[ "$(uname)" = Linux ] && torch="$torch+cpu"
if ! "$python" -c 'import importlib.util as u; exit(u.find_spec("torch") is None)' &&
  ! "$python" -m pip install --quiet --disable-pip-version-check "$torch" >/dev/null 2>&1; then
  echo "tests/run.sh: pip finds no $torch for this Python, so the tests that compare with PyTorch" \
    "are skipped. To run them: .venv/bin/pip install torch"
fi

exec "$python" -m pytest "$@"
