# Sourced by the launch scripts, from the project's top directory: reads their arguments.
# shellcheck shell=bash disable=SC2034  # what is set here is used by the scripts

fail() {  # a mistake that the user can mend
  echo "error: $*" >&2
  exit 2
}

usage() {  # the comment at the top of the script
  awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^#SBATCH/ { sub(/^# ?/, ""); print }' "$0"
}

# read_arguments COUNT "$@": sets words (COUNT of them), flags (for oel_jax.main) and dry_run.
read_arguments() {
  local count=$1 argument
  shift
  words=() flags=() dry_run=${DRY_RUN:-}
  for argument in "$@"; do
    case $argument in
      -h | --help)
        usage
        exit 0
        ;;
      --dry_run) dry_run=1 ;;
      --config | --config=*) fail "$argument: the config file is given as described by $0 --help" ;;
      --workdir | --workdir=*) fail "$argument: the place of the run is given as WORKDIR=DIR $0 ..." ;;
      -*) flags+=("$argument") ;;
      *)
        if [ ${#flags[@]} -gt 0 ]; then
          fail "$argument follows ${flags[${#flags[@]} - 1]}; write --flag=value in one word"
        fi
        words+=("$argument")
        ;;
    esac
  done
  if [ ${#words[@]} -ne "$count" ]; then
    usage >&2
    exit 2
  fi
}

check_config() {  # check_config FILE.py[:preset]: sets config and workdir
  config=$1
  case ${config%%:*} in
    *.py) ;;
    *) fail "$config is not a Python file; take one of configs/*.py" ;;
  esac
  [ -f "${config%%:*}" ] || fail "there is no config file ${config%%:*}; take one of configs/*.py"
  workdir=${WORKDIR:-runs/$(basename "${config%%:*}" .py)}
}

as_text() {  # as_text WORD...: one line that a shell reads as these words
  local word text=() plain='^[A-Za-z0-9_./:=,@%+-]+$' quote="'\\''"
  for word in "$@"; do
    [[ $word =~ $plain ]] || word="'${word//\'/$quote}'"
    text+=("$word")
  done
  echo "${text[*]}"
}

run() {  # runs a command; with --dry_run prints it
  if [ -z "$dry_run" ]; then
    "$@"
  elif [ "$1" = exec ]; then
    as_text "${@:2}"
  else
    as_text "$@"
  fi
}
