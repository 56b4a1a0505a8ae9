"""Gradient accumulation: a step's pairs in parts, each with only its own negatives.

Not the loss of the whole batch, which `microbatches` keeps in as little memory: a pair
of one part never meets a pair of another. The loss, its gradient and what is logged are
the means over the parts. Nothing is carried from step to step, so a step stays one
update, and a run resumes at any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gcl_jax.sharding import put_batch

# params, batch, constants -> (loss, metrics), gradients
ValueAndGrad = Callable[[Any, Any, Any], tuple[tuple[jax.Array, dict], Any]]

# Metrics of which the largest counts, not the mean.
_LARGEST = ("fusion/largest_weight",)


def put_parts(
  mesh: Mesh, batch: Mapping[str, np.ndarray], parts: int
) -> dict[str, jax.Array]:
  """This process's rows of a batch -> global arrays (parts, rows, ...).

  A part is so many consecutive rows of the pipeline's global batch, whatever the number
  of processes and devices; each is split over the batch axes. With one part: the batch
  as it is, (rows, ...).
  """
  if parts == 1:
    return put_batch(mesh, batch)
  # The pipeline has dealt every process an equal share of each part.
  cut = {n: rows.reshape(parts, -1, *rows.shape[1:]) for n, rows in batch.items()}
  return put_batch(mesh, cut, axis=1)


def over_parts(value_and_grad: ValueAndGrad, parts: int, frozen: Any) -> ValueAndGrad:
  """The same of a batch in parts, as `put_parts` puts it: means over the parts.

  One part's activations at a time, and one float32 sum of gradients. Devices add up
  their gradients after every part. What is frozen (a tree of bools like the parameters)
  has a gradient of zero, and no sum is kept for it.
  """
  if parts == 1:
    return value_and_grad

  def mean(params, batch, constants):
    def add(total, part):
      (loss, metrics), grads = value_and_grad(params, part, constants)
      total = jax.tree.map(lambda f, t, g: t if f else t + g, frozen, total, grads)
      return total, (loss, metrics)

    nothing = jax.tree.map(lambda f, p: () if f else jnp.zeros_like(p), frozen, params)
    total, (losses, metrics) = jax.lax.scan(add, nothing, batch)
    metrics = {
      name: values.max() if name in _LARGEST else values.mean()
      for name, values in metrics.items()
    }
    grads = jax.tree.map(
      lambda f, p, t: jnp.zeros_like(p) if f else t / parts, frozen, params, total
    )
    return (losses.mean(), metrics), grads

  return mean
