#!/usr/bin/env bash
# A rehearsal of a pod: N processes of the real entry point on this machine's CPU, joined.
#   launch/local_pod.sh 2 configs/demo.py --workdir=/tmp/pod
# Process 0 writes to the terminal, the others to files; of the first that fails, the end of
# its file is shown. Then the others are stopped, and its exit code is the launcher's.
# SIGTERM and SIGINT are passed on to all. --dry-run prints the commands.
#   DEVICES_PER_PROCESS=1   virtual devices of each process
#   RESTARTS=0              how often the set may be started again (not after exit codes 0, 2
#                           and 130, nor after a signal to the launcher)
#   GRACE=20                seconds from SIGTERM to SIGKILL for what outlives a failure
#   LOGS=                   the folder of the others' output; by default a temporary one
# Runs from the root of the repository: relative paths (--workdir too) are meant from there.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
take_arguments "$@"
set -- ${arguments[@]+"${arguments[@]}"}
if (($# < 2)) || [[ ! "$1" =~ ^[1-9][0-9]*$ ]]; then
  fail "usage: launch/local_pod.sh [--dry-run] N configs/NAME.py [flags of train]"
fi
processes="$1" config="$2"
shift 2
grace="${GRACE:-20}"

export JAX_PLATFORMS=cpu
devices="--xla_force_host_platform_device_count=${DEVICES_PER_PROCESS:-1}"
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$devices"  # the last one counts

command_of() {  # process $1 at port $2; flags follow
  local process="$1" port="$2"
  shift 2
  command=(python -m gcl_jax.train --coordinator="localhost:$port"
    --processes="$processes" --process_id="$process" --config="$config" "$@")
}

if [[ -n "$dry" ]]; then
  for ((i = 0; i < processes; i++)); do
    command_of "$i" PORT "$@"
    run env JAX_PLATFORMS=cpu XLA_FLAGS="$XLA_FLAGS" "${command[@]}"
  done
  exit
fi

pids=()     # of the processes that still run, by number
signalled=""
pass_on() {
  signalled="$1"
  kill -"$1" ${pids[@]+"${pids[@]}"} 2>/dev/null || true
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

logs="${LOGS:-$(mktemp -d)}"
mkdir -p "$logs"

# Runs the set once; `code` is then the exit code of the first that failed, or 0.
run_set() {
  local i port ended stop_at="" kill_at=""
  port="$(python -c 'import socket
with socket.socket() as s:
  s.bind(("localhost", 0))
  print(s.getsockname()[1])')"
  code=0
  # Job control gives each process a group of its own. Without it the shell would have them
  # ignore SIGINT, and the terminal's Ctrl-C would reach them beside the one passed on.
  set -m
  for ((i = 0; i < processes; i++)); do
    command_of "$i" "$port" "$@"
    if ((i == 0)); then
      "${command[@]}" </dev/null &
    else
      "${command[@]}" </dev/null >"$logs/$i.log" 2>&1 &
    fi
    pids[i]=$!
  done
  set +m
  [[ -z "$signalled" ]] || pass_on "$signalled"  # it came while they were being started

  while ((${#pids[@]})); do
    for i in "${!pids[@]}"; do
      kill -0 "${pids[i]}" 2>/dev/null && continue
      ended=0
      wait "${pids[i]}" 2>/dev/null || ended=$?
      unset "pids[i]"
      if ((ended == 0 || code != 0)); then continue; fi
      code="$ended"
      say "process $i of $processes ended with exit code $code"
      if ((i > 0 && code != 75)); then tail -n 40 "$logs/$i.log" | sed "s/^/[$i] /" >&2; fi
      # All are about to end as this one did where it was preempted: a signal could only cut
      # off what they are saving. After a signal to the launcher, its sender has the patience.
      [[ -n "$signalled" ]] || stop_at=$((SECONDS + (code == 75 ? grace : 0)))
    done
    if [[ -n "$stop_at" ]] && ((SECONDS >= stop_at && ${#pids[@]})); then
      kill -TERM "${pids[@]}" 2>/dev/null || true
      stop_at="" kill_at=$((SECONDS + grace))
    fi
    if [[ -n "$kill_at" ]] && ((SECONDS >= kill_at && ${#pids[@]})); then
      for i in "${!pids[@]}"; do kill -KILL -- "-${pids[i]}" 2>/dev/null || true; done
      kill_at=""
    fi
    if ((${#pids[@]})); then sleep 0.1 || true; fi
  done
}

restarts="${RESTARTS:-0}"
while true; do
  run_set "$@"
  if settled "$code" || [[ -n "$signalled" ]] || ((restarts == 0)); then break; fi
  restarts=$((restarts - 1))
  say "starting again; $restarts restarts are left after this one"
done
if ((code == 0)); then
  [[ -n "${LOGS:-}" ]] || rm -r "$logs"
elif ((processes > 1)); then
  say "output of processes 1 to $((processes - 1)): $logs"
fi
exit "$code"
