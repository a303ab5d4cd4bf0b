#!/usr/bin/env bash
# Runs a command; what it prints is shown and also appended to a log file.
#   bash launch/logged.sh LOGFILE COMMAND [ARGUMENT ...]
# SIGTERM and Ctrl-C reach the command, which may take its time to save; the exit code is the
# command's. It can be process 1 of a container: the log is complete before it ends.
set -euo pipefail
if [ $# -lt 2 ] || [ "$1" = --help ]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
log=$1
shift
mkdir -p "$(dirname "$log")"
echo "--- $(date -u +%Y-%m-%dT%H:%M:%SZ) $(uname -n): $*" >>"$log"

# Before the command starts: a signal that comes with its first words must not end this script.
child="" early=""
forward() {
  if [ -n "$child" ]; then kill "-$1" "$child" 2>/dev/null || true; else early=$1; fi
}
trap 'forward TERM' TERM
trap 'forward INT' INT

set -m  # own process groups: the terminal's Ctrl-C comes here alone and is passed on once
# Where nobody listens any more (a lost connection), tee still writes to the file.
exec {out}> >(exec tee -ia --output-error=warn "$log" 2>/dev/null)
tee=$!
PYTHONUNBUFFERED=1 "$@" </dev/null >&"$out" 2>&1 &
child=$!
exec {out}>&-
[ -z "$early" ] || forward "$early"

code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do  # a signal ended the wait, not the command
  code=0
  wait "$child" || code=$?
done
if [ "$code" -gt 128 ]; then  # perhaps the signal again: the command ended right after it
  code=0
  wait "$child" || code=$?
fi
wait "$tee" || true
exit "$code"
