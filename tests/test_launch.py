"""The launchers: valid shell, and what they would run."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "launch").iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_valid_shell_and_run_the_one_entry_point(script):
  subprocess.run(["bash", "-n", script], check=True)
  text = script.read_text()
  assert "python -m gcl_jax.train" in text
  assert "set -euo pipefail" in text


def test_the_pod_launcher_can_be_rehearsed():
  done = subprocess.run(
    [
      "bash",
      ROOT / "launch" / "tpu_pod.sh",
      "--dry-run",
      "configs/tinyclip.py",
      "--config.data.path=a b",
    ],
    capture_output=True,
    text=True,
    env={**os.environ, "TPU_NAME": "slice", "ZONE": "zone"},
  )
  assert done.returncode == 0, done.stderr
  assert "gcloud compute tpus tpu-vm ssh slice --zone=zone --worker=all" in done.stdout
  assert "gcl_jax.train" in done.stdout
  assert "a\\" in done.stdout  # the blank is quoted for the worker's shell


@pytest.mark.parametrize(
  "arguments", [("--dry-run", "configs/demo.py"), ("configs/demo.py", "--dry-run")]
)
def test_a_dry_run_is_dry_wherever_it_is_asked_for(arguments):
  done = subprocess.run(
    ["bash", ROOT / "launch" / "tpu_pod.sh", *arguments],
    capture_output=True,
    text=True,
    env={**os.environ, "TPU_NAME": "slice", "ZONE": "zone"},
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.rstrip().endswith("--config=configs/demo.py")


def test_slurm_hands_every_task_its_cores(tmp_path):
  srun = tmp_path / "srun"
  srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
  srun.chmod(0o755)
  done = subprocess.run(
    ["bash", ROOT / "launch" / "slurm.sbatch", "configs/tinyclip.py", "--workdir=a b"],
    capture_output=True,
    text=True,
    env={
      **os.environ,
      "PATH": f"{tmp_path}:{os.environ['PATH']}",
      "SLURM_SUBMIT_DIR": str(ROOT),
      "SLURM_CPUS_PER_TASK": "12",
    },
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
    "--cpus-per-task=12",
    "python",
    "-m",
    "gcl_jax.train",
    "--distributed",
    "--config=configs/tinyclip.py",
    "--workdir=a b",
  ]


def test_a_launcher_without_a_recipe_says_how_it_is_used():
  done = subprocess.run(
    ["bash", ROOT / "launch" / "local.sh"], capture_output=True, text=True
  )
  assert done.returncode != 0
  assert "usage: launch/local.sh configs/NAME.py" in done.stderr
