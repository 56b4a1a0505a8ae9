"""The Slurm job, with srun, squeue and scontrol played by stubs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def job(launches):
  launches.stub(
    "srun",
    '#!/bin/sh\nprintf "%s\\n" "$@"\necho "gpus ${JAX_LOCAL_DEVICE_IDS-any}"\n'
    "exit ${SRUN_EXITS:-0}\n",
  )
  launches.stub(
    "squeue",
    '#!/bin/sh\n[ "$*" = "--noheader --jobs=17 --format=%T" ] && echo "$JOB_STATE"\n',
  )
  launches.stub("scontrol", '#!/bin/sh\necho "$@" >>"$JOURNAL"\n')
  launches.environment |= {
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_JOB_ID": "17",
    "SLURM_CPUS_PER_TASK": "12",
    "JOB_STATE": "RUNNING",
  }
  return launches


def test_every_task_gets_its_cores_and_the_flags(job):
  done = job.run("slurm.sbatch", "configs/tinyclip.py", "--workdir=a b")
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
    "--cpus-per-task=12",
    "--wait=600",
    "python",
    "-m",
    "gcl_jax.train",
    "--distributed",
    "--config=configs/tinyclip.py",
    "--workdir=a b",
    "gpus any",
  ]
  assert job.journal() == []


@pytest.mark.parametrize(("tasks", "gpus"), [("1", "0,1,2,3"), ("4", "any")])
def test_one_process_per_node_has_all_its_gpus(job, tasks, gpus):
  done = job.run(
    "slurm.sbatch", "x.py", SLURM_NTASKS_PER_NODE=tasks, SLURM_GPUS_ON_NODE="4"
  )
  assert done.stdout.splitlines()[-1] == f"gpus {gpus}"


@pytest.mark.parametrize(("given", "visible"), [(None, "0"), ("0,1,2,3", "0,1,2,3")])
def test_jax_shows_a_process_the_gpus_that_the_job_names(given, visible):
  """Without JAX_LOCAL_DEVICE_IDS it is one GPU, that of the process's local number."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  environment = {
    **os.environ,
    "JAX_COORDINATOR_PORT": str(port),
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
  }
  if given:
    environment["JAX_LOCAL_DEVICE_IDS"] = given
  done = subprocess.run(
    [
      sys.executable,
      "-c",
      "import jax; jax.distributed.initialize();"
      " print(jax.config.values['jax_cuda_visible_devices'])",
    ],
    env=environment,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == [visible]


@pytest.mark.parametrize(
  ("code", "state", "requeued"),
  [
    (75, "RUNNING", ["requeue 17"]),
    (75, "COMPLETING", []),  # scancel: it is not to come back
    (2, "RUNNING", []),
    (1, "RUNNING", []),
    (0, "RUNNING", []),
  ],
)
def test_only_a_preempted_job_goes_back_into_the_queue(job, code, state, requeued):
  done = job.run("slurm.sbatch", "x.py", SRUN_EXITS=str(code), JOB_STATE=state)
  assert done.returncode == code
  assert job.journal() == requeued


def test_the_steps_are_warned_in_time():
  options = [
    line.removeprefix("#SBATCH ").split("=")
    for line in (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    if line.startswith("#SBATCH ")
  ]
  options = dict(option if len(option) == 2 else (*option, "") for option in options)
  assert options["--signal"] == "TERM@120"  # with B: srun would kill its tasks
  assert "--requeue" in options
  assert options["--open-mode"] == "append"  # the requeued job's output follows
