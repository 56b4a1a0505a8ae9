"""The tile as GPU kernels: products, masks, exponentials and sums in one pass (Pallas).

XLA writes every product of a tile to memory and reads it back for its masks and its
exponentials. Here a tile is cut into squares that stay in a processor's registers. The
forward writes a maximum and a sum per anchor and square. The backward computes the
square again and writes the weights of the products, four of a Mix instead of nine, which
large matrix products then turn into gradients.

Lowered through Triton; where there is no GPU, the kernels are interpreted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from gcl_jax.fusion import Mix
from gcl_jax.losses.pairs import KERNEL_DEPTH
from gcl_jax.losses.tiles import Anchors, Block, Running, Tile, Vectors

# Rows and columns of a square: the four float32 accumulators of a Mix take 64 KiB of
# the 256 KiB of registers that a processor has.
SIDE = 64
# Of the embeddings, a step of a product: the widest of these that divides them.
_DEPTHS = (64, 32, KERNEL_DEPTH)
_PARAMETERS = triton.CompilerParams(num_warps=8, num_stages=3)


class _Side(NamedTuple):
  """A block's arrays, or a kernel's references to those of one square.

  banks: (B, D) each. mix: (B,) each. there: (M, B) int32. ids: (K, B).
  """

  banks: Sequence[Array]
  mix: Sequence[Array]
  there: Array
  ids: Array


@dataclasses.dataclass(frozen=True)
class KernelTile(Tile):
  """A `Tile` whose `fold` and `pull` are kernels; R and C are multiples of `SIDE`.

  Takes no features. The depth of embeddings is a multiple of 16.

  Attributes:
    interpret: run the kernels' programs as JAX instead of compiling them for a GPU.
  """

  interpret: bool

  multiple: ClassVar[int] = SIDE

  def fold(
    self,
    rows: Block,
    columns: Block,
    scale: Array,
    mine: Running,
    theirs: Running | None = None,
  ) -> tuple[Running, Running | None]:
    """As `Tile.fold`."""
    both = theirs is not None
    kernel = functools.partial(_fold_square, self, both)
    lines = [(len(self.blocks),)] * 2
    found = self._call(kernel, rows, columns, scale, lines=lines, both=both)
    mine = _merged(mine, Running(*found[:2]))
    if not both:
      return mine, None
    return mine, self.turned(_merged(self.turned(theirs), Running(*found[2:])))

  def pull(
    self,
    rows: Block,
    columns: Block,
    scale: Array,
    own: Anchors,
    others: Anchors,
    *,
    both: bool,
  ) -> tuple[Vectors, Vectors | None]:
    """As `Tile.pull`; the weights are rounded to the embeddings' type."""

    def found(one: bool):
      kernel = functools.partial(_pull_square, self, one, both)
      return self._call(
        kernel,
        rows,
        columns,
        scale,
        (own, others),
        squares=[rows.vectors[0].dtype] * len(self.products),
        lines=[()] * 2 if self.mixed else [],
        both=both,
      )

    every = len(self.products)
    one_will_do = self.one_will_do(rows, columns, own, others)
    results = jax.lax.cond(one_will_do, lambda: found(True), lambda: found(False))
    weights, lines = results[:every], [jnp.sum(x, axis=-2) for x in results[every:]]
    mine, theirs = (Mix(*lines[i : i + 2]) if lines[i:] else None for i in (0, 2))
    gradient = self.gradient(columns.vectors, weights, mine)
    if not both:
      return gradient, None
    return gradient, self.gradient(rows.vectors, weights, theirs, turned=True)

  def _call(
    self,
    kernel: Callable[..., None],
    rows: Block,
    columns: Block,
    scale: Array,
    anchors: tuple[Anchors, Anchors] | None = None,
    *,
    squares: Sequence[jnp.dtype] = (),
    lines: Sequence[tuple[int, ...]],
    both: bool,
  ) -> list[Array]:
    """Runs a kernel on every square of a tile.

    Args:
      kernel: called with `_Side`s of rows and of columns, the scale, the anchors (where
        given, with their pivot), and the references to write to, a list.
      squares: types of the results (R, C).
      lines: leading dimensions of float32 results with one value per row and square
        across, (..., C / SIDE, R); if `both`, as many per column, (..., R / SIDE, C).
    """
    down, across = len(rows.ids) // SIDE, len(columns.ids) // SIDE
    sides = [self._side(rows), self._side(columns)]
    arguments = [*sides, scale[None]]
    specs = [_side_specs(side, axis) for axis, side in enumerate(sides)]
    specs.append(pl.BlockSpec((1,), lambda i, j: (0,)))
    if anchors is not None:
      arguments += [*anchors, anchors[0].lse[0, :1]]
      specs += [
        jax.tree.map(functools.partial(_spec, axis=axis, of=1), found)
        for axis, found in enumerate(anchors)
      ]
      specs.append(pl.BlockSpec((1,), lambda i, j: (0,)))

    shapes = [((down * SIDE, across * SIDE), dtype) for dtype in squares]
    out_specs = [pl.BlockSpec((SIDE, SIDE), lambda i, j: (i, j)) for _ in squares]
    for axis in range(1 + both):
      counts = (across, down * SIDE) if axis == 0 else (down, across * SIDE)
      for leading in lines:
        shapes.append(((*leading, *counts), jnp.float32))
        out_specs.append(_line_spec(leading, axis))

    leaves, structure = jax.tree.flatten(arguments)

    def body(*refs):
      kernel(
        *jax.tree.unflatten(structure, refs[: len(leaves)]), list(refs[len(leaves) :])
      )

    return pl.pallas_call(
      body,
      out_shape=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
      in_specs=structure.flatten_up_to(specs),
      out_specs=out_specs,
      grid=(down, across),
      compiler_params=_PARAMETERS,
      interpret=self.interpret,
    )(*leaves)

  def _side(self, block: Block) -> _Side:
    banks = block.vectors[:2] if self.mixed else block.vectors
    mix = tuple(block.vectors[2]) if self.mixed else ()
    return _Side(banks, mix, block.there.astype(jnp.int32), block.ids.T)


def kernel_tile(tile: Tile, depth: int, platform: str) -> KernelTile:
  """The same tile as kernels, for embeddings of so many numbers.

  Raises:
    ValueError: the depth is not a multiple of 16.
  """
  if depth % KERNEL_DEPTH:
    raise ValueError(
      f"kernel='pallas' takes embeddings of a multiple of {KERNEL_DEPTH} numbers, not "
      f"of {depth}: use kernel='xla'"
    )
  fields = {f.name: getattr(tile, f.name) for f in dataclasses.fields(tile)}
  return KernelTile(**fields, interpret=platform not in ("gpu", "cuda"))


def _spec(array: Array, axis: int, of: int) -> pl.BlockSpec:
  """SIDE entries of dimension `of`, by the square's place down (axis 0) or across."""
  shape = tuple(SIDE if d == of else n for d, n in enumerate(array.shape))

  def place(*square):
    return tuple(square[axis] if d == of else 0 for d in range(len(shape)))

  return pl.BlockSpec(shape, place)


def _side_specs(side: _Side, axis: int) -> _Side:
  def spec(of):
    return functools.partial(_spec, axis=axis, of=of)

  banks, mix = (jax.tree.map(spec(0), arrays) for arrays in (side.banks, side.mix))
  return _Side(banks, mix, spec(1)(side.there), spec(1)(side.ids))


def _line_spec(leading: tuple[int, ...], axis: int) -> pl.BlockSpec:
  def place(*square):
    return (*(0 for _ in leading), square[1 - axis], square[axis])

  return pl.BlockSpec((*leading, None, SIDE), place)


def _fold_square(tile: KernelTile, both: bool, rows, columns, scale, out) -> None:
  """Writes the maximum and the sum of every anchor's logits in one square."""
  found = tile.table(_products(tile, rows, columns), _mix(rows), _mix(columns))
  apart = _apart(rows, columns)
  for p, (x, (a, m)) in enumerate(zip(found, tile.blocks, strict=True)):
    logit = scale[0] * x
    for axis, there in (
      (1, columns.there[m, :][None, :]),
      (0, rows.there[a, :][:, None]),
    ):
      if axis == 0 and not both:
        continue
      masked = jnp.where(apart & (there != 0), logit, -jnp.inf)
      peak = jnp.max(masked, axis=axis)
      # −∞ − −∞ is NaN; without a negative any shift will do.
      shift = jnp.expand_dims(jnp.where(peak > -jnp.inf, peak, 0.0), axis)
      peaks, totals = out[:2] if axis == 1 else out[2:]
      peaks[p, :] = peak
      totals[p, :] = jnp.sum(jnp.exp(masked - shift), axis=axis)


def _pull_square(
  tile: KernelTile, one: bool, both: bool, rows, columns, scale, own, others, pivot, out
) -> None:
  """Writes dL/dX / s of every product of banks in one square, and of the Mix."""
  products = _products(tile, rows, columns)

  def similar(products, mixes):
    return tile.table(products, *mixes)

  found, back = jax.vjp(similar, products, (_mix(rows), _mix(columns)))
  logits = [scale[0] * x for x in found]
  apart = _apart(rows, columns)
  own, others = (
    Anchors(*([x[p, :] for p in range(len(found))] for x in side))
    for side in (own, others)
  )
  if one:
    weights = tile.one_exponential(logits, apart, own, others, pivot[0])
  else:
    masks = [apart & (columns.there[m, :] != 0)[None, :] for _, m in tile.blocks]
    masks_back = [apart & (rows.there[a, :] != 0)[:, None] for a, _ in tile.blocks]
    weights = tile.two_exponentials(logits, masks, masks_back, own, others)
  weights, (mine, theirs) = back(weights)
  for ref, weight in zip(out, weights, strict=False):
    ref[:, :] = weight.astype(ref.dtype)
  lines = [*(mine or ()), *((theirs if both else None) or ())]
  for ref, line in zip(out[len(products) :], lines, strict=True):
    ref[:] = line


def _mix(side: _Side) -> Mix | None:
  return Mix(*(x[:] for x in side.mix)) if side.mix else None


def _products(tile: KernelTile, rows: _Side, columns: _Side) -> list[Array]:
  """The products of banks in one square, side by side: each load serves two of a Mix."""
  depth = rows.banks[0].shape[1]
  step = next(step for step in _DEPTHS if depth % step == 0)

  def further(i, sums):
    part = pl.ds(i * step, step)
    left = [bank[:, part] for bank in rows.banks]
    right = [bank[:, part] for bank in columns.banks]
    return [
      x
      + jnp.dot(
        left[a],
        right[m].T,
        precision=tile.precision,
        preferred_element_type=jnp.float32,
      )
      for x, (a, m) in zip(sums, tile.products, strict=True)
    ]

  zeros = [jnp.zeros((SIDE, SIDE), jnp.float32)] * len(tile.products)
  return jax.lax.fori_loop(0, depth // step, further, zeros)


def _apart(rows: _Side, columns: _Side) -> Array:
  """Where no column of the ids agrees."""
  same = [
    rows.ids[k, :][:, None] == columns.ids[k, :][None, :]
    for k in range(rows.ids.shape[0])
  ]
  return ~functools.reduce(jnp.logical_or, same)


def _merged(state: Running, parts: Running) -> Running:
  """The state (P, n) with what the squares found, (P, squares, n)."""
  peaks = jnp.concatenate([state.peak[:, None], parts.peak], axis=1)
  totals = jnp.concatenate([state.total[:, None], parts.total], axis=1)
  peak = jnp.max(peaks, axis=1)
  shift = jnp.where(peak > -jnp.inf, peak, 0.0)[:, None]
  return Running(peak, jnp.sum(totals * jnp.exp(peaks - shift), axis=1))
