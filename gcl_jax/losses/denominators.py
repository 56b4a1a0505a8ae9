"""From the log-sum-exp over negatives to the loss: the O(N) part.

Every loss of the family is one formula over `lse[a, m, j]`, which an engine computes,
and the same-pair similarities s_ab^j. The readings differ in what else stands in the
denominator of (anchor a, positive b); see `candidates`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
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


def excess(others: Array, positive: Array) -> Array:
  """log(e^positive + Σ e^others) − positive.

  The positive is subtracted before the logarithm: at scale 100 a small loss would
  otherwise drown in the rounding of two large numbers. It is part of the one
  logsumexp, so no sum is empty and every gradient is finite.

  Args:
    others: (T, ...) terms, −∞ for none.
    positive: (...), finite.
  """
  above = others - positive
  peak = jax.lax.stop_gradient(jnp.maximum(jnp.max(above, axis=0), 0.0))
  # log(e^-peak + Σ e^(above - peak)); the positive's own term is e^-peak.
  total_less_one = jnp.expm1(-peak) + jnp.sum(jnp.exp(above - peak), axis=0)
  return peak + jnp.log1p(total_less_one)


def members(denominator: str, modalities: int = 3) -> np.ndarray:
  """`candidates` as a table: (2 M, M, M) bool.

  [m, a, b]: lse[a, m] counts in direction (a, b); [M + m, a, b]: so does s_am.
  """
  table = np.zeros((2, modalities, modalities, modalities), bool)
  for a, b in ordered_pairs(modalities):
    negatives, companions = candidates(denominator, a, b, modalities)
    table[0, list(negatives), a, b] = True
    table[1, list(companions), a, b] = True
  return table.reshape(2 * modalities, modalities, modalities)


def direction_losses(
  lse: Array, same: Array, there: Sequence[Array], denominator: str
) -> tuple[Array, Array]:
  """Sum of ℓ_ab over the rows, and the number of them, per direction.

  Args:
    lse: (M, M, n) from an engine.
    same: (M, M, n), s e_a · e_b of each pair.
    there: presence of the M modalities, (n,) each.
    denominator: one of `DENOMINATORS`.

  Returns:
    (M, M) float32 each, diagonals zero. Over several devices: sum both over them.
  """
  exists = jnp.stack(there)
  modalities = len(exists)
  companions = jnp.where(exists, same, -jnp.inf)
  terms = jnp.concatenate([lse, companions], axis=1)  # (a, 2 M, n)
  terms = jnp.moveaxis(terms, 1, 0)[:, :, None, :]  # (2 M, a, 1, n), for every b
  table = members(denominator, modalities)[..., None]
  loss = excess(jnp.where(table, terms, -jnp.inf), same)
  counted = exists[:, None] & exists[None, :]
  counted &= ~np.eye(modalities, dtype=bool)[..., None]
  sums = jnp.sum(jnp.where(counted, loss, 0.0), axis=-1)
  return sums, jnp.sum(counted, axis=-1, dtype=jnp.float32)


def weighted_mean(sums: Array, counts: Array, weights: Array) -> tuple[Array, Array]:
  """Σ w ℓ / Σ w over everything that counts, and the mean per direction.

  Args:
    sums, counts, weights: of one shape, over the global batch; sums are 0 where
      nothing counts.

  Returns:
    The loss, a scalar, 0 where nothing counts; and the means, without gradient.
  """
  weight = jnp.sum(weights * counts)
  some = weight != 0
  loss = jnp.where(some, jnp.sum(weights * sums) / jnp.where(some, weight, 1.0), 0.0)
  means = jnp.where(counts > 0, sums / jnp.maximum(counts, 1.0), 0.0)
  return loss, jax.lax.stop_gradient(means)
