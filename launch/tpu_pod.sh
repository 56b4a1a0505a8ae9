#!/usr/bin/env bash
# A TPU slice, from this machine, through gcloud. On a slice that exists:
#   export TPU_NAME=my-slice ZONE=us-west4-a
#   launch/tpu_pod.sh configs/tinyclip.py --workdir=gs://bucket/runs/a \
#     --config.data.path=gs://bucket/data
# On one that is created first, and again whenever it is preempted:
#   export ACCELERATOR_TYPE=v5litepod-16 RUNTIME_VERSION=v2-alpha-tpuv5-lite SPOT=1
#   launch/tpu_pod.sh configs/tinyclip.py --workdir=gs://bucket/runs/a ...
#
#   tpu_pod.sh [run] configs/NAME.py FLAGS  create it where needed, install, train, follow;
#                                     restart where it was preempted. Once more with the same
#                                     words: follow what runs
#   tpu_pod.sh create | delete        the slice (a queued resource of the same name)
#   tpu_pod.sh install                this checkout's last commit, and its requirements
#   tpu_pod.sh follow | stop          the run that goes on; stop lets it save first
#   tpu_pod.sh fetch gs://.../a DIR   copies a run's folder here
# --dry-run prints the commands. The run outlives this terminal: Ctrl-C ends only the
# following. --workdir must be a bucket (gs://) or the path of storage that all workers mount.
# The data too, or it must be copied to each. Flags of one's own for creating the slice:
# CREATE_FLAGS="--network=..."; PROJECT where it is not gcloud's default. RETRIES=3: how often
# a failure (not a preemption) may be followed by another start. Several workers need the key
# in ssh's agent: ssh-add ~/.ssh/google_compute_engine
# TPU7x and later are not in this API: launch/gke_jobset.sh.
set -euo pipefail
shopt -s extglob
cd "$(dirname "$0")/.."
source launch/common.sh
take_arguments "$@"
set -- ${arguments[@]+"${arguments[@]}"}
verb="${1-}"
case "$verb" in
  configs/* | *.py | *.py:*) verb=run ;;
  '') ;;
  *) shift ;;
esac
worker=gcl_jax/launch/tpu_worker.sh
poll="${POLL:-30}"  # seconds between two looks at a slice
usage="launch/tpu_pod.sh [--dry-run] [run] configs/NAME.py --workdir=gs://... [flags] | create \
| install | follow | stop | fetch gs://... DIR | delete"

place=(--zone="${ZONE-}")
[[ -z "${PROJECT:-}" ]] || place+=(--project="$PROJECT")
tpus() {
  run gcloud compute tpus "$@" "${place[@]}"
}
on_workers() {  # command $2 on worker $1, or on all
  tpus tpu-vm ssh "$TPU_NAME" --worker="$1" --command="$2"
}
quoted() {  # words for a worker's shell
  local words
  words="$(printf ' %q' "$@")"
  printf '%s' "${words:1}"
}
named() {  # the state of what is called TPU_NAME among $1; nothing where there is none
  gcloud compute tpus "$1" list --filter="name~\"(^|/)$TPU_NAME\$\"" --format="value($2)" \
    "${place[@]}"
}

request() {  # a slice; Google's queue gives it when there is room
  if [[ -z "${ACCELERATOR_TYPE:-}" || -z "${RUNTIME_VERSION:-}" ]]; then
    fail "to create $TPU_NAME, set ACCELERATOR_TYPE (such as v5litepod-16) and RUNTIME_VERSION \
(such as v2-alpha-tpuv5-lite)."
  fi
  # shellcheck disable=SC2086  # CREATE_FLAGS holds several
  tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" \
    --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" \
    ${SPOT:+--spot} ${CREATE_FLAGS:-}
}

delete() {
  local queued=dry node
  [[ -n "$dry" ]] || queued="$(named queued-resources state.state)"
  if [[ -n "$queued" ]]; then
    tpus queued-resources delete "$TPU_NAME" --quiet --force
  else  # made without a queue, if it is there
    node="$(named tpu-vm state)"
    [[ -z "$node" ]] || tpus tpu-vm delete "$TPU_NAME" --quiet
  fi
}

# Waits for a slice that can be used; requests one where there is none or it was preempted.
# `fresh` is then whether it is another one than before.
ready() {
  local node queued seen="" failures=0
  fresh=""
  if [[ -n "$dry" ]]; then
    [[ -z "${ACCELERATOR_TYPE:-}" && "$verb" != create ]] || request
    return
  fi
  while true; do
    if node="$(named tpu-vm state)" && queued="$(named queued-resources state.state)"; then
      known=1 failures=0
    elif [[ -n "${known:-}" ]] && ((++failures < 10)); then  # the network, perhaps
      sleep "$poll"
      continue
    else
      exit 1
    fi
    [[ "$node/$queued" == "$seen" ]] || say "$TPU_NAME: ${node:-no slice}${queued:+, $queued}"
    seen="$node/$queued"
    case "$node/$queued" in
      READY/*) return ;;
      */FAILED) fail "the request for $TPU_NAME failed. Why: gcloud compute tpus \
queued-resources describe $TPU_NAME ${place[*]}. To remove it: launch/tpu_pod.sh delete" ;;
      / | PREEMPTED/* | TERMINATED/* | /SUSPENDED)
        [[ -z "$node$queued" || -z "${ACCELERATOR_TYPE:-}" ]] || delete
        request
        fresh=1
        sleep "$poll"
        ;;
      *) sleep "$poll" ;;
    esac
  done
}

install() {
  local archive=/tmp/gcl_jax.tar.gz
  [[ -n "$dry" ]] || archive="$(mktemp -d)/gcl_jax.tar.gz"
  run git archive --format=tar.gz --output="$archive" HEAD &&
    tpus tpu-vm scp "$archive" "$TPU_NAME:gcl_jax.tar.gz" --worker=all &&
    on_workers all "rm -rf gcl_jax && mkdir gcl_jax && tar -xzf gcl_jax.tar.gz -C gcl_jax" &&
    on_workers all "$worker install"
}

follow() {  # until the run ends; `code` is then its exit code
  local ends end
  trap 'say "the run goes on: launch/tpu_pod.sh follow, or stop"; exit 130' INT
  on_workers 0 "$worker follow" || true  # how it ended is asked for below
  code=0
  ends="$(on_workers all "$worker wait")" || code=1
  if [[ -n "$dry" ]]; then
    printf '%s\n' "$ends"
    return
  fi
  # Of several codes: what forbids another start, else a preemption, else any failure.
  while IFS="=" read -r _ end; do
    [[ "$end" == 0 ]] || code="$end"
  done < <(grep -x 'exit=[0-9]*' <<<"$ends")
  for end in 75 130 2; do
    if grep -qx "exit=$end" <<<"$ends"; then code="$end"; fi
  done
}

train() {
  local retries="${RETRIES:-3}" installed="" ours
  (($#)) || fail "usage: $usage"
  [[ " $* " == *" --workdir="@(gs://|/)* ]] || fail "add --workdir=gs://BUCKET/FOLDER (or the \
path of storage that every worker mounts): the workers share the run's folder."
  ours="$(quoted python -m gcl_jax.train --distributed --config="$1" "${@:2}")"
  while true; do
    ready
    if [[ -z "$dry$installed$fresh" ]]; then  # perhaps it runs already
      code=0
      on_workers all "test -x $worker && $worker attach $ours" || code=$?
      ((code != 2)) || exit 2
      ((code != 0)) || installed=1
    fi
    code=0
    if [[ -z "$installed" || -n "$fresh" ]]; then install || code=$?; fi
    if ((code == 0)); then
      installed=1
      on_workers all "$worker start $ours" || code=$?
    fi
    ((code != 0)) || follow
    if [[ -n "$dry" ]] || settled "$code"; then break; fi
    if ((code != 75)) && [[ "$(named tpu-vm state)" == READY ]]; then
      ((retries > 0)) || break
      retries=$((retries - 1))
    fi
    say "ended with exit code $code; starting again"
    sleep "$poll"
  done
  exit "$code"
}

if [[ "$verb" != fetch && (-z "${TPU_NAME:-}" || -z "${ZONE:-}") ]]; then
  fail "set TPU_NAME to the name of the slice, and ZONE to its zone."
fi
case "$verb" in
  run) train "$@" ;;
  create) ready ;;
  install) install ;;
  follow) follow && exit "$code" ;;
  stop) on_workers all "$worker stop" ;;
  delete) delete ;;
  fetch)
    (($# == 2)) || fail "usage: launch/tpu_pod.sh fetch gs://BUCKET/FOLDER DIR"
    run mkdir -p "$2"
    run gcloud storage rsync --recursive "$1" "$2"
    ;;
  *) fail "usage: $usage" ;;
esac
