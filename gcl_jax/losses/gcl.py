"""Generalized Contrastive Learning (arXiv 2509.25638) and the CLIP loss."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from gcl_jax.fusion import Mix
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
from gcl_jax.losses.tiles import Tile, is_mixed


def gcl_loss(
  image: Array,
  text: Array,
  fused: Array | Mix,
  *,
  logit_scale: ArrayLike,
  denominator: str = "self_masked",
  direction_weights: ArrayLike | None = None,
  pair_ids: Array | None = None,
  has_image: Array | None = None,
  has_text: Array | None = None,
  mesh: Mesh | None = None,
  batch_axes: tuple[str, ...] = ("data",),
  form: str = "auto",
  block_size: int | None = None,
  kernel: str = "xla",
) -> tuple[Array, Array]:
  """The GCL loss over the six directions between image, text and fused embeddings.

  For every pair j and direction (a, b), a ≠ b: ℓ = log-denominator − s e_a · e_b. The
  denominator holds candidates of all three modalities from the whole batch. The loss is
  the weighted mean of ℓ (with weights 1: equation 2 of the paper). Denominators:

    self_masked  all candidates but the anchor itself (the paper's figure 3 and text)
    literal      the anchor too (the paper's equation 2 as printed)
    clean        self_masked without the other positive
    cross_only   self_masked without negatives of the anchor's own modality
    target_only  candidates of the positive's modality alone

  Nothing is normalised here. Differentiable in image, text, fused (or both its weights)
  and logit_scale: once, in reverse mode (`form="dense"` any way).

  Args:
    image, text: (N, D) unit rows, float32 or bfloat16; N is the global batch.
    fused: (N, D) unit rows, or `Mix` of two (N,): e_it = alpha e_i + beta e_t.
    logit_scale: s = 1/τ, a positive scalar, already exponentiated.
    denominator: see above.
    direction_weights: (3, 3), rows query, columns candidate; by default all 1. The
      diagonal is ignored.
    pair_ids: integers (N,) or (N, K). Two pairs that agree in any column are neither
      positive nor negative to each other. By default the position.
    has_image, has_text: (N,) bool, None where all are there. Fused exists where both
      do. Absent entries may hold anything, NaN included. Rows with neither are padding:
      they change nothing and their gradient is zero.
    mesh: the arrays are the global batch, sharded over `batch_axes`, which are Auto
      axes; negatives are global. Collectives: see `form`.
    batch_axes: the mesh axes that split the batch, in the order of the sharding.
    form: how what is quadratic in N is computed; value and gradients are the same, but
      for digits that large weights of a Mix cost the first two (alpha 2: 1e-5, 20: 1e-3
      of a gradient; hand them the fused bank then).
      "streaming" never holds more than a tile of logits: O(block² + n D + N D) of
        memory. All-gathers embeddings, ids, presence, and the log-sum-exps with their
        cotangents, all in the forward, and all-reduces 18 floats; the backward
        all-reduces one.
      "ring" sends the embeddings round the devices instead, in the backward once more:
        O(n D) of memory. On one device it is "streaming".
      "dense" holds all logits of its rows, (3 N / devices) · 3 N: the oracle.
        All-gathers the embeddings (backward: reduce-scatter).
      "auto" is "streaming", or "ring" where the gathered embeddings would take more
        than 2 GiB of a device.
    block_size: rows and columns of a tile, at most; None is 256 on a CPU, else 512, of
      the kernels 4096. "dense" has no tiles.
    kernel: what computes a tile: "xla", or "pallas", kernels for NVIDIA GPUs (elsewhere
      they are interpreted, slowly), for D that is a multiple of 16. They round the
      weights of the backward to the type of the embeddings.

  Returns:
    loss: float32 scalar, 0 where nothing counts. With equal weights `self_masked` does
      not fall below ln 2.
    directions: (3, 3) float32, the mean ℓ per direction whatever its weight; 0 on the
      diagonal and where nothing counts. No gradient.

  Raises:
    ValueError: shapes disagree, an unknown denominator, form or kernel, a mesh whose
      axes are not Auto or do not divide the batch.
  """
  check_form(form, block_size, kernel)
  denominators.candidates(denominator, 0, 1)
  weights = np.ones((3, 3)) if direction_weights is None else direction_weights
  weights = jnp.asarray(weights, jnp.float32)
  if weights.shape != (3, 3):
    raise ValueError(f"direction_weights has shape {weights.shape}, not (3, 3)")
  weights = jax.lax.stop_gradient(jnp.where(jnp.eye(3, dtype=bool), 0.0, weights))
  pairs = make_pairs(
    image, text, fused, pair_ids=pair_ids, has_image=has_image, has_text=has_text
  )
  return _mean_loss(
    pairs,
    scalar_scale(logit_scale),
    weights,
    denominator=denominator,
    mesh=mesh,
    batch_axes=tuple(batch_axes),
    form=form,
    block_size=block_size,
    kernel=kernel,
  )


def contrastive_loss(
  image: Array,
  text: Array,
  *,
  logit_scale: ArrayLike,
  pair_ids: Array | None = None,
  has_image: Array | None = None,
  has_text: Array | None = None,
  mesh: Mesh | None = None,
  batch_axes: tuple[str, ...] = ("data",),
  form: str = "auto",
  block_size: int | None = None,
  kernel: str = "xla",
) -> tuple[Array, Array]:
  """CLIP's loss (equation 1 of the paper): `target_only` over image ↔ text.

  Arguments, errors and collectives as in `gcl_loss`; pairs that lack a modality are
  candidates in the one that they have.

  Returns:
    loss: float32 scalar. directions: (3, 3) float32 without gradient, of which [0, 1]
      (image → text) and [1, 0] are filled.
  """
  check_form(form, block_size, kernel)
  pairs = make_pairs(
    image, text, pair_ids=pair_ids, has_image=has_image, has_text=has_text
  )
  loss, directions = _mean_loss(
    pairs,
    scalar_scale(logit_scale),
    jnp.ones((2, 2), jnp.float32),
    denominator="target_only",
    mesh=mesh,
    batch_axes=tuple(batch_axes),
    form=form,
    block_size=block_size,
    kernel=kernel,
  )
  return loss, jnp.pad(directions, ((0, 1), (0, 1)))


@functools.partial(
  jax.jit,
  static_argnames=(
    "denominator",
    "mesh",
    "batch_axes",
    "form",
    "block_size",
    "kernel",
  ),
)
def _mean_loss(
  pairs: Pairs,
  scale: Array,
  weights: Array,
  *,
  denominator: str,
  mesh: Mesh | None,
  batch_axes: tuple[str, ...],
  form: str,
  block_size: int | None,
  kernel: str,
) -> tuple[Array, Array]:
  check_mesh(mesh, batch_axes, pairs.ids.shape[0])
  modalities = len(pairs.there)
  read = denominators.blocks(denominator, modalities)
  if form != "dense":
    blocks, precision = tuple(sorted(read)), matmul_precision(pairs)
    tile = Tile(modalities, is_mixed(pairs), blocks, precision)
    formula = functools.partial(_sums, tile.blocks, denominator)
    plan = make_plan(
      tile,
      formula,
      pairs,
      form=form,
      block_size=block_size,
      mesh=mesh,
      batch_axes=batch_axes,
      kernel=kernel,
    )
    return streamed(plan, pairs, scale, weights)

  def local(rows: Pairs, shared: Any, summing: Summing) -> tuple[Array, Array]:
    scale, weights = shared
    # A Mix makes new float32 rows of bfloat16 ones.
    precision = matmul_precision(rows.written_out() if is_mixed(rows) else rows)
    rows = rows.written_out()
    lse = dense.negatives_lse(
      rows, summing.gather(rows), scale, blocks=read, precision=precision
    )
    sums, counts = denominators.direction_losses(
      lse, scale * rows.same_pair, rows.there, denominator
    )
    return denominators.weighted_mean(
      summing.total(sums), summing.total(counts), weights
    )

  return over_batch(local, pairs, (scale, weights), mesh=mesh, batch_axes=batch_axes)


def _sums(
  blocks: tuple[tuple[int, int], ...],
  denominator: str,
  lse: Array,
  rows: Pairs,
  scale: Array,
) -> tuple[Array, Array]:
  """`direction_losses` of the blocks' log-sum-exps, (P, n)."""
  modalities = len(rows.there)
  table = jnp.full((modalities, modalities, lse.shape[1]), -jnp.inf, jnp.float32)
  table = table.at[tuple(zip(*blocks, strict=True))].set(lse)
  same = scale * rows.same_pair
  return denominators.direction_losses(table, same, rows.there, denominator)
