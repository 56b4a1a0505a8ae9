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

import jax
import jax.numpy as jnp
from jax import Array

from gcl_jax.losses.tiles import Anchors, Block, Running, Tile, Vectors

# exp(x − FAR) is 0 for every logit x: the log-sum-exp of an anchor without negatives,
# as the backward reads it.
_FAR = 1e30


def nothing_yet(tile: Tile, rows: Block) -> Running:
  """The state of these anchors before any candidate was seen, (P, n)."""
  # Made from the rows, so that inside a `shard_map` it varies as they do.
  return tile.begin(jnp.stack([_zeros(rows.vectors[0][:, 0])] * len(tile.blocks)))


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
      return tile.fold(block, other, scale, state)[0], None

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
      more, _ = tile.pull(block, other, scale, anchors, other_anchors, both=False)
      return jax.tree.map(jnp.add, gradient, more), None

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
    mine, _ = tile.fold(block, block, scale, _at(state, i))

    def across(j, carried):
      mine, state = carried
      other = _at(blocks, j)
      mine, theirs = tile.fold(block, other, scale, mine, _at(state, j))
      return mine, _put(state, j, theirs)

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
    more, _ = tile.pull(block, block, scale, anchors, anchors, both=False)
    mine = jax.tree.map(jnp.add, _at(gradient, i), more)

    def across(j, carried):
      mine, gradient = carried
      other = _at(blocks, j)
      more, of_columns = tile.pull(block, other, scale, anchors, _at(own, j), both=True)
      theirs = jax.tree.map(jnp.add, _at(gradient, j), of_columns)
      return jax.tree.map(jnp.add, mine, more), _put(gradient, j, theirs)

    mine, gradient = jax.lax.fori_loop(i + 1, count, across, (mine, gradient))
    return _put(gradient, i, mine)

  gradient = jax.tree.map(_zeros, blocks.vectors)
  gradient = jax.lax.fori_loop(0, count, row, gradient)
  return _join(jax.tree.map(lambda x: scale * x, gradient), len(rows.ids))


def _zeros(like: Array) -> Array:
  """float32 zeros that vary over devices as `like` does; NaN where it is not finite."""
  return 0.0 * like.astype(jnp.float32)


def _safe(anchors: Anchors) -> Anchors:
  lse = jnp.where(anchors.lse > -jnp.inf, anchors.lse, _FAR)
  return Anchors(lse, anchors.cotangent)


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
