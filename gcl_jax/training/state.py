"""What a run carries from step to step, and one jitted step of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gcl_jax.sharding import (
  PARAMETER_RULES,
  map_with_path,
  put,
  replicated,
  shardings,
  state_shardings,
)
from gcl_jax.training.accumulation import over_parts
from gcl_jax.training.average import next_average
from gcl_jax.training.objective import Objective
from gcl_jax.training.optimizer import cap_logit_scale

# {"params", "optimizer": optax state, "step": int32 steps taken,
#  "bad_records": int32 unreadable records so far, over all processes,
#  "failed_step": int32, the first step whose loss or update was not finite, or -1,
#  and where the run keeps an average "ema": that of the trained parameters (average.py)}
State = dict[str, Any]
_COUNTERS = {"step": 0, "bad_records": 0, "failed_step": -1}
Step = Callable[[State, dict[str, jax.Array], Any], tuple[State, dict[str, jax.Array]]]


def place_parameters(params: Any, mesh: Mesh) -> Any:
  """Parameters on the mesh, by the sharding rules; copies.

  Raises:
    UserError: an axis of the mesh does not divide what it splits.
  """
  return put(params, shardings(mesh, params, PARAMETER_RULES))


def places_of_state(
  shapes: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> State:
  """Where every array of a state lies: moments with their parameters.

  Raises:
    UserError: as `place_parameters`.
  """
  params = shardings(mesh, shapes, PARAMETER_RULES)
  moments = jax.eval_shape(optimizer.init, shapes)
  return {
    "params": params,
    "optimizer": state_shardings(mesh, moments, shapes, params),
    **dict.fromkeys(_COUNTERS, replicated(mesh)),
  }


def init_state(
  params: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> State:
  """A fresh state on the mesh, parameters placed by the sharding rules.

  The arrays are copies: the step donates them, and the caller keeps its own.
  """
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  places = places_of_state(shapes, optimizer, mesh)
  placed = put(params, places["params"])
  moments = jax.jit(optimizer.init, out_shardings=places["optimizer"])(placed)
  counters = {name: np.int32(value) for name, value in _COUNTERS.items()}
  return {
    "params": placed,
    "optimizer": moments,
    **put(counters, {name: places[name] for name in counters}),
  }


def make_step(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  frozen: Any,
  temperature: ConfigDict,
  places: State | None = None,
  *,
  ema_decay: float = 0.0,
  accumulate_steps: int = 1,
) -> Step:
  """One optimizer step, jitted, with the state donated.

  Args:
    objective: of `make_objective`.
    optimizer: of `make_optimizer`.
    frozen: a tree of bools like the parameters: no gradient is computed for these.
    temperature: `config.temperature`.
    places: of `places_of_state`: where the new state lies; None leaves it to JAX.
    ema_decay: `config.ema_decay`, of a state that keeps an average.
    accumulate_steps: into how many parts the batch was cut by `put_parts`.

  Returns:
    step(state, batch, constants) -> (state, metrics). Metrics are float32 scalars on
    the device. The step never checks for NaN on the host: it writes the number of the
    first bad step into the state, which the loop reads before it writes anything.
  """

  def loss_of(params, batch, constants):
    held = jax.tree.map(
      lambda p, f: jax.lax.stop_gradient(p) if f else p, params, frozen
    )
    return objective(held, batch, constants)

  gradient = over_parts(
    jax.value_and_grad(loss_of, has_aux=True), accumulate_steps, frozen
  )

  def step(state, batch, constants):
    params = state["params"]
    (loss, metrics), grads = gradient(
      params, batch, {**constants, "step": state["step"]}
    )
    updates, moments = optimizer.update(grads, state["optimizer"], params)
    new_params = cap_logit_scale(optax.apply_updates(params, updates), temperature)
    grad_norm, update_norm = optax.global_norm(grads), optax.global_norm(updates)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
    first = (state["failed_step"] < 0) & ~finite
    unread = ~(batch["has_image"] | batch["has_text"])
    new_state = {
      "params": new_params,
      "optimizer": moments,
      "step": state["step"] + 1,
      "bad_records": state["bad_records"] + unread.sum().astype(jnp.int32),
      "failed_step": jnp.where(first, state["step"] + 1, state["failed_step"]),
    }
    if "ema" in state:
      new_state["ema"] = next_average(
        state["ema"], new_params, state["step"], ema_decay
      )
    norms = {"gradient_norm": grad_norm, "update_norm": update_norm}
    return new_state, {**metrics, **norms}

  out = None if places is None else (places, None)
  return jax.jit(step, donate_argnums=0, out_shardings=out)


def count_parameters(params: Any) -> dict[str, int]:
  """Number of values below each top-level path."""
  counts: dict[str, int] = {}

  def add(path: str, leaf: Any) -> None:
    top = path.split("/")[0]
    counts[top] = counts.get(top, 0) + int(leaf.size)

  map_with_path(add, params)
  return counts
