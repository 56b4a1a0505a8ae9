#!/usr/bin/env bash
# Runs one command on every worker of a TPU slice that exists:
#   TPU_NAME=my-slice ZONE=us-central2-b launch/tpu_pod.sh configs/tinyclip.py --workdir=...
# Copies this checkout to the workers, installs, trains. --dry-run prints the commands.
set -euo pipefail
cd "$(dirname "$0")/.."
dry=""
if [[ "${1:-}" == "--dry-run" ]]; then
  dry=1
  shift
fi
config="${1:?usage: launch/tpu_pod.sh [--dry-run] configs/NAME.py [flags]}"
shift
: "${TPU_NAME:?set TPU_NAME to the name of the slice}"
: "${ZONE:?set ZONE to its zone}"

run() {
  if [[ -n "$dry" ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}
on_all_workers() {
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="$1"
}

flags="$(printf ' %q' "$@")"
archive="$(mktemp -d)/gcl_jax.tar.gz"
run git archive --format=tar.gz --output="$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:gcl_jax.tar.gz" \
  --zone="$ZONE" --worker=all
on_all_workers "mkdir -p gcl_jax && tar -xzf gcl_jax.tar.gz -C gcl_jax"
on_all_workers "cd gcl_jax && pip install -q -r requirements.txt 'jax[tpu]'"
on_all_workers "cd gcl_jax && python -m gcl_jax.train --distributed --config=$config$flags"
