"""The step: counters, first non-finite step, and what it may not touch."""

import jax
import jax.numpy as jnp
import numpy as np

from gcl_jax.sharding import make_mesh
from gcl_jax.training import optimizer as optimizers
from gcl_jax.training.config import default_config
from gcl_jax.training.state import init_state, make_step


def tiny_step():
  config = default_config()
  config.optimizer.learning_rate = 0.1
  params = {
    "image_projection": {"kernel": jnp.ones((2, 2))},
    "logit_scale": jnp.float32(0.0),
  }
  mesh = make_mesh(devices=jax.devices()[:1])

  def objective(params, batch, constants):
    kernel = params["image_projection"]["kernel"]
    loss = (kernel * batch["x"].sum()).sum() + params["logit_scale"]
    return loss, {"loss": loss}

  optimizer = optimizers.make_optimizer(
    config.optimizer, config.temperature, params, 10
  )
  frozen = optimizers.frozen_mask(config.optimizer, config.temperature, params)
  state = init_state(params, optimizer, mesh)
  return state, make_step(objective, optimizer, frozen, config.temperature)


def batch(x=1.0, bad=0):
  present = np.arange(4) >= bad
  return {
    "x": jnp.full((4,), x),
    "has_image": jnp.asarray(present),
    "has_text": jnp.asarray(present),
  }


def test_steps_and_unreadable_records_are_counted():
  state, step = tiny_step()
  for bad in (1, 0, 2):
    state, metrics = step(state, batch(bad=bad), {})
  assert int(state["step"]) == 3
  assert int(state["bad_records"]) == 3
  assert int(state["failed_step"]) == -1
  assert {"loss", "gradient_norm", "update_norm"} <= metrics.keys()


def test_the_first_step_that_is_not_finite_is_kept():
  state, step = tiny_step()
  for x in (1.0, np.nan, 1.0, np.inf):
    state, _ = step(state, batch(x=x), {})
  assert int(state["failed_step"]) == 2


def test_the_objective_is_told_the_steps_taken_so_far():
  mesh = make_mesh(devices=jax.devices()[:1])
  config, params = (
    default_config(),
    {"fusion": {"a": jnp.ones(2)}, "logit_scale": jnp.float32(0.0)},
  )

  def objective(params, batch, constants):
    return params["fusion"]["a"].sum(), {
      "step": constants["step"],
      "given": constants["given"],
    }

  rules = (config.optimizer, config.temperature, params)
  optimizer = optimizers.make_optimizer(*rules, 10)
  frozen = optimizers.frozen_mask(*rules)
  step = make_step(objective, optimizer, frozen, config.temperature)
  state, told = init_state(params, optimizer, mesh), []
  for _ in range(3):
    state, metrics = step(state, batch(), {"given": jnp.int32(7)})
    told.append((int(metrics["step"]), int(metrics["given"])))
  assert told == [(0, 7), (1, 7), (2, 7)]
