"""Checkpoints: the same bits back, the last and the best kept, half ones ignored."""

import jax
import jax.numpy as jnp
import pytest
from checkpoint_cases import same_bits
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gcl_jax.checkpoints import Checkpoints
from gcl_jax.checkpoints.manager import saved_steps
from gcl_jax.errors import UserError
from gcl_jax.sharding import make_mesh, replicated


def state(seed=0, width=16):
  mesh = make_mesh()
  rows = jax.random.normal(jax.random.key(seed), (8, width))
  return {
    "params": {"a": {"kernel": jax.device_put(rows, replicated(mesh))}},
    "optimizer": (jax.device_put(rows * 2, NamedSharding(mesh, P("data"))),),
    "step": jax.device_put(jnp.int32(seed), replicated(mesh)),
  }


def test_a_state_comes_back_to_the_bit_and_where_it_belongs(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(3, state(1), position=96)
  checkpoints.wait()
  restored, position = checkpoints.restore(3, state(2))
  assert position == 96
  assert same_bits(restored, state(1))
  assert restored["optimizer"][0].sharding.spec == P("data")
  checkpoints.close()


def test_the_last_and_the_best_are_kept(tmp_path):
  scores = {}
  checkpoints = Checkpoints(
    tmp_path, keep_last=1, keep_best=1, scores=lambda: dict(scores)
  )
  for step, score in ((1, 5.0), (2, 9.0), (3, 1.0), (4, 2.0)):
    checkpoints.save(step, state(step), position=step)
    checkpoints.wait()
    scores[step] = score  # evaluated after it was saved
  checkpoints.close()
  assert saved_steps(tmp_path) == [2, 4]


def test_a_save_asks_nobody_whether_the_job_is_stopped(tmp_path, monkeypatch):
  """JAX's service answers once: what Orbax heard, the loop would not."""
  asked = []
  monkeypatch.setattr(
    multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step)
  )
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, state(1), position=1)
  checkpoints.close()
  assert saved_steps(tmp_path) == [1]
  assert not asked


def test_a_step_that_was_cut_off_does_not_exist(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, state(1), position=1)
  checkpoints.close()
  half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
  half.mkdir()
  (half / "state").write_text("half")
  again = Checkpoints(tmp_path)
  assert again.latest() == 1
  again.save(2, state(2), position=2)
  again.wait()
  assert again.steps() == [1, 2]
  again.close()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, state(1), position=1)
  checkpoints.wait()
  with pytest.raises(UserError, match="does not fit this run's model"):
    checkpoints.restore(1, state(1, width=17))
  other = state(1)
  other["params"] = {"b": other["params"]["a"]}
  with pytest.raises(UserError, match="does not fit this run's model"):
    checkpoints.restore(1, other)
  checkpoints.close()
