"""From the log-sum-exp over negatives to the loss: the O(N) part.

Every loss of the family is one formula over `lse[a, m, j]`, which an engine computes,
and the same-pair similarities s_ab^j. The readings differ in what else stands in the
denominator of (anchor a, positive b); see `candidates`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

DENOMINATORS = ("self_masked", "literal", "clean", "cross_only", "target_only")


def candidates(
  denominator: str, a: int, b: int, modalities: int = 3
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """What stands in the denominator of anchor a, positive b, besides s_ab itself.

  Returns:
    The modalities m whose negatives lse[a, m] count, and those whose same-pair
    similarity s_am counts.

  Raises:
    ValueError: no such denominator.
  """
  every = tuple(range(modalities))
  third = tuple(m for m in every if m not in (a, b))
  table = {
    "self_masked": (every, third),
    "literal": (every, (*third, a)),
    "clean": (every, ()),
    "cross_only": (tuple(m for m in every if m != a), third),
    "target_only": ((b,), ()),
  }
  if denominator not in table:
    raise ValueError(
      f"denominator={denominator!r} is not one of {', '.join(DENOMINATORS)}"
    )
  return table[denominator]


def ordered_pairs(modalities: int = 3) -> list[tuple[int, int]]:
  """The directions (a, b), a ≠ b."""
  every = range(modalities)
  return [(a, b) for a in every for b in every if a != b]


def blocks(denominator: str, modalities: int = 3) -> frozenset[tuple[int, int]]:
  """The (a, m) of `lse` that the formula reads."""
  return frozenset(
    (a, m)
    for a, b in ordered_pairs(modalities)
    for m in candidates(denominator, a, b, modalities)[0]
  )


def excess(others: Sequence[Array], positive: Array) -> Array:
  """log(e^positive + Σ e^others) − positive, for (n,) terms of which −∞ are none.

  The positive is subtracted before the logarithm: at scale 100 a small loss would
  otherwise drown in the rounding of two large numbers. It is part of the one
  logsumexp, so no sum is empty and every gradient is finite.
  """
  if not others:
    return jnp.zeros_like(positive)
  above = jnp.stack([term - positive for term in others])
  peak = jax.lax.stop_gradient(jnp.maximum(jnp.max(above, axis=0), 0.0))
  # log(e^-peak + Σ e^(above - peak)); the positive's own term is e^-peak.
  total_less_one = jnp.expm1(-peak) + jnp.sum(jnp.exp(above - peak), axis=0)
  return peak + jnp.log1p(total_less_one)


def direction_losses(
  lse: Array,
  banks: Sequence[Array],
  there: Sequence[Array],
  scale: Array,
  denominator: str,
) -> tuple[Array, Array]:
  """Sum of ℓ_ab over the rows, and the number of them, per direction.

  Args:
    lse: (M, M, n) from an engine.
    banks, there: M unit embeddings (n, D) and their presence (n,).
    scale: float32 scalar.
    denominator: one of `DENOMINATORS`.

  Returns:
    (M, M) float32 each, diagonals zero. Over several devices: sum both over them.
  """
  modalities = len(banks)
  sums = jnp.zeros((modalities, modalities))
  counts = jnp.zeros((modalities, modalities))
  same = {}
  for a in range(modalities):
    for m in range(a, modalities):
      product = scale * jnp.sum(banks[a] * banks[m], axis=-1)
      same[a, m] = same[m, a] = product
  for a, b in ordered_pairs(modalities):
    negatives, companions = candidates(denominator, a, b, modalities)
    others = [lse[a, m] for m in negatives]
    others += [jnp.where(there[m], same[a, m], -jnp.inf) for m in companions]
    counted = there[a] & there[b]
    loss = jnp.where(counted, excess(others, same[a, b]), 0.0)
    sums = sums.at[a, b].set(jnp.sum(loss))
    counts = counts.at[a, b].set(jnp.sum(counted, dtype=jnp.float32))
  return sums, counts


def weighted_mean(sums: Array, counts: Array, weights: Array) -> tuple[Array, Array]:
  """Σ w ℓ / Σ w over everything that counts, and the mean per direction.

  Args:
    sums, counts: (M, M), over the global batch.
    weights: (M, M); the diagonal is ignored.

  Returns:
    The loss, a scalar, 0 where nothing counts; and (M, M) means without gradient.
  """
  weights = jnp.where(jnp.eye(len(sums), dtype=bool), 0.0, weights)
  weight = jnp.sum(weights * counts)
  some = weight != 0
  loss = jnp.where(some, jnp.sum(weights * sums) / jnp.where(some, weight, 1.0), 0.0)
  means = jnp.where(counts > 0, sums / jnp.maximum(counts, 1.0), 0.0)
  return loss, jax.lax.stop_gradient(means)
