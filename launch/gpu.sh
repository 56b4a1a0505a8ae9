#!/usr/bin/env bash
# All GPUs of one machine:  launch/gpu.sh configs/tinyclip.py --config.data.path=...
# Needs: pip install -r requirements.txt "jax[cuda13]" (or jax[cuda12]); launch/Dockerfile is
# an image that has them. --dry-run prints the command. Runs from the root of the repository:
# relative paths (--workdir too) are meant from there.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
take_arguments "$@"
set -- ${arguments[@]+"${arguments[@]}"}
(($#)) || fail "usage: launch/gpu.sh [--dry-run] configs/NAME.py [flags of train]"
config="$1"
shift
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
[[ -n "$dry" ]] || python - <<'PYTHON'
import sys

import jax

try:
  gpus = jax.devices("gpu")
except RuntimeError:
  print(
    'error: JAX sees no GPU. Install its CUDA build: pip install "jax[cuda13]"',
    file=sys.stderr,
  )
  sys.exit(2)
print(f"{len(gpus)} x {gpus[0].device_kind}", file=sys.stderr)
PYTHON
become python -m gcl_jax.train --config="$config" --config.model.dtype=bfloat16 "$@"
