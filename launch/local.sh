#!/usr/bin/env bash
# One machine, whatever JAX finds there:  launch/local.sh configs/demo.py [flags of train]
# Runs from the root of the repository: relative paths (--workdir too) are meant from there.
set -euo pipefail
cd "$(dirname "$0")/.."
config="${1:?usage: launch/local.sh configs/NAME.py [flags]}"
shift
exec python -m gcl_jax.train --config="$config" "$@"
