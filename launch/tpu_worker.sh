#!/usr/bin/env bash
# What launch/tpu_pod.sh runs on every worker of a slice, over ssh.
#   NFS=SERVER:/SHARE MOUNT=DIR bash launch/tpu_worker.sh run WORKDIR --config=... [FLAG ...]
#   bash launch/tpu_worker.sh stop
# run: mounts the share, installs, stops an older run on this worker, runs oel_jax.main.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/arguments.sh
pid_file=$PWD/running.pid

stop() {  # SIGTERM, time to save, SIGKILL
  local pid
  pid=$(cat "$pid_file" 2>/dev/null) || return 0
  # The number may belong to another program after a restart of the machine.
  grep -qsE 'launch/(logged.py|tpu_worker.sh)' "/proc/$pid/cmdline" || return 0
  echo "stopping process $pid of an older run"
  kill -TERM "$pid"
  for _ in $(seq "${STOP_SECONDS:-180}"); do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 1
  done
  pkill -KILL -P "$pid" || true  # its children: the run itself
}

mount_share() {
  sudo mkdir -p "$MOUNT"
  if ! mountpoint -q "$MOUNT"; then
    command -v mount.nfs >/dev/null || sudo apt-get install -y -q nfs-common
    sudo mount -t nfs -o hard "$NFS" "$MOUNT"
  fi
  sudo mkdir -p "$workdir"  # a new share belongs to root
  if [ "$(stat -c %u "$workdir")" = 0 ]; then
    sudo chown "$(id -u)" "$workdir"
  fi
  [ -w "$workdir" ] || fail "$workdir belongs to user $(stat -c %u "$workdir"), on this worker you" \
    "are $(id -u): use OS Login, which gives you the same number everywhere"
}

find_or_install_python() {  # a TPU machine comes with Ubuntu 22.04 and its Python 3.10
  command -v python3.12 || command -v python3.11 && return
  sudo apt-get install -y -q python3.11 python3.11-venv
}

attribute() {  # what the machine's metadata says of the slice
  curl --fail --silent --show-error --retry 5 --header 'Metadata-Flavor: Google' \
    "metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

find_the_others() {  # sets OEL_*: the workers' list is sorted, its first one is worker 0
  local list first
  list=$(attribute worker-network-endpoints)
  [[ $list = *,* ]] || return 0  # a slice of one host
  first=${list%%,*}  # an address, or name:id:address
  export OEL_COORDINATOR=${first##*:}:8482
  OEL_PROCESSES=$(tr , '\n' <<<"$list" | wc -l)
  OEL_PROCESS_ID=$(attribute agent-worker-number)
  export OEL_PROCESSES OEL_PROCESS_ID
}

case ${1:-} in
  stop) stop ;;
  run)
    [ $# -ge 3 ] && [ -n "${NFS:-}" ] && [ -n "${MOUNT:-}" ] || { usage >&2; exit 2; }
    workdir=$2
    shift 2
    stop
    echo $$ >"$pid_file"  # it stays this process; from here on `stop` finds it
    mount_share
    find_or_install_python >/dev/null
    JAX=${JAX:-jax[tpu]} bash launch/install.sh
    find_the_others
    export HF_HOME=$MOUNT/huggingface  # one download for all workers and all starts
    exec .venv/bin/python -S launch/logged.py "$workdir/logs/process-${OEL_PROCESS_ID:-0}.log" \
      .venv/bin/python -m oel_jax.main --workdir="$workdir" "$@"
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
