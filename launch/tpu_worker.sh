#!/usr/bin/env bash
# What launch/tpu_pod.sh runs on every worker of a slice, in the copy of the repository there.
# The training process outlives the connection that started it: its output is in
# ~/gcl_jax_run/log, and whoever holds ~/gcl_jax_run/lock is it.
#   tpu_worker.sh install         a virtual environment with the requirements and libtpu
#   tpu_worker.sh start COMMAND   in that environment, unless it runs already
#   tpu_worker.sh attach COMMAND  fails unless it runs already
#   tpu_worker.sh follow          its output until it ends
#   tpu_worker.sh wait            waits for its end, prints "exit=CODE"; where it failed, the
#                                 end of its output
#   tpu_worker.sh stop            SIGTERM; waits. A run so stopped counts as 130, not as 75
# Each may be given twice: gcloud repeats a command whose connection broke.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
folder="$HOME/gcl_jax_run"
venv="$HOME/gcl_jax_venv"
mkdir -p "$folder"

runs() {  # whether the process is there
  ! flock --nonblock "$folder/lock" true
}

install() {
  # The images' own Python is older than 3.11, so uv brings one.
  python3 -m pip install --quiet --user uv
  [[ -x "$venv/bin/python" ]] || python3 -m uv venv --quiet --python=3.12 "$venv"
  python3 -m uv pip install --quiet --python="$venv/bin/python" \
    -r requirements.txt 'jax[tpu]' gcsfs
}

attach() {  # 0: this command runs; 1: nothing does; 2: something else
  local command
  runs || return 1
  command="$(cat "$folder/command")"
  [[ "$command" == "$(printf '%q ' "$@")" ]] ||
    fail "another run goes on: $command. Stop it: launch/tpu_pod.sh stop"
}

start() {
  local i
  if runs; then
    attach "$@"
    return
  fi
  printf '%q ' "$@" >"$folder/command"
  rm -f "$folder/exit" "$folder/pid" "$folder/stopped"
  export PATH="$venv/bin:$PATH"
  # shellcheck disable=SC2016  # expanded by the inner shells
  setsid nohup flock --nonblock "$folder/lock" bash -c '
    trap : TERM  # a shutdown signals this shell too, and the exit code is still to come
    code=0
    bash -c '\''echo $$ >"$0/pid" && exec "$@"'\'' "$@" || code=$?
    echo "$code" >"$0/exit"
  ' "$folder" "$folder" "$@" </dev/null >"$folder/log" 2>&1 &
  for ((i = 0; i < 100; i++)); do
    [[ ! -e "$folder/pid" ]] || return 0
    sleep 0.1
  done
  cat "$folder/log" >&2
  return 1
}

follow() {
  tail --lines=200 --follow --pid="$(cat "$folder/pid")" "$folder/log"
}

wait_for() {
  local code
  flock "$folder/lock" true
  code="$(cat "$folder/exit" 2>/dev/null || echo 137)"  # none: the machine itself went down
  if [[ -e "$folder/stopped" ]] && ((code == 75)); then code=130; fi
  if ((code != 0 && code != 75)); then
    tail --lines=40 "$folder/log" | sed "s/^/[$(hostname)] /" >&2
  fi
  echo "exit=$code"
}

stop() {
  runs || return 0
  touch "$folder/stopped"
  kill -TERM "$(cat "$folder/pid")"
  flock "$folder/lock" true
}

case "${1-}" in
  install | follow | stop) "$1" ;;
  attach | start) "$@" ;;
  wait) wait_for ;;
  *) fail "usage: launch/tpu_worker.sh install | start COMMAND | attach COMMAND | follow | \
wait | stop" ;;
esac
