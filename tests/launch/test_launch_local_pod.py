"""The pod on this machine: joined, stopped together, started again."""

import os
import signal

import pytest

# Does what $PLAN says for its process and the number of starts so far, such as
# "0:exit 3,1:last": exit CODE; last, until SIGTERM, then saves and exits with 75; stubborn.
TRAIN = """
import os, signal, sys, time
flags = dict(x[2:].split("=", 1) for x in sys.argv[1:])
me = flags["process_id"]
def note(what):
  with open(os.environ["JOURNAL"], "a") as file:
    file.write(f"{me} {what}\\n")
note("start")
with open(os.environ["JOURNAL"]) as file:
  round_ = file.read().splitlines().count(f"{me} start")
plan = dict(p.split(":") for p in os.environ["PLAN"].split("|")[round_ - 1].split(","))
print("hello from", me, flush=True)
what, *numbers = plan[me].split()
def save(*_):
  note("term")
  time.sleep(0.5)
  note("saved")
  sys.exit(75)
signal.signal(signal.SIGTERM, signal.SIG_IGN if what == "stubborn" else save)
try:
  with open(os.environ["STUBS"] + "/pid-" + me, "w") as file:
    file.write(str(os.getpid()))
  note("ready")
  if what == "after":  # ends with numbers[0], half a second after the start
    time.sleep(0.5)
  if what in ("exit", "after"):
    sys.exit(int(numbers[0]))
  time.sleep(100)
except KeyboardInterrupt:
  note("interrupted")
  sys.exit(130)
"""


@pytest.fixture
def pod(launches):
  launches.train(TRAIN)
  return launches


def test_the_processes_are_told_of_each_other(launches):
  launches.train(
    "import os, sys\n"
    "line = ' '.join([*sys.argv[1:], os.environ['JAX_PLATFORMS'],"
    " os.environ['XLA_FLAGS'].split()[-1]])\n"
    "open(os.environ['JOURNAL'], 'a').write(line + '\\n')\n"
  )
  done = launches.run(
    "local_pod.sh",
    "3",
    "configs/demo.py",
    "--workdir=x",
    DEVICES_PER_PROCESS="4",
    XLA_FLAGS="--xla_force_host_platform_device_count=8",
  )
  assert done.returncode == 0, done.stderr
  lines = sorted(launches.journal(), key=lambda line: line.split()[2])
  coordinator = lines[0].split()[0]
  assert coordinator.startswith("--coordinator=localhost:")
  assert int(coordinator.rsplit(":")[-1]) > 0
  assert lines == [
    f"{coordinator} --processes=3 --process_id={i} --config=configs/demo.py --workdir=x "
    "cpu --xla_force_host_platform_device_count=4"
    for i in range(3)
  ]


def test_they_join_in_jax(launches):
  launches.train(
    "import sys\n"
    "flags = dict(x[2:].split('=', 1) for x in sys.argv[1:])\n"
    "import jax\n"
    "from jax.experimental import multihost_utils\n"
    "me = int(flags['process_id'])\n"
    "jax.distributed.initialize(flags['coordinator'], int(flags['processes']), me)\n"
    "everyone = multihost_utils.process_allgather(jax.numpy.array([me + 10]))\n"
    "print(everyone.ravel().tolist(), jax.local_device_count(), jax.device_count())\n"
  )
  done = launches.run(
    "local_pod.sh", "2", "configs/demo.py", DEVICES_PER_PROCESS="2", XLA_FLAGS=""
  )
  assert done.returncode == 0, done.stderr
  assert "[10, 11] 2 4" in done.stdout.splitlines()


def test_process_0_is_shown_and_the_others_kept(pod):
  logs = pod.folder / "logs"
  done = pod.run(
    "local_pod.sh", "2", "configs/demo.py", PLAN="0:exit 0,1:exit 0", LOGS=str(logs)
  )
  assert done.returncode == 0
  assert (done.stdout, done.stderr) == ("hello from 0\n", "")
  assert (logs / "1.log").read_text() == "hello from 1\n"


def test_one_that_dies_stops_the_others(pod):
  done = pod.run("local_pod.sh", "3", "configs/demo.py", PLAN="0:last,1:after 3,2:last")
  assert done.returncode == 3
  assert {"0 term", "0 saved", "2 term", "2 saved"} <= set(pod.journal())
  assert "process 1 of 3 ended with exit code 3" in done.stderr
  assert "[1] hello from 1" in done.stderr
  assert "[2]" not in done.stderr


def test_what_ignores_sigterm_is_killed(pod):
  plan = "0:stubborn,1:after 3"
  done = pod.run("local_pod.sh", "2", "configs/demo.py", PLAN=plan, GRACE="1")
  assert done.returncode == 3


def test_a_killed_process_counts_as_a_failure(pod):
  process = pod.start("local_pod.sh", "2", "configs/demo.py", PLAN="0:last,1:last")
  pod.await_journal("1 ready")
  pod.await_journal("0 ready")
  os.kill(int((pod.folder / "pid-1").read_text()), signal.SIGKILL)
  _, err = process.communicate(timeout=90)
  assert process.returncode == 137, err
  assert "0 saved" in pod.journal()


def test_preempted_ones_are_left_to_save(pod):
  """The first exits with 75 while the other, preempted as well, still saves."""
  done = pod.run(
    "local_pod.sh", "2", "configs/demo.py", PLAN="0:exit 75,1:after 75", GRACE="5"
  )
  assert done.returncode == 75
  assert "1 term" not in pod.journal()


def test_a_preempted_set_is_started_again(pod):
  done = pod.run(
    "local_pod.sh",
    "2",
    "configs/demo.py",
    PLAN="0:exit 75,1:exit 75|0:exit 0,1:exit 0|never",
    RESTARTS="5",
  )
  assert done.returncode == 0, done.stderr
  assert (
    sorted(x for x in pod.journal() if "start" in x)
    == ["0 start"] * 2 + ["1 start"] * 2
  )


@pytest.mark.parametrize(
  ("code", "restarts", "starts"), [(75, 0, 1), (75, 2, 3), (1, 1, 2), (2, 2, 1)]
)
def test_restarts_are_bounded_and_a_mistake_has_none(pod, code, restarts, starts):
  done = pod.run(
    "local_pod.sh",
    "1",
    "configs/demo.py",
    PLAN="|".join([f"0:exit {code}"] * 4),
    RESTARTS=str(restarts),
  )
  assert done.returncode == code
  assert pod.journal().count("0 start") == starts


@pytest.mark.parametrize(
  ("sent", "noted", "code"),
  [(signal.SIGTERM, "saved", 75), (signal.SIGINT, "interrupted", 130)],
)
def test_signals_reach_all_and_are_not_followed_by_a_restart(pod, sent, noted, code):
  process = pod.start(
    "local_pod.sh", "2", "configs/demo.py", PLAN="0:last,1:last", RESTARTS="3"
  )
  pod.await_journal("0 ready")
  pod.await_journal("1 ready")
  process.send_signal(sent)
  _, err = process.communicate(timeout=90)
  assert process.returncode == code, err
  journal = pod.journal()
  assert [journal.count(f"{i} {noted}") for i in (0, 1)] == [1, 1]
  assert journal.count("0 start") == 1
