#!/usr/bin/env bash
# Runs OEL on a Cloud TPU slice: creates it, runs, creates it again when it is preempted, deletes it.
#   ZONE=us-east5-a TYPE=v5p-64 VERSION=v2-alpha-tpuv5 NFS=10.0.0.2:/oel \
#     bash launch/tpu_pod.sh NAME CONFIG.py[:preset] [--config.field=value ...]
# NAME is the slice's name. Settings, all in the environment:
#   ZONE, TYPE, VERSION   where, which accelerator type, which runtime version
#   NFS=SERVER:/SHARE     a share that all workers mount at MOUNT (/mnt/oel), e.g. of Filestore
#   WORKDIR               a directory on the share; default: MOUNT/runs/<name of the config>
#   SPOT=1                a cheaper slice that may be taken away at any time
#   PROJECT               of Google Cloud; default: gcloud's own
#   KEEP=1                do not delete the slice at the end
#   ATTEMPTS=100, PAUSE=60   how often to start again; seconds to wait when there is no capacity
# A slice that was there before is used and not deleted. --dry_run prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/arguments.sh
read_arguments 2 "$@"
name=${words[0]}
mount=${MOUNT:-/mnt/oel}
given=${WORKDIR:-}
check_config "${words[1]}"
workdir=${given:-$mount/$workdir}
missing=()
for setting in ZONE TYPE VERSION NFS; do
  [ -n "${!setting:-}" ] || missing+=("$setting")
done
[ ${#missing[@]} -eq 0 ] || fail "not set: ${missing[*]}; see bash $0 --help"
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || fail "$name: a slice's name has only a-z, 0-9 and -"
[[ $NFS =~ ^[^:/]+:/ ]] || fail "NFS=$NFS: write SERVER:/SHARE"
[[ $mount = /* && $mount != / ]] || fail "MOUNT=$mount: it must be an absolute path"
[[ $workdir = "$mount"/* ]] || fail "WORKDIR=$workdir is not on the share; it must begin with $mount/"
[[ ${config%%:*} != /* && $config != *..* ]] || fail "$config must be inside the project, which is" \
  "what is copied to the workers"

common=(--zone="$ZONE" --quiet ${PROJECT:+--project="$PROJECT"})
tpu() { run gcloud compute tpus tpu-vm "$@" "${common[@]}"; }
on_workers() {  # on_workers WORD...: a command on every worker; gcloud's exit code is the command's
  tpu ssh "$name" --worker=all --command="$(as_text "$@")"
}
state() {  # READY, PREEMPTED, ...; empty if there is no such slice
  [ -n "$dry_run" ] || gcloud compute tpus tpu-vm describe "$name" "${common[@]}" \
    --format='value(state)' 2>/dev/null || true
}

scratch=$(mktemp -d)
created=
running=
# shellcheck disable=SC2329  # called by traps
finish() {  # on every way out: bring the results here, stop what costs money
  local code=$?
  trap - EXIT INT TERM
  set +e
  if [ -n "$dry_run" ] || [ "$(state)" = READY ]; then
    local here
    here=runs/$(basename "$workdir")
    run mkdir -p "$here"
    tpu scp --recurse --worker=0 "$name:$workdir/logs" "$name:$workdir/report.html" \
      "$name:$workdir/summary.json" "$name:$workdir/metrics.jsonl" "$here/" ||
      echo "not all results could be copied; they are in $workdir on $NFS" >&2
  fi
  if [ -z "$created" ] || [ -n "${KEEP:-}" ]; then
    echo "# the slice $name is kept and costs money; to delete it:" >&2
    echo "# gcloud compute tpus tpu-vm delete $name ${common[*]}" >&2
  else
    tpu delete "$name" || echo "deleting $name failed: IT STILL COSTS MONEY; delete it by hand" >&2
  fi
  rm -rf "$scratch"
  exit "$code"
}
# shellcheck disable=SC2329
interrupted() {
  echo "stopping the workers" >&2
  on_workers bash oel/launch/tpu_worker.sh stop || true
  [ -z "$running" ] || wait "$running" || true
  exit 130
}

create() {  # until there is capacity; any other failure ends the script
  local now
  now=$(state)
  if [ "$now" = READY ]; then
    return
  elif [ -n "$now" ]; then
    echo "the slice $name is $now; it is deleted and created again" >&2
    tpu delete "$name"
  fi
  while [ "$attempt" -le "$attempts" ]; do
    created=1  # also if it fails half-way: then there is something to delete
    # A pipe, whose end is waited for: the message is read right after it.
    if { tpu create "$name" --accelerator-type="$TYPE" --version="$VERSION" ${SPOT:+--spot} \
      2>&1 >&3 | tee "$scratch/create" >&2; } 3>&1; then
      return
    fi
    if ! grep -qiE 'no more capacity|RESOURCE_EXHAUSTED|UNAVAILABLE|internal error' "$scratch/create" ||
      grep -qi quota "$scratch/create"; then
      [ -n "$(state)" ] || created=
      echo "error: the slice cannot be created; gcloud's message is above" >&2
      exit 2
    fi
    echo "no capacity for $TYPE in $ZONE (attempt $attempt of $attempts)" >&2
    [ -z "$(state)" ] || tpu delete "$name"
    attempt=$((attempt + 1))
    sleep "${PAUSE:-60}"
  done
  created=
  echo "error: no capacity for $TYPE in $ZONE after $attempts attempts" >&2
  exit 1
}

once() {  # copies the code, runs; returns the exit code of the run
  run tar -czf "$scratch/oel.tgz" --exclude=__pycache__ requirements.txt oel_jax configs launch \
    "${extra[@]}" || return
  tpu scp "$scratch/oel.tgz" "$name:oel.tgz" --worker=all || return
  on_workers bash -c 'mkdir -p oel && tar -xzf oel.tgz -C oel' || return
  on_workers env "NFS=$NFS" "MOUNT=$mount" bash oel/launch/tpu_worker.sh run "$workdir" \
    --config="$config" "${flags[@]}"
}

extra=()  # a config outside configs/ is copied as well
[[ ${config%%:*} = configs/* ]] || extra=("${config%%:*}")
attempts=${ATTEMPTS:-100}
trap finish EXIT
trap interrupted INT TERM
for ((attempt = 1; attempt <= attempts; attempt++)); do
  create
  code=0
  # In the background: a trap waits for what runs in the foreground, and a run takes days.
  once </dev/null &
  running=$!
  wait "$running" || code=$?
  running=
  case $code in
    0 | 2 | 130) exit "$code" ;;
    75) echo "stopped by a notice and saved; resuming" >&2 ;;
    255) echo "the connection was lost; resuming" >&2 ;;
    *)
      sleep "${PAUSE:-60}"  # a slice that is being taken away may call itself READY for a while
      if [ "$(state)" = READY ]; then
        echo "error: ended with exit code $code; messages are above and in $workdir/logs" >&2
        exit "$code"
      fi
      echo "the slice is gone; resuming with a new one" >&2
      ;;
  esac
done
echo "error: not finished after $attempts starts; call the same command again to resume" >&2
exit 75
