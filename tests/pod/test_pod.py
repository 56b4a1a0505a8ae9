"""Several processes of the real entry point: one run, whoever and however many they are."""

import random
import re
import signal
import time

import numpy as np
import pods
import pytest

BATCH, RECORDS = 16, 100


def mesh(data, fsdp, tensor):
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  return [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """Twelve steps of one process with one device."""
  pod = pods.Pod(tmp_path_factory.mktemp("alone"), "--config.steps=12")
  pod.run(1, 1)
  return pod


def test_a_pod_that_is_preempted_goes_on_as_one_process(alone, tmp_path):
  pod = pods.Pod(tmp_path, "--config.steps=12")
  output = pod.run(2, 2, *mesh(1, 2, 2), code=75, TERM_AT=f"1:{4 * BATCH}")
  stopped = int(re.search(r"told to stop: step (\d+) is saved", output)[1])
  assert 4 <= stopped < 12
  widths = pod.widths()
  assert len(widths) == 2
  assert widths[0] == widths[1]
  assert set(widths[0].values()) == {22, 24}
  output = pod.run(1, 2, *mesh(2, 1, 1))
  assert f"going on from step {stopped}\n" in output
  pods.assert_near(pod.losses(), alone.losses(), 1e-4)
  assert pod.consumed() == alone.consumed()


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_fails_alone_holds_nobody(tmp_path, process):
  # A save of the fourth step is under way, and asks the others for barriers.
  pod = pods.Pod(tmp_path, "--config.steps=12", "--config.checkpoint.every=4")
  started = time.monotonic()
  logs = tmp_path / "logs"
  output = pod.run(2, 1, code=1, FAIL_AT=f"{process}:{5 * BATCH}", LOGS=str(logs))
  said = [output, (logs / "1.log").read_text()]
  assert "a disk of this machine is gone" in said[process]
  assert time.monotonic() - started < 60


def disturb(pod, rng, kills, steps):
  """Ends random processes at random steps until the run ends by itself.

  Returns what each blow was.
  """
  blows = []
  at = sorted(rng.sample(range(2, steps - 2), kills))
  launcher = pod.start(2, 1, RESTARTS=str(kills + 2), GRACE="5")
  lines = []
  for line in launcher.stdout:
    lines.append(line)
    found = re.match(r"step (\d+)/", line)
    if found and at and int(found[1]) >= at[0]:
      at.pop(0)
      files = sorted(pod.records.iterdir(), key=lambda p: p.stat().st_mtime_ns)[-2:]
      victim = int(rng.choice(files).stem.split("-")[1])
      blow = rng.choice([signal.SIGKILL, signal.SIGTERM])
      blows.append((int(found[1]), blow.name))
      pods.blow(victim, blow)
  assert launcher.wait(timeout=60) == 0, "".join(lines)
  assert not at, "".join(lines)
  return blows


def assert_undisturbed(pod, straight, steps):
  for x, y in zip(pods.leaves(pod), pods.leaves(straight), strict=True):
    assert x.tobytes() == y.tobytes()
  consumed = pod.consumed()
  positions = [BATCH * step for step in range(1, steps + 1)]
  assert set(positions) <= consumed.keys()
  seen = np.concatenate([consumed[position] for position in positions])
  for epoch in range(len(seen) // RECORDS):
    ids = seen[epoch * RECORDS : (epoch + 1) * RECORDS]
    assert sorted(ids) == list(range(RECORDS))
  assert pod.losses() == straight.losses()


def chaos(tmp_path, kills, steps):
  # One width of texts: one compilation of a process.
  flags = ["--config.checkpoint.every=4", "--config.data.text_buckets=(24,)"]
  flags.append(f"--config.steps={steps}")
  straight = pods.Pod(tmp_path / "straight", *flags)
  straight.run(2, 1)
  pod = pods.Pod(tmp_path / "chaos", *flags)
  blows = disturb(pod, random.Random(kills), kills, steps)
  print(f"{steps} steps, {blows}")
  assert {name for _, name in blows} == {"SIGKILL", "SIGTERM"}
  assert_undisturbed(pod, straight, steps)


def test_three_blows_leave_no_trace(tmp_path):
  chaos(tmp_path, 3, 20)


@pytest.mark.slow
def test_ten_blows_leave_no_trace(tmp_path):
  chaos(tmp_path, 10, 300)


# (processes, devices of each, (data, fsdp, tensor))
TOPOLOGIES = [
  (1, 1, (1, 1, 1)),
  (1, 8, (8, 1, 1)),
  (1, 8, (2, 2, 2)),
  (2, 2, (2, 2, 1)),
  (2, 2, (1, 1, 4)),
  (2, 4, (2, 2, 2)),
  (2, 4, (1, 8, 1)),
]


@pytest.mark.slow
def test_every_topology_has_the_same_losses(tmp_path):
  wanted = None
  for number, (processes, devices, shape) in enumerate(TOPOLOGIES):
    pod = pods.Pod(tmp_path / str(number))
    started = time.monotonic()
    pod.run(processes, devices, *mesh(*shape))
    losses = pod.losses()
    assert len(losses) == 30
    wanted = wanted or losses
    difference = max(abs(losses[step] - wanted[step]) for step in wanted)
    seconds = time.monotonic() - started
    print(f"{processes} x {devices} {shape}: {difference:.1e}, {seconds:.0f} s")
    pods.assert_near(losses, wanted, 1e-4)


@pytest.mark.slow
def test_any_topology_goes_on_from_any_other(tmp_path):
  alone = pods.Pod(tmp_path / "alone")
  alone.run(1, 1)
  for place, (processes, devices, shape) in enumerate(TOPOLOGIES):
    # Stopped twice: from this one to the next, and from there to the one after it.
    pod = pods.Pod(tmp_path / str(place))
    code, term = 75, 8
    for step in range(3):
      processes, devices, shape = TOPOLOGIES[(place + step) % len(TOPOLOGIES)]
      code, at = (0, "") if step == 2 else (75, f"0:{term * BATCH}")
      pod.run(processes, devices, *mesh(*shape), code=code, TERM_AT=at)
      term += 9
    pods.assert_near(pod.losses(), alone.losses(), 1e-4)
    assert pod.consumed() == alone.consumed()
