#!/usr/bin/env bash
# Runs one command on every worker of a TPU slice that exists:
#   TPU_NAME=my-slice ZONE=us-central2-b launch/tpu_pod.sh configs/tinyclip.py \
#     --workdir=/mnt/bucket/runs/a --config.data.path=/mnt/bucket/data
# Copies this checkout's last commit to the workers (to gcl_jax in the home folder), installs,
# trains. --dry-run prints the commands. --workdir must be on storage that all workers share,
# such as a bucket mounted at the same place on each; so must the data, or be copied to each.
# Relative paths are meant from the copy on each worker, so they are not shared.
set -euo pipefail
cd "$(dirname "$0")/.."
dry=""
arguments=()
for argument in "$@"; do
  if [[ "$argument" == "--dry-run" ]]; then dry=1; else arguments+=("$argument"); fi
done
set -- ${arguments[@]+"${arguments[@]}"}
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

flags=""
if (($#)); then  # printf without arguments would print an empty one
  flags="$(printf ' %q' "$@")"
fi
archive="$(mktemp -d)/gcl_jax.tar.gz"
run git archive --format=tar.gz --output="$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:gcl_jax.tar.gz" \
  --zone="$ZONE" --worker=all
on_all_workers "mkdir -p gcl_jax && tar -xzf gcl_jax.tar.gz -C gcl_jax"
on_all_workers "cd gcl_jax && pip install -q -r requirements.txt 'jax[tpu]'"
on_all_workers "cd gcl_jax && python -m gcl_jax.train --distributed --config=$config$flags"
