"""A disk that is full while a run saves: exit 2, one message, and on by the same command."""

import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from gcl_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# As `tiny_run` was trained: what it found is what an undisturbed run finds.
TINY = (
  "--config=configs/demo.py",
  "--config.batch_size=32",
  "--config.steps=2",
  "--config.optimizer.warmup_steps=1",
  "--config.data.scenes_train_size=64",
  "--config.eval.max_items=24",
  "--config.eval.before=false",
  "--config.checkpoint.every=1",
)
# From step 2 on the system refuses files of more than a megabyte, as a full disk would.
FULL = """
import resource, runpy
from gcl_jax.checkpoints import Checkpoints

save = Checkpoints.save

def save_without_room(self, step, state, position):
  self.wait()
  if step == 2:
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, most))
  save(self, step, state, position)

Checkpoints.save = save_without_room
runpy.run_module("gcl_jax.train", run_name="__main__")
"""


def train(workdir, *how):
  return subprocess.run(
    [sys.executable, *how, *TINY, f"--workdir={workdir}"],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=240,
  )


def test_a_full_disk_stops_a_run_that_then_goes_on_to_the_same_bits(tiny_run, tmp_path):
  from gcl_jax.checkpoints import read_run, saved_steps

  done = train(tmp_path / "run", "-c", FULL)
  assert done.returncode == 2, done.stderr
  assert "Traceback" not in done.stderr, done.stderr[-6000:]
  (message,) = [x for x in done.stderr.splitlines() if "error" in x.lower()]
  assert message.startswith("error: there is no room for step 2 in ")
  assert "(File too large): it needs about 19.3 MB. Step 1, the last good" in message
  assert saved_steps(tmp_path / "run") == [1]
  done = train(tmp_path / "run", "-m", "gcl_jax.train")
  assert done.returncode == 0, done.stderr
  assert "going on from step 1" in done.stderr
  ours, theirs = (read_run(workdir)[1] for workdir in (tmp_path / "run", tiny_run))
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert x.tobytes() == y.tobytes()


def test_a_disk_without_room_for_two_checkpoints_is_refused_before_the_first_step(
  tmp_path, monkeypatch
):
  from gcl_jax.train import train_and_evaluate
  from gcl_jax.training import run as run_module

  def compiled(*_, **__):
    raise AssertionError("a step was made: the mistake was found too late")

  monkeypatch.setattr(run_module, "make_step", compiled)
  usage = types.SimpleNamespace(free=30_000_000)  # one would find room
  monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
  with pytest.raises(
    UserError, match=r"30 MB free, and two checkpoints .* need 38\.5 MB"
  ):
    train_and_evaluate(recipe(), tmp_path / "run")


def recipe():
  config = runpy.run_path(str(ROOT / "configs/demo.py"))["get_config"]()
  config.data.scenes_train_size = 600
  config.eval.before = False
  return config
