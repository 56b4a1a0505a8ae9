"""AlignCLIP's intra-modality separation: images are pushed apart as their texts differ.

A baseline of the GCL paper (its table 5, "CL + IMSep"), not part of GCL. Source:
https://github.com/sarahESL/AlignCLIP.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from gcl_jax.losses import denominators, dense
from gcl_jax.losses.engine import make_plan, streamed
from gcl_jax.losses.pairs import (
  Pairs,
  Summing,
  check_form,
  check_mesh,
  make_pairs,
  matmul_precision,
  over_batch,
  scalar_scale,
)
from gcl_jax.losses.tiles import Tile


def intra_modal_separation_loss(
  image: Array,
  text: Array,
  text_features: Array | None = None,
  *,
  logit_scale: ArrayLike,
  pair_ids: Array | None = None,
  has_image: Array | None = None,
  has_text: Array | None = None,
  mesh: Mesh | None = None,
  batch_axes: tuple[str, ...] = ("data",),
  form: str = "auto",
  block_size: int | None = None,
) -> Array:
  """The separation term alone; AlignCLIP adds half of it to the contrastive loss.

  The mean over pairs j that have both modalities of

    log(e^{s v_j · t_j} + Σ_{k ≠ j} e^{s d_jk v_j · v_k}) − s v_j · t_j

  with v images, t texts and d_jk = 1 − cos(f_j, f_k) of frozen text features f. Images
  of like texts are hardly pushed apart. Differentiable in image, text and logit_scale.

  Args:
    image, text: (N, D) unit rows, float32 or bfloat16.
    text_features: (N, F), of any length; no gradient. None means d = 1, and so does a
      pair without text.
    logit_scale, pair_ids, has_image, has_text, mesh, batch_axes, form, block_size: as
      in `gcl_loss`.

  Returns:
    The loss, a float32 scalar; 0 where nothing counts.

  Raises:
    ValueError: as in `gcl_loss`.
  """
  check_form(form, block_size)
  pairs = make_pairs(
    image,
    text,
    pair_ids=pair_ids,
    has_image=has_image,
    has_text=has_text,
    text_features=text_features,
  )
  return _mean_loss(
    pairs,
    scalar_scale(logit_scale),
    mesh=mesh,
    batch_axes=tuple(batch_axes),
    form=form,
    block_size=block_size,
  )


@functools.partial(
  jax.jit,
  static_argnames=("mesh", "batch_axes", "form", "block_size"),
)
def _mean_loss(
  pairs: Pairs,
  scale: Array,
  *,
  mesh: Mesh | None,
  batch_axes: tuple[str, ...],
  form: str,
  block_size: int | None,
) -> Array:
  check_mesh(mesh, batch_axes, pairs.ids.shape[0])
  if form != "dense":
    plan = make_plan(
      Tile(1, False, ((0, 0),), matmul_precision(pairs)),
      _sums,
      pairs,
      form=form,
      block_size=block_size,
      mesh=mesh,
      batch_axes=batch_axes,
    )
    return streamed(plan, pairs, scale, jnp.ones((), jnp.float32))[0]

  def local(rows: Pairs, scale: Array, summing: Summing) -> Array:
    columns = summing.gather(rows)
    precision = matmul_precision(rows)
    logits = scale * dense.similarities(rows.image, columns.image, precision)
    if rows.features is not None:
      cosines = dense.similarities(
        rows.features, columns.features, jax.lax.Precision.HIGHEST
      )
      logits *= 1.0 - cosines
    mask = dense.different(rows.ids, columns.ids) & columns.has_image
    lse = dense.masked_logsumexp(logits, mask)
    total, count = _sums(lse[None], rows, scale)
    return summing.total(total) / jnp.maximum(summing.total(count), 1.0)

  return over_batch(local, pairs, scale, mesh=mesh, batch_axes=batch_axes)


def _sums(lse: Array, rows: Pairs, scale: Array) -> tuple[Array, Array]:
  """Sum of the terms of rows that have both modalities, and how many; lse (1, n)."""
  counted = rows.has_image & rows.has_text
  rows = rows.in_float32()
  positive = scale * jnp.sum(rows.image * rows.text, axis=-1)
  terms = jnp.where(counted, denominators.excess(lse, positive), 0.0)
  return jnp.sum(terms), jnp.sum(counted, dtype=jnp.float32)
