# shellcheck shell=bash
# What the launchers share; they source it in the root of the repository.
#
# Exit codes of gcl_jax.train: 0 done; 2 a mistake of the user's, which no restart mends;
# 75 preempted or stopped by SIGTERM with its state saved: the same command goes on;
# 130 the keyboard. Anything else is a failure.

dry=""
arguments=()

take_arguments() {  # the command line, less --dry-run wherever it stands
  local argument
  for argument in "$@"; do
    if [[ "$argument" == "--dry-run" ]]; then dry=1; else arguments+=("$argument"); fi
  done
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

say() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
}

run() {  # or, rehearsing, prints it as it could be pasted into a shell
  if [[ -n "$dry" ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

become() {  # the last command: signals and the exit code are its own
  if [[ -n "$dry" ]]; then run "$@"; else exec "$@"; fi
}

settled() {  # whether exit code $1 means that nothing is to be started again
  case "$1" in
    0 | 2 | 130) return 0 ;;
    *) return 1 ;;
  esac
}
