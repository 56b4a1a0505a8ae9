"""The streaming engine: log-sum-exp over negatives and its gradient, tile by tile.

Never more than one tile of logits lives at a time. Two walks:

  rectangle  rows against columns that are other arrays: on one device of many, its own
             rows against everybody's. A tile serves its rows only.
  triangle   rows against themselves, on one device alone: S is symmetric, so only the
             tiles on and above the diagonal are computed, and one above it serves its
             rows and its columns.

The forward is an online log-sum-exp (a running maximum and sum). The backward computes
the tiles again. By the symmetry of S the gradient of a row needs the softmax weights of
its own anchors and those of all others in which it is a candidate, and both stand in the
same tile: dL/dX_am[j, k] = s (g[a,m,j] exp(sX − lse[a,m,j]) + g[m,a,k] exp(sX −
lse[m,a,k])), with X without s and g the cotangent of lse. No sum over devices is left.

Everything here is (P, ...) over the P blocks (anchor modality, candidate modality) of a
`Tile`. No collectives.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gcl_jax.losses.dense import different
from gcl_jax.losses.tiles import Block, Tile, Vectors

# exp(x − FAR) is 0 for every logit x: the log-sum-exp of an anchor without negatives,
# as the backward reads it.
_FAR = 1e30

# Within so much of each other, exp of a difference of log-sum-exps is far from the ends
# of float32, and what an underflow of one weight loses of the other is about 1e-12.
_NEAR = 60.0


class Running(NamedTuple):
  """An unfinished log-sum-exp: the largest logit so far, and Σ exp(logit − it)."""

  peak: Array
  total: Array


class Anchors(NamedTuple):
  """What the backward knows of anchors: their log-sum-exp and its cotangent, (P, n)."""

  lse: Array
  cotangent: Array


def nothing_yet(tile: Tile, rows: Block) -> Running:
  """The state of these anchors before any candidate was seen, (P, n)."""
  # Made from the rows, so that inside a `shard_map` it varies as they do.
  zeros = jnp.stack([_zeros(rows.vectors[0][:, 0])] * len(tile.blocks))
  return Running(zeros - jnp.inf, zeros)


def finished(running: Running) -> Array:
  """The log-sum-exp; −∞ where there was no negative."""
  some = running.total != 0  # a NaN stays one
  log = jnp.log(jnp.where(some, running.total, 1.0))
  return jnp.where(some, running.peak + log, -jnp.inf)


def rectangle_forward(
  tile: Tile,
  rows: Block,
  columns: Block,
  scale: Array,
  running: Running,
  sizes: tuple[int, int],
) -> Running:
  """Adds the columns (m rows) to the log-sum-exp of the rows (n).

  Args:
    tile: what to compute.
    rows, columns: of any length.
    scale: float32 scalar.
    running: (P, n), the state so far.
    sizes: rows and columns of a tile.
  """
  row_blocks, column_blocks = _cut(rows, sizes[0]), _cut(columns, sizes[1])

  def row(_, inputs):
    block, state = inputs

    def column(state, other):
      return _add_rows(tile, block, other, scale, state), None

    return None, jax.lax.scan(column, state, column_blocks)[0]

  state = _cut_anchors(running, sizes[0])
  _, state = jax.lax.scan(row, None, (row_blocks, state))
  return _join_anchors(state, len(rows.ids))


def rectangle_backward(
  tile: Tile,
  rows: Block,
  columns: Block,
  scale: Array,
  own: Anchors,
  others: Anchors,
  sizes: tuple[int, int],
) -> Vectors:
  """Σ over the columns of dL/dX · ∂X/∂rows: the gradient of the rows' vectors.

  Args:
    own: of the rows, (P, n). others: of the columns, (P, m).
    tile, rows, columns, scale, sizes: as in `rectangle_forward`.
  """
  row_blocks, column_blocks = _cut(rows, sizes[0]), _cut(columns, sizes[1])
  own = _cut_anchors(_safe(own), sizes[0])
  others = _cut_anchors(_safe(others), sizes[1])

  def row(_, inputs):
    block, anchors = inputs

    def column(gradient, inputs):
      other, other_anchors = inputs
      factor = tile.factor(block, other)

      def similar(vectors):
        return tile.similarities(vectors, other.vectors, factor)

      found, pull = jax.vjp(similar, block.vectors)
      weights = _weights(tile, block, other, scale, found, anchors, other_anchors)
      return jax.tree.map(jnp.add, gradient, pull(weights)[0]), None

    zeros = jax.tree.map(_zeros, block.vectors)
    return None, jax.lax.scan(column, zeros, (column_blocks, others))[0]

  _, gradient = jax.lax.scan(row, None, (row_blocks, own))
  return _join(jax.tree.map(lambda x: scale * x, gradient), len(rows.ids))


def triangle_forward(tile: Tile, rows: Block, scale: Array, size: int) -> Running:
  """The log-sum-exp of all rows over all rows, from the upper half of the tiles."""
  blocks = _cut(rows, size)
  count = blocks.ids.shape[0]

  # An inner loop changes one place of what it carries, and reads that place only: XLA
  # then updates it where it lies. Two places in one body cost two copies a tile.
  def row(i, state):
    block = _at(blocks, i)
    mine = _add_rows(tile, block, block, scale, _at(state, i))

    def across(j, carried):
      mine, state = carried
      other = _at(blocks, j)
      found = tile.similarities(block.vectors, other.vectors, tile.factor(block, other))
      logits = [scale * x for x in found]
      mine = _updated(mine, logits, tile.read(block, other), axis=1)
      # Block (a, m) of the tile, read along its columns, is (m, a) of anchors k.
      theirs = _turned(tile, _at(state, j))
      theirs = _updated(theirs, logits, tile.read_back(block, other), axis=0)
      return mine, _put(state, j, _turned(tile, theirs))

    mine, state = jax.lax.fori_loop(i + 1, count, across, (mine, state))
    return _put(state, i, mine)

  state = _cut_anchors(nothing_yet(tile, rows), size)
  state = jax.lax.fori_loop(0, count, row, state)
  return _join_anchors(state, len(rows.ids))


def triangle_backward(
  tile: Tile, rows: Block, scale: Array, own: Anchors, size: int
) -> Vectors:
  """The gradient of all rows' vectors; arguments as in `rectangle_backward`."""
  blocks, own = _cut(rows, size), _cut_anchors(_safe(own), size)
  count = blocks.ids.shape[0]

  def row(i, gradient):
    block, anchors = _at(blocks, i), _at(own, i)
    factor = tile.factor(block, block)
    found, pull = jax.vjp(
      lambda vectors: tile.similarities(vectors, block.vectors, factor), block.vectors
    )
    weights = _weights(tile, block, block, scale, found, anchors, anchors)
    mine = jax.tree.map(jnp.add, _at(gradient, i), pull(weights)[0])

    def across(j, carried):
      mine, gradient = carried
      other = _at(blocks, j)
      factor = tile.factor(block, other)
      found, pull = jax.vjp(
        lambda vectors, others: tile.similarities(vectors, others, factor),
        block.vectors,
        other.vectors,
      )
      weights = _weights(tile, block, other, scale, found, anchors, _at(own, j))
      more, of_columns = pull(weights)
      theirs = jax.tree.map(jnp.add, _at(gradient, j), of_columns)
      return jax.tree.map(jnp.add, mine, more), _put(gradient, j, theirs)

    mine, gradient = jax.lax.fori_loop(i + 1, count, across, (mine, gradient))
    return _put(gradient, i, mine)

  gradient = jax.tree.map(_zeros, blocks.vectors)
  gradient = jax.lax.fori_loop(0, count, row, gradient)
  return _join(jax.tree.map(lambda x: scale * x, gradient), len(rows.ids))


def _add_rows(
  tile: Tile, block: Block, other: Block, scale: Array, state: Running
) -> Running:
  found = tile.similarities(block.vectors, other.vectors, tile.factor(block, other))
  logits = [scale * x for x in found]
  return _updated(state, logits, tile.read(block, other), axis=1)


def _updated(
  state: Running, logits: list[Array], masks: list[Array], axis: int
) -> Running:
  """Folds one tile into the state, along its rows (axis 1) or columns (axis 0)."""
  peaks, totals = [], []
  for p, (logit, mask) in enumerate(zip(logits, masks, strict=True)):
    masked = jnp.where(mask, logit, -jnp.inf)
    peak = jnp.maximum(state.peak[p], jnp.max(masked, axis=axis))
    # −∞ − −∞ is NaN; without a negative so far any shift will do.
    shift = jnp.where(peak > -jnp.inf, peak, 0.0)
    more = jnp.sum(jnp.exp(masked - jnp.expand_dims(shift, axis)), axis=axis)
    totals.append(state.total[p] * jnp.exp(state.peak[p] - shift) + more)
    peaks.append(peak)
  return Running(jnp.stack(peaks), jnp.stack(totals))


def _weights(
  tile: Tile,
  block: Block,
  other: Block,
  scale: Array,
  found: list[Array],
  anchors: Anchors,
  other_anchors: Anchors,
) -> list[Array]:
  """dL/dX / s for every block of a tile: as anchors' rows, and as others' candidates.

  The two weights are exponentials of one logit less two log-sum-exps. Where these lie
  close together over the tile, and all is there, so that both weights have one mask,
  the second is the first times a product of two vectors.
  """
  lse = anchors.lse, other_anchors.lse
  highest, lowest = (jnp.maximum(*map(jnp.max, lse)), jnp.minimum(*map(jnp.min, lse)))
  near = highest - lowest < _NEAR
  whole = jnp.all(block.there) & jnp.all(other.there)
  apart = different(block.ids, other.ids)

  def one_exponential():
    weights = []
    for p, (x, q) in enumerate(zip(found, tile.transposed, strict=True)):
      own, theirs = anchors.lse[p], other_anchors.lse[q]
      down = jnp.exp(jnp.where(apart, scale * x - own[:, None], -jnp.inf))
      up = jnp.exp(own - own[0])
      back = other_anchors.cotangent[q] * jnp.exp(own[0] - theirs)
      both = anchors.cotangent[p][:, None] + up[:, None] * back[None, :]
      weights.append(down * both)
    return weights

  def two_exponentials():
    masks, masks_back = tile.read(block, other), tile.read_back(block, other)
    weights = []
    for p, (x, q) in enumerate(zip(found, tile.transposed, strict=True)):
      logit = scale * x
      down = jnp.exp(jnp.where(masks[p], logit - anchors.lse[p][:, None], -jnp.inf))
      back = logit - other_anchors.lse[q][None, :]
      back = jnp.exp(jnp.where(masks_back[p], back, -jnp.inf))
      down *= anchors.cotangent[p][:, None]
      back *= other_anchors.cotangent[q][None, :]
      weights.append(down + back)
    return weights

  return jax.lax.cond(near & whole, one_exponential, two_exponentials)


def _zeros(like: Array) -> Array:
  """float32 zeros that vary over devices as `like` does; NaN where it is not finite."""
  return 0.0 * like.astype(jnp.float32)


def _safe(anchors: Anchors) -> Anchors:
  lse = jnp.where(anchors.lse > -jnp.inf, anchors.lse, _FAR)
  return Anchors(lse, anchors.cotangent)


def _turned(tile: Tile, running: Running) -> Running:
  """The places of (a, m) and (m, a) exchanged."""
  order = jnp.asarray(tile.transposed)
  return Running(*(x[order] for x in running))


def _cut(tree: Block, size: int) -> Block:
  """(n, ...) -> (blocks, size, ...), padded with rows that are not there."""
  there = _cut_rows(jnp.moveaxis(tree.there, 0, 1), size)
  vectors, features, ids = jax.tree.map(
    lambda leaf: _cut_rows(leaf, size), (tree.vectors, tree.features, tree.ids)
  )
  return Block(vectors, features, jnp.moveaxis(there, 2, 1), ids)


def _cut_rows(leaf: Array, size: int) -> Array:
  count = -(-leaf.shape[0] // size)
  missing = count * size - leaf.shape[0]
  leaf = jnp.pad(leaf, ((0, missing), *((0, 0),) * (leaf.ndim - 1)))
  return leaf.reshape(count, size, *leaf.shape[1:])


def _join(tree: Vectors, rows: int) -> Vectors:
  """The inverse of `_cut` for vectors."""
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], tree)


def _cut_anchors(tree, size: int):
  """(P, n) -> (blocks, P, size)."""
  return jax.tree.map(lambda x: jnp.moveaxis(_cut_rows(x.T, size), 2, 1), tree)


def _join_anchors(tree, rows: int):
  """(blocks, P, size) -> (P, rows)."""
  return jax.tree.map(
    lambda x: jnp.moveaxis(x, 1, 0).reshape(x.shape[1], -1)[:, :rows], tree
  )


def _at(tree, index: Array):
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree
  )


def _put(tree, index: Array, values):
  return jax.tree.map(
    lambda x, value: jax.lax.dynamic_update_index_in_dim(x, value, index, 0),
    tree,
    values,
  )
