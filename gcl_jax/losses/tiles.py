"""One tile of the similarity matrices: a block of anchors against a block of candidates.

An engine walks over tiles and knows neither modalities nor fusion: a `Tile` folds two
blocks into their log-sum-exps, and pulls the gradient of these back to the blocks. What
is cheap about score fusion (four products instead of nine) lives here.

Everything here is (P, ...) over the P blocks (anchor modality, candidate modality) of a
`Tile`. No collectives.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gcl_jax.fusion import Mix
from gcl_jax.losses.dense import different, similarities
from gcl_jax.losses.pairs import Pairs

# Within so much of each other, exp of a difference of log-sum-exps is far from the ends
# of float32, and what an underflow of one weight loses of the other is about 1e-12.
_NEAR = 60.0

# Differentiable arrays of a block, each with a leading axis of rows.
Vectors = Any


class Block(NamedTuple):
  """Some rows of the batch, as a tile needs them.

  vectors: the embeddings (B, D), and alpha and beta (B,) where the fused ones are a Mix.
  features: (B, F) or None. there: (M, B) bool. ids: (B, K).
  """

  vectors: Vectors
  features: Array | None
  there: Array
  ids: Array


class Running(NamedTuple):
  """An unfinished log-sum-exp: the largest logit so far, and Σ exp(logit − it)."""

  peak: Array
  total: Array


class Anchors(NamedTuple):
  """What the backward knows of anchors: their log-sum-exp and its cotangent, (P, n)."""

  lse: Array
  cotangent: Array


@dataclasses.dataclass(frozen=True)
class Tile:
  """Which similarities of two blocks a loss needs. Hashable, holds no array.

  Attributes:
    modalities: M.
    mixed: the third modality is alpha and beta times the first two.
    blocks: the (anchor modality, candidate modality) that the loss reads; with (a, m)
      also (m, a), since a tile is read along its rows and along its columns.
    precision: of the products.
  """

  modalities: int
  mixed: bool
  blocks: tuple[tuple[int, int], ...]
  precision: jax.lax.Precision

  # Rows and columns of a tile are a multiple of it.
  multiple: ClassVar[int] = 1

  def __post_init__(self):
    assert {(m, a) for a, m in self.blocks} == set(self.blocks)

  def fold(
    self,
    rows: Block,
    columns: Block,
    scale: Array,
    mine: Running,
    theirs: Running | None = None,
  ) -> tuple[Running, Running | None]:
    """Adds one tile to the log-sum-exp of its rows, and of its columns if asked for.

    Args:
      rows, columns: R and C of them.
      scale: float32 scalar.
      mine: (P, R), of the rows as anchors so far.
      theirs: (P, C), of the columns as anchors.
    """
    factor = self.factor(rows, columns)
    found = self.similarities(rows.vectors, columns.vectors, factor)
    logits = [scale * x for x in found]
    mine = _updated(mine, logits, self.read(rows, columns), axis=1)
    if theirs is None:
      return mine, None
    # Block (a, m) of the tile, read along its columns, is (m, a) of anchors k.
    masks = self.read_back(rows, columns)
    return mine, self.turned(_updated(self.turned(theirs), logits, masks, axis=0))

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
    """What one tile adds to dL/d(vectors) / s of its rows, and of its columns if `both`.

    Args:
      rows, columns, scale: as in `fold`.
      own: of the rows as anchors, (P, R). others: of the columns, (P, C).
    """
    factor = self.factor(rows, columns)

    def similar(*vectors):
      mine, theirs = vectors if both else (*vectors, columns.vectors)
      return self.similarities(mine, theirs, factor)

    found, pull = jax.vjp(similar, rows.vectors, *([columns.vectors] if both else []))
    logits = [scale * x for x in found]
    weights = jax.lax.cond(
      self.one_will_do(rows, columns, own, others),
      lambda: self.one_exponential(
        logits, different(rows.ids, columns.ids), own, others, own.lse[0, 0]
      ),
      lambda: self.two_exponentials(
        logits, self.read(rows, columns), self.read_back(rows, columns), own, others
      ),
    )
    gradients = pull(weights)
    return gradients if both else (*gradients, None)

  def one_will_do(
    self, rows: Block, columns: Block, own: Anchors, others: Anchors
  ) -> Array:
    """Whether `one_exponential` is exact enough for this tile, a bool scalar.

    The two weights of a logit are exponentials of it less two log-sum-exps. Where these
    lie close together over the tile, and all is there, so that both weights have one
    mask, the second is the first times a product of two vectors.
    """
    lse = own.lse, others.lse
    highest, lowest = jnp.maximum(*map(jnp.max, lse)), jnp.minimum(*map(jnp.min, lse))
    whole = jnp.all(rows.there) & jnp.all(columns.there)
    return (highest - lowest < _NEAR) & whole

  def one_exponential(
    self,
    logits: list[Array],
    apart: Array,
    own: Anchors,
    others: Anchors,
    pivot: Array,
  ) -> list[Array]:
    """dL/dX / s for every block: as anchors' rows, and as others' candidates.

    Args:
      logits: s X for every block, (R, C).
      apart: (R, C) bool, whether the ids differ.
      own, others: as in `pull`.
      pivot: a scalar near the log-sum-exps.
    """
    weights = []
    for p, (logit, q) in enumerate(zip(logits, self.transposed, strict=True)):
      lse, lse_back = own.lse[p], others.lse[q]
      down = jnp.exp(jnp.where(apart, logit - lse[:, None], -jnp.inf))
      back = others.cotangent[q] * jnp.exp(pivot - lse_back)
      both = jnp.exp(lse - pivot)[:, None] * back[None, :]
      weights.append(down * (own.cotangent[p][:, None] + both))
    return weights

  def two_exponentials(
    self,
    logits: list[Array],
    masks: list[Array],
    masks_back: list[Array],
    own: Anchors,
    others: Anchors,
  ) -> list[Array]:
    """The same of any tile; the masks are those of `read` and `read_back`."""
    weights = []
    for p, (logit, q) in enumerate(zip(logits, self.transposed, strict=True)):
      down = jnp.exp(jnp.where(masks[p], logit - own.lse[p][:, None], -jnp.inf))
      back = logit - others.lse[q][None, :]
      back = jnp.exp(jnp.where(masks_back[p], back, -jnp.inf))
      down *= own.cotangent[p][:, None]
      back *= others.cotangent[q][None, :]
      weights.append(down + back)
    return weights

  @property
  def transposed(self) -> list[int]:
    """For each block (a, m), the place of (m, a)."""
    return [self.blocks.index((m, a)) for a, m in self.blocks]

  def turned(self, running: Running) -> Running:
    """The places of (a, m) and (m, a) exchanged."""
    order = jnp.asarray(self.transposed)
    return Running(*(x[order] for x in running))

  def similarities(
    self, rows: Vectors, columns: Vectors, factor: Array | None
  ) -> list[Array]:
    """e_a^j · e_m^k (rows, columns) for every block (a, m), times `factor` if any."""

    def product(x: Array, y: Array) -> Array:
      return _product(self.precision, x, y)

    if not self.mixed:
      banks, others = tuple(rows), tuple(columns)
      table = {(a, m): product(banks[a], others[m]) for a, m in self.blocks}
    else:
      table = _mixed(product, rows, columns)
    found = [table[block] for block in self.blocks]
    return found if factor is None else [factor * x for x in found]

  def factor(self, rows: Block, columns: Block) -> Array | None:
    """1 − the cosine of the features, (rows, columns); None without features."""
    if rows.features is None:
      return None
    highest = jax.lax.Precision.HIGHEST
    return 1.0 - similarities(rows.features, columns.features, highest)

  def read(self, rows: Block, columns: Block) -> list[Array]:
    """For every block (a, m): whether candidate k of modality m is a negative of j."""
    apart = different(rows.ids, columns.ids)
    return [apart & columns.there[m] for _, m in self.blocks]

  def read_back(self, rows: Block, columns: Block) -> list[Array]:
    """For every block (a, m): whether j of modality a is a negative of anchor k."""
    apart = different(rows.ids, columns.ids)
    return [apart & rows.there[a][:, None] for a, _ in self.blocks]


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


def _mixed(product, rows: Vectors, columns: Vectors) -> dict[tuple[int, int], Array]:
  """The nine similarities from four products; what is not read is never computed."""
  image, text, mix = rows
  other_image, other_text, other_mix = columns
  alpha, beta = (weight[:, None] for weight in mix)
  other_alpha, other_beta = (weight[None, :] for weight in other_mix)
  a, b = product(image, other_image), product(image, other_text)
  c, t = product(text, other_image), product(text, other_text)
  image_fused = other_alpha * a + other_beta * b
  text_fused = other_alpha * c + other_beta * t
  return {
    (0, 0): a,
    (0, 1): b,
    (1, 0): c,
    (1, 1): t,
    (0, 2): image_fused,
    (1, 2): text_fused,
    (2, 0): alpha * a + beta * c,
    (2, 1): alpha * b + beta * t,
    (2, 2): alpha * image_fused + beta * text_fused,
  }


def is_mixed(pairs: Pairs) -> bool:
  """Whether the fused embeddings are a Mix."""
  return isinstance(pairs.fused, Mix)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(precision: jax.lax.Precision, rows: Array, columns: Array) -> Array:
  """`similarities`, with a faster way back to the columns."""
  return similarities(rows, columns, precision)


def _product_forward(precision, rows, columns):
  return _product(precision, rows, columns), (rows, columns)


def _product_backward(precision, saved, weights):
  rows, columns = saved

  def dot(x, y):
    return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)

  # weightsᵀ rows as (rowsᵀ weights)ᵀ: a CPU's product with its left side transposed
  # runs at three quarters of the rate, and transposing (B, D) is cheap.
  turned = jax.lax.optimization_barrier(rows.T)
  return dot(weights, columns), dot(turned, weights).T


_product.defvjp(_product_forward, _product_backward)
