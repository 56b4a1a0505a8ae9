"""An exponential moving average of what is trained, kept beside it in the state.

The average is what is evaluated, by which the best checkpoint is chosen, and what is
exported; training itself never reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def begin_average(state: dict[str, Any], frozen: Any) -> dict[str, Any]:
  """The state with `ema`: copies of all that is not frozen, where their originals lie.

  What is frozen is its own average, and is not stored twice.
  """
  return {**state, "ema": jax.tree.map(jnp.copy, trained(state["params"], frozen))}


def next_average(average: Any, params: Any, step: jax.Array, decay: float) -> Any:
  """decay · average + (1 - decay) · params.

  Of early steps an average would mostly be the start: there the decay is lower,
  (1 + step) / (10 + step), as TensorFlow's averages have it.

  Args:
    average: some of the paths of `params`.
    params: after the step.
    step: () int32, how many steps were taken before it.
    decay: of `config.ema_decay`.
  """
  reached = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return optax.incremental_update(_at(params, average), average, 1.0 - reached)


def trained(tree: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
  """The part of a nested dict that is not frozen; no empty dicts."""
  kept = {}
  for name, below in tree.items():
    if isinstance(below, Mapping):
      if part := trained(below, frozen[name]):
        kept[name] = part
    elif not frozen[name]:
      kept[name] = below
  return kept


def _at(tree: Any, paths: Any) -> Any:
  """The part of a nested dict that has the paths of another."""
  if not isinstance(paths, Mapping):
    return tree
  return {name: _at(tree[name], below) for name, below in paths.items()}
