"""The moving average of parameters: its arithmetic, and of what there is one."""

import jax
import jax.numpy as jnp
import numpy as np

from gcl_jax.checkpoints.weights import weights_in_use
from gcl_jax.sharding import make_mesh
from gcl_jax.training import optimizer as optimizers
from gcl_jax.training.average import begin_average
from gcl_jax.training.config import default_config
from gcl_jax.training.state import init_state, make_step

BATCH = {"has_image": jnp.ones(4, bool), "has_text": jnp.ones(4, bool)}


def averaged_run(steps, decay):
  """Every state from the first to the last."""
  config = default_config()
  config.optimizer.learning_rate = 0.1
  config.optimizer.locked_tower = "text"
  params = {
    "vision": {"class_embedding": jnp.arange(4.0)},
    "text": {"final_norm": {"scale": jnp.full(3, 0.1)}},
    "logit_scale": jnp.float32(3.0),
  }

  def objective(params, batch, constants):
    del batch, constants
    total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))
    return total, {"loss": total}

  rules = (config.optimizer, config.temperature, params)
  optimizer = optimizers.make_optimizer(*rules, 10)
  frozen = optimizers.frozen_mask(*rules)
  state = init_state(params, optimizer, make_mesh(devices=jax.devices()[:1]))
  state = begin_average(state, frozen)
  step = make_step(objective, optimizer, frozen, config.temperature, ema_decay=decay)
  states = [jax.tree.map(np.asarray, state)]
  for _ in range(steps):
    state, _ = step(state, BATCH, {})
    states.append(jax.tree.map(np.asarray, state))
  return states


def test_it_follows_the_parameters_faster_at_first():
  states = averaged_run(4, decay=0.25)
  assert states[0]["ema"]["vision"]["class_embedding"].tolist() == [0, 1, 2, 3]
  want = states[0]["ema"]["vision"]["class_embedding"]
  for number, state in enumerate(states[1:]):
    reached = min(0.25, (1 + number) / (10 + number))  # 0.1, 0.18, 0.25, 0.25
    want = reached * want + (1 - reached) * state["params"]["vision"]["class_embedding"]
    np.testing.assert_allclose(
      state["ema"]["vision"]["class_embedding"], want, rtol=1e-6
    )
    assert (want != state["params"]["vision"]["class_embedding"]).all()


def test_what_is_frozen_is_not_stored_twice_and_keeps_its_bits():
  first, *_, last = averaged_run(3, decay=0.9)
  assert last["ema"].keys() == {"vision", "logit_scale"}
  used = weights_in_use(last, 1.0)
  assert jax.tree.structure(used) == jax.tree.structure(last["params"])
  scales = [tree["text"]["final_norm"]["scale"] for tree in (used, first["params"])]
  assert scales[0].tobytes() == scales[1].tobytes()
  assert used["vision"]["class_embedding"] is last["ema"]["vision"]["class_embedding"]
  assert used["logit_scale"] == last["ema"]["logit_scale"]


def test_without_an_average_the_parameters_are_used():
  params = {"vision": {"class_embedding": np.ones(2)}}
  assert weights_in_use({"params": params}, 1.0) == params
