#!/usr/bin/env bash
# A TPU slice on Google Kubernetes Engine: fills launch/gke_jobset.yaml in and submits it.
#   docker build -f launch/Dockerfile --build-arg JAX="jax[tpu] gcsfs" -t REGISTRY/gcl_jax .
#   docker push REGISTRY/gcl_jax
#   IMAGE=REGISTRY/gcl_jax launch/gke_jobset.sh configs/tinyclip.py \
#     --workdir=gs://bucket/runs/a --config.data.path=gs://bucket/data
# --dry-run prints what it would submit; a cluster checks it with
#   ... --dry-run | kubectl create --dry-run=server -f -
# Settings, with what they are by default: NAME=gcl-jax ACCELERATOR=tpu-v5-lite-podslice
# TOPOLOGY=4x4 CHIPS=4 (of one machine) GRACE=120 (seconds) MAX_RESTARTS=3
# To watch it:     kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=gcl-jax
# To end it:       kubectl delete jobset gcl-jax
set -euo pipefail
shopt -s extglob
cd "$(dirname "$0")/.."
source launch/common.sh
take_arguments "$@"
set -- ${arguments[@]+"${arguments[@]}"}
(($#)) || fail "usage: IMAGE=... launch/gke_jobset.sh [--dry-run] configs/NAME.py \
--workdir=gs://... [flags of train]"
[[ -n "${IMAGE:-}" ]] || fail "set IMAGE to the image that launch/Dockerfile builds, in a \
registry that the cluster reads."
[[ " $* " == *" --workdir="@(gs://|/)* ]] || fail "add --workdir=gs://BUCKET/FOLDER: a pod's \
own disk goes with the pod."
filled="$(python - "$@" <<'PYTHON'
import json
import math
import os
import re
import string
import sys

settings = {
  "NAME": "gcl-jax",
  "ACCELERATOR": "tpu-v5-lite-podslice",
  "TOPOLOGY": "4x4",
  "CHIPS": "4",
  "GRACE": "120",
  "MAX_RESTARTS": "3",
}
values = {name: os.environ.get(name) or value for name, value in settings.items()}
if not re.fullmatch(r"\d+(x\d+){1,2}", values["TOPOLOGY"]):
  sys.exit(f"error: TOPOLOGY={values['TOPOLOGY']} is not of the form 4x4 or 2x2x4")
chips = math.prod(map(int, values["TOPOLOGY"].split("x")))
hosts, rest = divmod(chips, int(values["CHIPS"]))
if rest or not hosts:
  sys.exit(f"error: {chips} chips do not come in machines of CHIPS={values['CHIPS']}")
config, *flags = sys.argv[1:]
# Kubernetes would take $(NAME) for a variable of the container's.
arguments = ["--distributed", f"--config={config}", *flags]
values["ARGS"] = json.dumps(arguments).replace("$(", "$$(")
values["HOSTS"] = str(hosts)
values["IMAGE"] = os.environ["IMAGE"]
with open("launch/gke_jobset.yaml", encoding="utf-8") as file:
  lines = [line for line in file if not line.startswith("#")]
print(string.Template("".join(lines)).substitute(values), end="")
PYTHON
)" || exit 2
if [[ -n "$dry" ]]; then
  printf '%s\n' "$filled"
else
  kubectl create -f - <<<"$filled"
fi
