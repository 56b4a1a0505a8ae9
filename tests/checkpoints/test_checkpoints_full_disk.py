"""A full disk: one message, the checkpoints before it whole, and room asked for first.

No disk needs to be filled: a limit on the length of a file (RLIMIT_FSIZE) refuses what
is longer, as a disk refuses what is over its end, and /dev/full refuses everything.
"""

import contextlib
import errno
import logging
import os
import resource
import sys
import types
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from checkpoint_cases import same_bits

from gcl_jax.checkpoints import Checkpoints, quiet, saved_steps
from gcl_jax.checkpoints.folder import write_result
from gcl_jax.checkpoints.manager import _bytes
from gcl_jax.errors import UserError
from gcl_jax.training.config import default_config
from gcl_jax.training.writers import MetricWriter

Usage = namedtuple("Usage", "total used free")


@contextlib.contextmanager
def longest_file(size):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def state(seed=0):
  numbers = jax.random.normal(jax.random.key(seed), (256, 256))
  tree = {"params": {"kernel": numbers}, "step": jnp.int32(seed)}
  return jax.device_put(tree, jax.devices()[0])


def begun(folder):
  """A run with a whole first step."""
  checkpoints = Checkpoints(folder)
  checkpoints.save(1, state(1), position=1)
  checkpoints.wait()
  return checkpoints


@pytest.mark.parametrize("found_at", ["wait", "next save", "close"])
def test_no_room_for_a_step(tmp_path, found_at, caplog):
  checkpoints = begun(tmp_path)
  with longest_file(100_000), pytest.raises(UserError) as error:
    checkpoints.save(2, state(2), position=2)
    if found_at == "wait":
      checkpoints.wait()
    elif found_at == "close":
      checkpoints.close()
    else:
      checkpoints.save(3, state(3), position=3)
  assert "no room for step 2" in str(error.value)
  assert "(File too large): it needs about 262 kB" in str(error.value)
  assert "Step 1, the last good checkpoint, is whole" in str(error.value)
  assert "same command goes on from there" in str(error.value)
  checkpoints.close()  # as a run does when it ends so
  assert not [r for r in caplog.records if r.exc_info]  # Orbax tells it many times
  assert saved_steps(tmp_path) == [1]
  again = Checkpoints(tmp_path)
  restored, position = again.restore(again.latest(), state(0))
  assert position == 1 and same_bits(restored, state(1))
  again.save(2, state(2), position=2)
  again.close()
  assert saved_steps(tmp_path) == [1, 2]


def test_no_room_for_the_first_step(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  with longest_file(100_000), pytest.raises(UserError, match="no earlier checkpoint"):
    checkpoints.save(1, state(1), position=1)
    checkpoints.wait()
  checkpoints.close()


def failing(checkpoints, monkeypatch, error):
  def save(*_, **__):
    raise error

  monkeypatch.setattr(checkpoints._manager, "save", save)


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ValueError("RESOURCE: Failed to write 9 bytes [os_error_code='28']"),
  ],
)
def test_a_disk_that_is_full_says_what_is_free(tmp_path, monkeypatch, error):
  checkpoints = begun(tmp_path)
  failing(checkpoints, monkeypatch, error)
  monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(1, 1, 5000))
  said = (
    r"no room for step 2 in .*checkpoints \(No space left on device\): it needs about "
    r"262 kB, 5 kB are free\. Step 1"
  )
  with pytest.raises(UserError, match=said):
    checkpoints.save(2, state(2), position=2)
  checkpoints.close()


def test_a_disk_that_fails_otherwise_is_told_and_a_bug_is_not(tmp_path, monkeypatch):
  checkpoints = begun(tmp_path)
  with monkeypatch.context() as patch:
    failing(checkpoints, patch, OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(UserError, match=r"step 2 could not be saved .*Input/output er"):
      checkpoints.save(2, state(2), position=2)
  failing(checkpoints, monkeypatch, ValueError("a tree that has no leaves"))
  with pytest.raises(ValueError, match="no leaves"):
    checkpoints.save(2, state(2), position=2)
  checkpoints.close()


@pytest.mark.parametrize(("kept", "needed"), [(0, 2), (1, 1), (2, 1)])
def test_room_is_asked_for_before_a_run(tmp_path, monkeypatch, kept, needed):
  checkpoints = Checkpoints(tmp_path)
  for step in range(1, kept + 1):
    checkpoints.save(step, state(step), position=step)
  checkpoints.wait()
  free = needed * _bytes(state())
  assert _bytes(state()) == 256 * 256 * 4 + 4
  monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(1, 1, free))
  checkpoints.check_room(state())
  free -= 1
  count = "one more checkpoint" if kept else "two checkpoints"
  with pytest.raises(UserError, match=f"{count} of this run need {needed * 262} kB"):
    checkpoints.check_room(state())
  # What a save that was cut off left goes before the next begins.
  half = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp" / "state"
  half.mkdir(parents=True)
  (half / "data").write_bytes(b"1")
  checkpoints.check_room(state())
  checkpoints.close()


def test_a_result_that_finds_no_room_leaves_the_one_before(tmp_path, monkeypatch):
  write_result(tmp_path, 3, {"recall": 1.0})
  before = (tmp_path / "results/000000003.json").read_text()
  with (
    longest_file(10),
    pytest.raises(UserError, match=r"000000003\.json cannot be wri"),
  ):
    write_result(tmp_path, 3, {"recall": 2.0})
  assert [p.name for p in (tmp_path / "results").iterdir()] == ["000000003.json"]
  assert (tmp_path / "results/000000003.json").read_text() == before


def test_metrics_that_find_no_room(tmp_path):
  config = default_config()
  config.log.tensorboard = False
  (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
  writer = MetricWriter(tmp_path, config, 0)
  with pytest.raises(
    UserError, match=r"metrics\.jsonl cannot be .*No space left on dev"
  ):
    writer.write(1, {"loss": 1.0})


def test_a_board_that_finds_no_room_does_not_wait_for_ever(tmp_path):
  writer = MetricWriter(tmp_path, default_config(), 0)
  (tmp_path / "metrics.jsonl").unlink()
  writer._lines = types.SimpleNamespace(write=lambda line: None, close=lambda: None)
  written = 0
  with (
    longest_file(1000),
    pytest.raises(UserError, match=r"tensorboard cannot be written"),
  ):
    for step in range(100):
      writer.write(step, {"loss": 1.0})
      written += 1
  assert 5 < written < 50


def test_the_board_reads_what_was_written(tmp_path):
  from tensorboardX.proto.event_pb2 import Event

  MetricWriter(tmp_path, default_config(), 0).close()
  for file in (tmp_path / "tensorboard").iterdir():
    file.unlink()
  writer = MetricWriter(tmp_path, default_config(), 4)
  writer.write(5, {"loss": 1.5, "eval/a": 2.0})
  writer.close()
  (file,) = (tmp_path / "tensorboard").iterdir()
  raw, events = file.read_bytes(), []
  while raw:
    length = int.from_bytes(raw[:8], "little")
    events.append(Event.FromString(raw[12 : 12 + length]))
    raw = raw[16 + length :]
  assert events[0].file_version == "brain.Event:2"
  # Steps from 5 on in an earlier file, of a run that was killed, no longer count.
  assert (events[1].step, events[1].session_log.status) == (5, 1)
  scalars = {v.tag: v.simple_value for v in events[2].summary.value}
  assert (events[2].step, scalars) == (5, {"loss": 1.5, "eval/a": 2.0})


def files_of(step: Path):
  return sorted(p.relative_to(step).as_posix() for p in step.rglob("*") if p.is_file())


def test_a_step_that_lacks_a_file_is_put_aside(tmp_path, capsys):
  """As a copy that stopped half-way, or a disk that lost power, leaves it."""
  checkpoints = begun(tmp_path)
  checkpoints.save(2, state(2), position=2)
  checkpoints.close()
  step = tmp_path / "checkpoints" / "2"
  data = [
    n for n in files_of(step) if "/d/" in n and (step / n).stat().st_size > 10_000
  ]
  cases = ["_CHECKPOINT_METADATA", "state/manifest.ocdbt", "data/metadata", *data]
  assert data
  for name in cases:
    whole = (step / name).read_bytes()
    (step / name).unlink()
    assert saved_steps(tmp_path) == [1], name
    (step / name).write_bytes(whole)
    assert saved_steps(tmp_path) == [1, 2], name
  for name in ("state/manifest.ocdbt", *data):
    whole = (step / name).read_bytes()
    (step / name).write_bytes(whole[: len(whole) // 2])
    assert saved_steps(tmp_path) == [1], name
    (step / name).write_bytes(whole)
  (step / data[0]).unlink()
  again = Checkpoints(tmp_path)
  assert again.latest() == 1
  assert "2 lacks files and was put aside as 2.damaged" in capsys.readouterr().err
  again.save(2, state(3), position=2)
  again.close()
  assert saved_steps(tmp_path) == [1, 2]
  names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
  assert names == ["1", "2", "2.damaged"]


def test_only_what_is_raised_anyway_is_kept_off_the_screen(monkeypatch):
  told = []
  monkeypatch.setattr(sys, "unraisablehook", lambda what: told.append(what.exc_value))
  monkeypatch.setattr(quiet, "_before", None)
  quiet.be_quiet()
  news = {
    "absl": [
      ("orbax/x.py", None),
      ("ours.py", ValueError("a")),
      ("orbax/x.py", OSError()),
    ],
    "asyncio": [
      ("a.py", ValueError("b")),
      ("a.py", ValueError("[os_error_code='27']")),
    ],
  }
  passed = []
  for name, records in news.items():
    for path, error in records:
      info = error and (type(error), error, None)
      record = logging.LogRecord(name, logging.ERROR, path, 1, "x", (), info)
      passed.append(bool(logging.getLogger(name).filter(record)))
  assert passed == [True, True, False, True, False]
  for text in ("Event loop is closed", "something else"):
    sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))
  quiet.speak_again()
  assert [str(error) for error in told] == ["something else"]
  sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError("loop is closed")))
  assert len(told) == 2
