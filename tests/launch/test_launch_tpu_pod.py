"""A slice of two workers, played by a stub gcloud that runs the workers' commands here."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

# The state of the cloud is $STUBS/cloud.json; worker I's home is $STUBS/worker-I. Calls that
# change something are noted in $JOURNAL.
GCLOUD = r"""
import json, os, pathlib, re, shutil, signal, subprocess, sys
stubs = pathlib.Path(os.environ["STUBS"])
state = stubs / "cloud.json"
cloud = json.loads(state.read_text())
words = [w for w in sys.argv[1:] if not w.startswith("--")]
flags = dict(w[2:].partition("=")[::2] for w in sys.argv[1:] if w.startswith("--"))
def note(*what):
  with open(os.environ["JOURNAL"], "a") as file:
    print(*what, file=file)
def homes():
  return [stubs / f"worker-{i}" for i in range(2)]
if words[0] == "storage":
  note("storage", *sys.argv[2:])
  sys.exit()
kind, verb = words[2:4]
assert flags["zone"] == "zone", flags
if verb == "list":
  assert flags["filter"] == 'name~"(^|/)slice$"', flags
  assert flags["format"] == {"tpu-vm": "value(state)"}.get(kind, "value(state.state)")
  print(cloud[kind])
elif verb == "create":
  note("create", *sorted(w for w in sys.argv[5:] if not w.startswith("--zone")))
  for home in homes():
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
  state.write_text(json.dumps({"tpu-vm": "READY", "queued-resources": "ACTIVE"}))
elif verb == "delete":
  note("delete", kind, *[f for f in flags if f in ("force", "quiet")])
  if kind == "queued-resources" and "force" not in flags:
    sys.exit("it has nodes")
  state.write_text(json.dumps({"tpu-vm": "", "queued-resources": ""}))
elif cloud["tpu-vm"] != "READY":
  sys.exit("the slice is " + cloud["tpu-vm"])
elif verb == "scp":
  note("scp")
  assert flags["worker"] == "all" and words[5] == "slice:gcl_jax.tar.gz"
  for home in homes():
    shutil.copy(words[4], home / "gcl_jax.tar.gz")
elif verb == "ssh":
  chosen = homes() if flags["worker"] == "all" else [homes()[int(flags["worker"])]]
  running = [
    subprocess.Popen(
      ["bash", "-c", flags["command"]],
      cwd=home,
      env={**os.environ, "HOME": str(home)},
      start_new_session=True,
    )
    for home in chosen
  ]
  codes = [r.wait() for r in running]
  for r in running:  # the connection closes
    try:
      os.killpg(r.pid, signal.SIGHUP)
    except ProcessLookupError:
      pass
  sys.exit(next((code for code in codes if code), 0))
"""

# `python3 -m pip` and `-m uv` on a worker: notes what is installed, makes the environment.
PYTHON3 = """#!/bin/sh
echo "$(basename $HOME)" "$@" >>"$JOURNAL"
[ "$3" = venv ] || exit 0
mkdir -p "$HOME/gcl_jax_venv/bin"
cp "$STUBS/bin/python" "$HOME/gcl_jax_venv/bin/python"
"""

# `git archive`, of the tree as it is rather than of the last commit.
GIT = """#!/bin/sh
[ "$1" = archive ] && [ "$4" = HEAD ] || exit 1
exec tar -czf "${{3#--output=}}" -C {root} launch requirements.txt
"""

# Training on a worker: the next word of $STUBS/plan-I.
TRAIN = r"""
import json, os, pathlib, signal, sys, time
home = pathlib.Path(os.environ["HOME"])
plan = pathlib.Path(os.environ["STUBS"]) / ("plan-" + home.name[-1])
what, *rest = plan.read_text().split()
plan.write_text(" ".join(rest))
def note(text):
  with open(os.environ["JOURNAL"], "a") as file:
    print(home.name, text, file=file)
note("train " + " ".join(sys.argv[1:]))
print("training on", home.name, flush=True)
if what == "preempt":
  (home.parent / "cloud.json").write_text(
    json.dumps({"tpu-vm": "PREEMPTED", "queued-resources": "SUSPENDED"})
  )
  os.kill(os.getpid(), signal.SIGKILL)
if what == "last":
  def save(*_):
    note("saved")
    sys.exit(75)
  signal.signal(signal.SIGTERM, save)
  note("ready")
  time.sleep(60)
sys.exit(int(what))
"""

RECIPE = ("configs/tinyclip.py", "--workdir=gs://bucket/run")
SLICE = {"TPU_NAME": "slice", "ZONE": "zone", "POLL": "0"}
CREATED = {
  "ACCELERATOR_TYPE": "v5litepod-8",
  "RUNTIME_VERSION": "v2-alpha-tpuv5-lite",
  "SPOT": "1",
}


class Cloud:
  def __init__(self, launches):
    self.launches = launches
    launches.stub("gcloud", GCLOUD)
    launches.stub("git", GIT.format(root=ROOT))
    launches.stub("python3", PYTHON3)
    launches.train(TRAIN)
    self.is_("READY")
    for worker in range(2):
      (launches.folder / f"worker-{worker}").mkdir()

  def is_(self, node, queued=""):
    state = {"tpu-vm": node, "queued-resources": queued}
    (self.launches.folder / "cloud.json").write_text(json.dumps(state))

  def plan(self, *workers):
    for worker, plan in enumerate(workers):
      (self.launches.folder / f"plan-{worker}").write_text(plan)

  def run(self, *arguments, **environment):
    return self.launches.run("tpu_pod.sh", *arguments, **SLICE, **environment)

  def starts(self, worker=0):
    return sum(f"worker-{worker} train" in line for line in self.launches.journal())

  def installs(self):
    return self.launches.journal().count("scp")


@pytest.fixture
def cloud(launches):
  cloud = Cloud(launches)
  yield cloud
  for worker in range(2):  # whatever a failed test left running
    pid = launches.folder / f"worker-{worker}" / "gcl_jax_run" / "pid"
    if pid.exists() and not (pid.parent / "exit").exists():
      os.kill(int(pid.read_text()), signal.SIGKILL)


def test_a_run_on_a_slice_that_exists(cloud):
  cloud.plan("0", "0")
  done = cloud.run(*RECIPE, "--config.name=a b")
  assert done.returncode == 0, done.stderr
  assert "training on worker-0" in done.stdout
  journal = cloud.launches.journal()
  trained = (
    "train --distributed --config=configs/tinyclip.py --workdir=gs://bucket/run "
    "--config.name=a b"
  )
  for worker in ("worker-0", "worker-1"):
    assert f"{worker} {trained}" in journal
    assert any(
      re.fullmatch(rf"{worker} -m uv pip install .*requirements.txt jax\[tpu\].*", line)
      for line in journal
    )
  assert not any(line.startswith(("create", "delete")) for line in journal)


def test_preempted_with_its_state_saved_it_goes_on_and_does_not_count(cloud):
  cloud.plan("75 75 0", "75 75 0")
  done = cloud.run(*RECIPE, RETRIES="0")
  assert done.returncode == 0, done.stderr
  assert (cloud.starts(), cloud.starts(1), cloud.installs()) == (3, 3, 1)


@pytest.mark.parametrize("plans", [("2 0", "2 0"), ("1 0", "2 0"), ("2 0", "75 0")])
def test_a_mistake_on_any_worker_is_not_repeated(cloud, plans):
  cloud.plan(*plans)
  done = cloud.run(*RECIPE)
  assert done.returncode == 2
  assert cloud.starts() == 1


def test_failures_are_repeated_a_few_times_and_shown(cloud):
  cloud.plan("0 0 0", "7 7 0")
  done = cloud.run(*RECIPE, RETRIES="1")
  assert done.returncode == 7
  assert cloud.starts() == 2
  assert "] training on worker-1" in done.stderr


def test_a_preempted_slice_is_created_anew_and_the_run_goes_on(cloud):
  cloud.plan("preempt 0", "preempt 0")
  done = cloud.run(*RECIPE, RETRIES="0", **CREATED)
  assert done.returncode == 0, done.stderr
  changes = [
    line for line in cloud.launches.journal() if re.match("create|delete|scp", line)
  ]
  assert changes == [
    "scp",
    "delete queued-resources quiet force",
    "create --accelerator-type=v5litepod-8 --node-id=slice "
    "--runtime-version=v2-alpha-tpuv5-lite --spot slice",
    "scp",
  ]


def test_a_slice_that_is_not_there_is_created(cloud):
  cloud.is_("")
  cloud.plan("0", "0")
  done = cloud.run(
    *RECIPE, ACCELERATOR_TYPE="v4-8", RUNTIME_VERSION="tpu-ubuntu2204-base"
  )
  assert done.returncode == 0, done.stderr
  assert (
    "create --accelerator-type=v4-8 --node-id=slice "
    "--runtime-version=tpu-ubuntu2204-base slice" in cloud.launches.journal()
  )


def test_a_lost_slice_of_somebody_elses_making_is_left_alone(cloud):
  cloud.plan("preempt 0", "preempt 0")
  done = cloud.run(*RECIPE)
  assert done.returncode == 2
  assert "set ACCELERATOR_TYPE" in done.stderr
  assert not any(line.startswith("delete") for line in cloud.launches.journal())


def test_a_request_that_failed_is_reported(cloud):
  cloud.is_("", "FAILED")
  done = cloud.run("create", **CREATED)
  assert done.returncode == 2
  assert "the request for slice failed" in done.stderr


def test_stop_lets_the_run_save_and_ends_its_launcher(cloud):
  cloud.plan("last 0", "last 0")
  launcher = cloud.launches.start("tpu_pod.sh", *RECIPE, **SLICE)
  for worker in ("worker-0", "worker-1"):
    cloud.launches.await_journal(f"{worker} ready")
  assert cloud.run("stop").returncode == 0
  _, err = launcher.communicate(timeout=20)
  assert launcher.returncode == 130, err
  assert {"worker-0 saved", "worker-1 saved"} <= set(cloud.launches.journal())
  assert cloud.starts() == 1


def test_the_run_outlives_its_launcher_which_finds_it_again(cloud):
  cloud.plan("last", "last")
  launcher = cloud.launches.start("tpu_pod.sh", *RECIPE, **SLICE)
  for worker in ("worker-0", "worker-1"):
    cloud.launches.await_journal(f"{worker} ready")
  launcher.kill()
  launcher.wait()
  other = cloud.run("configs/demo.py", "--workdir=gs://bucket/other")
  assert other.returncode == 2
  assert "another run goes on: python -m gcl_jax.train --distributed" in other.stderr
  again = cloud.launches.start("tpu_pod.sh", *RECIPE, **SLICE)
  assert again.stdout.readline() == "training on worker-0\n"
  assert cloud.run("stop").returncode == 0
  again.communicate(timeout=20)
  assert again.returncode == 130
  assert (cloud.starts(), cloud.installs()) == (1, 1)


def test_the_other_verbs(cloud):
  assert cloud.run("fetch", "gs://bucket/run", "here").returncode == 0
  assert cloud.run("delete").returncode == 0
  assert cloud.run("delete").returncode == 0  # there is none any more
  assert cloud.run("create", **CREATED).returncode == 0
  assert cloud.run("install").returncode == 0
  assert cloud.run("delete").returncode == 0
  journal = [x for x in cloud.launches.journal() if not x.startswith("worker")]
  assert [re.split(" --acc", line)[0] for line in journal] == [
    "storage rsync --recursive gs://bucket/run here",
    "delete tpu-vm quiet",
    "create",
    "scp",
    "delete queued-resources quiet force",
  ]


@pytest.mark.parametrize(
  ("arguments", "environment", "said"),
  [
    (("configs/demo.py",), SLICE, "add --workdir=gs://"),
    (("configs/demo.py", "--workdir=runs/a"), SLICE, "add --workdir=gs://"),
    (RECIPE, {}, "set TPU_NAME"),
    (("reboot",), SLICE, "usage:"),
    (("fetch", "gs://bucket/run"), {}, "usage:"),
    (("create",), SLICE, "set ACCELERATOR_TYPE"),
  ],
)
def test_mistakes(cloud, arguments, environment, said):
  cloud.is_("")
  done = cloud.launches.run("tpu_pod.sh", *arguments, **environment)
  assert done.returncode == 2
  assert said in done.stderr
  assert cloud.launches.journal() == []


def test_a_dry_run_prints_commands_that_gcloud_takes(cloud):
  done = cloud.run("--dry-run", *RECIPE, "--config.name=a b", **CREATED)
  assert done.returncode == 0, done.stderr
  calls = done.stdout.splitlines()
  assert calls[0].startswith("gcloud compute tpus queued-resources create slice ")
  # What is printed is what a shell would run: the stub gcloud takes it.
  for call in calls:
    assert not call.startswith("gcloud") or "--zone=zone" in call
  start = next(call for call in calls if "tpu_worker.sh\\ start" in call)
  said = subprocess.run(
    ["bash", "-c", f"gcloud() {{ printf '%s\\n' \"$@\"; }}; {start}"],
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  assert (
    "--command=gcl_jax/launch/tpu_worker.sh start python -m gcl_jax.train --distributed "
    r"--config=configs/tinyclip.py --workdir=gs://bucket/run --config.name=a\ b" in said
  )


def test_a_worker_without_a_verb_says_which_there_are(launches):
  home = launches.folder / "home"
  home.mkdir()
  done = launches.run("tpu_worker.sh", HOME=str(home))
  assert done.returncode == 2
  assert "usage: launch/tpu_worker.sh install" in done.stderr
