"""A checkpoint written on one mesh is read on another, and in another type, to the bit."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcl_jax.checkpoints import Checkpoints
from gcl_jax.errors import UserError
from gcl_jax.sharding import make_mesh
from gcl_jax.training.config import default_config
from gcl_jax.training.optimizer import make_optimizer
from gcl_jax.training.resume import check_resumable
from gcl_jax.training.state import places_of_state


def shapes():
  def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)

  attention = {
    name: {"kernel": leaf(2, 16, 16), "bias": leaf(2, 16)}
    for name in ("query", "key", "value", "out")
  }
  return {"vision": {"blocks": {"attention": attention}}, "logit_scale": leaf()}


def state_on(mesh, seed, moments="float32"):
  """A state like a run's: moments lie with their parameters. No two seeds agree."""
  config = default_config()
  config.optimizer.moment_dtype = moments
  optimizer = make_optimizer(config.optimizer, config.temperature, shapes(), 10)
  places = places_of_state(shapes(), optimizer, mesh)
  counters = dict.fromkeys(("step", "bad_records", "failed_step"))
  abstract = {
    "params": shapes(),
    "optimizer": jax.eval_shape(optimizer.init, shapes()),
    **{name: jax.ShapeDtypeStruct((), np.int32) for name in counters},
  }
  draw = np.random.default_rng(seed)

  def fill(leaf, place):
    numbers = draw.normal(size=leaf.shape) * 100
    return jax.device_put(numbers.astype(leaf.dtype), place)

  return jax.tree.map(fill, abstract, places)


def bits(state):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def split(state):
  return sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))


MESHES = {
  "one": lambda: make_mesh(devices=jax.devices()[:1]),
  "fsdp": lambda: make_mesh(1, 8),
  "mixed": lambda: make_mesh(2, 2, 2),
}


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_from_one_device_onto_eight_and_back(tmp_path, moments):
  there = state_on(MESHES["one"](), 1, moments)
  wanted = bits(there)
  for step, mesh in enumerate(("fsdp", "mixed", "one"), 1):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(step, there, position=step)
    checkpoints.close()
    like = state_on(MESHES[mesh](), 100 + step, moments)
    assert bits(like) != wanted
    checkpoints = Checkpoints(tmp_path)
    there, position = checkpoints.restore(step, like)
    checkpoints.close()
    assert position == step
    assert bits(there) == wanted, mesh
    assert jax.tree.map(lambda x: x.sharding, there) == jax.tree.map(
      lambda x: x.sharding, like
    )
    # Parameters and both moments of every kernel at least are really split.
    assert (split(there) >= 12) == (mesh != "one")


def test_a_state_is_read_in_the_type_that_is_asked_for(tmp_path):
  mesh = MESHES["one"]()
  checkpoints = Checkpoints(tmp_path)
  wide = state_on(mesh, 1)
  checkpoints.save(1, wide, position=1)
  checkpoints.wait()
  narrow, _ = checkpoints.restore(1, state_on(mesh, 2, "bfloat16"))
  checkpoints.close()
  changed = 0
  for ours, theirs in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
    changed += ours.dtype != theirs.dtype
    assert np.asarray(ours).tobytes() == np.asarray(theirs.astype(ours.dtype)).tobytes()
  assert changed and {x.dtype for x in jax.tree.leaves(narrow)} >= {jnp.bfloat16.dtype}


def test_but_a_run_does_not_change_the_type_of_its_moments():
  then, now = default_config(), default_config()
  now.optimizer.moment_dtype = "bfloat16"
  stored = types.SimpleNamespace(config=then, records=9)
  said = r"config\.optimizer\.moment_dtype: 'float32' then, 'bfloat16' now\nGo on with"
  with pytest.raises(UserError, match=said):
    check_resumable(stored, now, 9, "runs/a")
