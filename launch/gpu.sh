#!/usr/bin/env bash
# All GPUs of one machine:  launch/gpu.sh configs/tinyclip.py --config.data.path=...
# Needs: pip install -r requirements.txt "jax[cuda13]" (or jax[cuda12]).
# Runs from the root of the repository: relative paths (--workdir too) are meant from there.
set -euo pipefail
cd "$(dirname "$0")/.."
config="${1:?usage: launch/gpu.sh configs/NAME.py [flags]}"
shift
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
python - <<'PYTHON'
import sys

import jax

if jax.default_backend() != "gpu":
  sys.exit('error: JAX sees no GPU. Install its CUDA build: pip install "jax[cuda13]"')
print(f"{jax.device_count()} x {jax.devices()[0].device_kind}", file=sys.stderr)
PYTHON
exec python -m gcl_jax.train --config="$config" --config.model.dtype=bfloat16 "$@"
