# shellcheck shell=bash
# Sourced by the launch scripts and tests/run.sh, from the project's top directory: makes .venv once
# and installs a requirements file when its content or the Python version has changed. Sets $python.

python=.venv/bin/python

is_new_enough() {  # is_new_enough PYTHON: it starts and is at least 3.11
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

version_of() {  # 3.12
  "$1" -c 'import sys; print(*sys.version_info[:2], sep=".")'
}

find_python() {  # prints $PYTHON, or the first Python of at least 3.11 that really starts
  local name
  if [ -n "${PYTHON:-}" ]; then
    if ! is_new_enough "$PYTHON"; then
      echo "error: PYTHON=$PYTHON is $("$PYTHON" --version 2>&1 | head -n 1 || true); oel_jax needs" \
        "Python 3.11 or newer. Name another one, or leave PYTHON= away to have one looked for" >&2
      return 2
    fi
    echo "$PYTHON"
    return
  fi
  for name in python3.12 python3.11 python3 python3.13; do
    if is_new_enough "$name"; then
      echo "$name"
      return
    fi
  done
  echo "error: oel_jax needs Python 3.11 or newer and found none (tried python3.12, python3.11," \
    "python3, python3.13). Install one, or name it: PYTHON=... bash $0" >&2
  return 2
}

make_venv() {
  local base
  if is_new_enough "$python" && "$python" -c 'import pip' >/dev/null 2>&1; then
    [ -n "${PYTHON:-}" ] || return 0
    base=$(find_python) || return
    if [ "$(version_of "$base")" != "$(version_of "$python")" ]; then
      echo "note: .venv is there, with Python $(version_of "$python"); PYTHON=$PYTHON counts when" \
        ".venv is made. Delete .venv to have it made again" >&2
    fi
    return
  fi
  base=$(find_python) || return
  echo "Making .venv with $("$base" --version)"
  if ! "$base" -m venv --clear .venv; then
    echo "$base cannot make a virtual environment; on Debian and Ubuntu install its -venv" \
      "package, or name another Python: PYTHON=... bash $0" >&2
    return 1
  fi
}

fingerprint() {  # of a requirements file and the Python it is installed for
  "$python" -c 'import hashlib, sys
print(sys.version, hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"
}

install() {  # install FILE: only if it has changed since the last time
  local stamp want
  stamp=.venv/installed-$(echo "$1" | tr '/' '-')
  want=$(fingerprint "$1") || return 1
  if [ "$want" != "$(cat "$stamp" 2>/dev/null)" ]; then
    echo "Installing $1 (the first time takes a few minutes)"
    if ! "$python" -m pip install --quiet --disable-pip-version-check -r "$1"; then
      echo "Installing $1 failed; pip's message is above. Run the same command again to retry." >&2
      return 1
    fi
    echo "$want" >"$stamp"
  fi
}

install_accelerator() {  # JAX='jax[cuda12]' or 'jax[tpu]': the same JAX with its accelerator
  local want
  [ -n "${JAX:-}" ] || return 0
  want="$JAX $(fingerprint requirements.txt)" || return 1
  if [ "$want" != "$(cat .venv/installed-jax 2>/dev/null)" ]; then
    echo "Installing $JAX"
    if ! "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt "$JAX"; then
      echo "Installing $JAX failed; pip's message is above. Run the same command again to retry." >&2
      return 1
    fi
    echo "$want" >.venv/installed-jax
  fi
}
