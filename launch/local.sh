#!/usr/bin/env bash
# One machine, whatever JAX finds there:  launch/local.sh configs/demo.py [flags of train]
# --dry-run prints the command. Runs from the root of the repository: relative paths
# (--workdir too) are meant from there.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
take_arguments "$@"
set -- ${arguments[@]+"${arguments[@]}"}
(($#)) || fail "usage: launch/local.sh [--dry-run] configs/NAME.py [flags of train]"
config="$1"
shift
become python -m gcl_jax.train --config="$config" "$@"
