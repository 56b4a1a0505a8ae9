"""The dense engine: all logits at once, the oracle of every other form.

An engine turns two sets of rows into the log-sum-exp over negatives, `lse[a, m, j]`,
for each anchor j of modality a and each candidate modality m. Anchors and candidates
are separate inputs: on one device of many, its own n rows against all N.
"""

from __future__ import annotations

from collections.abc import Container

import jax
import jax.numpy as jnp
from jax import Array

from gcl_jax.losses.pairs import Pairs


def negatives_lse(
  anchors: Pairs,
  candidates: Pairs,
  scale: Array,
  *,
  blocks: Container[tuple[int, int]],
  precision: jax.lax.Precision,
) -> Array:
  """lse[a, m, j] = log Σ_{k : p_m^k, g_k ≠ g_j} exp(s · e_a^j · e_m^k).

  Holds n · N float32 logits for each entry of `blocks` and is differentiable in the
  embeddings and the scale. No collectives.

  Args:
    anchors: n rows; candidates: N rows, of the same M modalities.
    scale: float32 scalar.
    blocks: the (a, m) that the loss reads; the others are left at −∞.
    precision: of the products.

  Returns:
    (M, M, n) float32; −∞ (with gradient zero) where an anchor has no negative.
  """
  apart = different(anchors.ids, candidates.ids)
  nothing = jnp.full(apart.shape[:1], -jnp.inf, jnp.float32)
  modalities = range(len(anchors.banks))
  lse = []
  for a in modalities:
    # Candidates stacked, one product an anchor modality: nine products would take
    # four times as long to compile, one product of nine would copy every bank thrice.
    read = [m for m in modalities if (a, m) in blocks]
    columns = jnp.stack([candidates.banks[m] for m in read])
    there = jnp.stack([candidates.there[m] for m in read])
    logits = scale * similarities(anchors.banks[a], columns, precision)
    some = masked_logsumexp(logits, apart & there[:, None, :])
    lse.append([some[read.index(m)] if m in read else nothing for m in modalities])
  return jnp.stack([jnp.stack(row) for row in lse])


def different(ids: Array, other_ids: Array) -> Array:
  """(n, N) bool: no column of the ids (n, K), (N, K) agrees."""
  return jnp.all(ids[:, None, :] != other_ids[None, :, :], axis=-1)


def similarities(rows: Array, columns: Array, precision: jax.lax.Precision) -> Array:
  """(n, D), (..., N, D) -> (..., n, N) inner products, summed in float32."""
  return jnp.einsum(
    "jd,...kd->...jk",
    rows,
    columns,
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def masked_logsumexp(logits: Array, mask: Array) -> Array:
  """log Σ exp over the last axis where `mask`; −∞ with gradient zero where nowhere."""
  logits = jnp.where(mask, logits, -jnp.inf)
  peak = jnp.max(logits, axis=-1, keepdims=True)
  peak = jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0.0))
  total = jnp.sum(jnp.exp(logits - peak), axis=-1)
  some = total != 0  # a NaN stays one
  # Both branches of the outer `where` must have finite derivatives.
  return jnp.where(some, jnp.log(jnp.where(some, total, 1.0)) + peak[..., 0], -jnp.inf)
