#!/usr/bin/env bash
# Sets up .venv (shared with launch/local.sh) and runs the tests; arguments go to pytest:
#   bash tests/run.sh               the default tier
#   bash tests/run.sh --all         everything (tests/tiers.py has the tiers)
#   bash tests/run.sh -k workdir
#   bash tests/run.sh -n0 --pdb     in one process
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

# Some tests read what the compilers of GPUs and TPUs make of our programs; no such device is needed.
# They are kept apart: JAX would look for the devices in every run. About 600 MB, once.
version=$("$python" -c 'import jax; print(jax.__version__)')
want="$version $(fingerprint requirements-plan.txt)"
if [ "$want" != "$(cat .venv/installed-compilers 2>/dev/null)" ]; then
  echo "Installing the compilers of requirements-plan.txt in .venv/compilers"
  rm -rf .venv/compilers
  if "$python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --target .venv/compilers "$(sed -n 's/^\(libtpu[^ ]*\).*/\1/p' requirements-plan.txt)" \
    "jax-cuda12-plugin==$version" "jax-cuda12-pjrt==$version" >/dev/null 2>&1; then
    echo "$want" >.venv/installed-compilers
  else
    rm -rf .venv/compilers
    echo "tests/run.sh: pip cannot install them, so the tests that compile for a GPU or TPU are skipped"
  fi
fi

# Compiled programs are kept for the next time (see tests/conftest.py), old ones deleted.
export OEL_TEST_XLA_CACHE="${OEL_TEST_XLA_CACHE:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/oel_jax/tests-jax-$version}"
if [ -d "$OEL_TEST_XLA_CACHE" ]; then
  find "$OEL_TEST_XLA_CACHE" -type f -atime +14 -delete
fi

# Two processes, or one a core up to four: each compiles with threads and may need 3 GB of memory.
cores=$("$python" -c 'import os; print(max(1, min(4, len(getattr(os, "sched_getaffinity", lambda _: range(2))(0)))))')
exec "$python" -m pytest -n "$cores" --dist loadfile --no-loadscope-reorder "$@"
