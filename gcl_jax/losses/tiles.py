"""One tile of the similarity matrices: a block of anchors against a block of candidates.

An engine walks over tiles and knows neither modalities nor fusion: a `Tile` folds two
blocks into their log-sum-exps, and pulls the gradient of these back to the blocks. What
is cheap about score fusion (four products instead of nine) lives here.

Everything here is (P, ...) over the P blocks (anchor modality, candidate modality) of a
`Tile`. No collectives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
  features: what has no gradient, each with a leading axis of rows: the (B, F) of
    `factor`, or None. there: (M, B) bool. ids: (B, K).
  """

  vectors: Vectors
  features: Any
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

  def begin(self, zeros: Array) -> Running:
    """The state of anchors before any candidate was seen; zeros (P, n)."""
    return Running(zeros - jnp.inf, zeros)

  def finish(self, running: Running) -> Array:
    """The log-sum-exp (P, n); −∞ where there was no negative."""
    some = running.total != 0  # a NaN stays one
    log = jnp.log(jnp.where(some, running.total, 1.0))
    return jnp.where(some, running.peak + log, -jnp.inf)

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
    products = self._multiplied(rows.vectors, columns.vectors)
    mixes = self.mix(rows.vectors), self.mix(columns.vectors)
    logits = [scale * x for x in self.table(products, *mixes, factor)]
    mine = updated(mine, logits, self.read(rows, columns), axis=1)
    if theirs is None:
      return mine, None
    # Block (a, m) of the tile, read along its columns, is (m, a) of anchors k.
    masks = self.read_back(rows, columns)
    return mine, self.turned(updated(self.turned(theirs), logits, masks, axis=0))

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
    products = self._multiplied(rows.vectors, columns.vectors)
    mixes = self.mix(rows.vectors), self.mix(columns.vectors)

    def similar(products, mixes):
      return self.table(products, *mixes, factor)

    found, back = jax.vjp(similar, products, mixes)
    logits = [scale * x for x in found]
    weights, (mine, theirs) = back(self.weights(logits, rows, columns, own, others))
    gradient = self.gradient(columns.vectors, weights, mine)
    if not both:
      return gradient, None
    return gradient, self.gradient(rows.vectors, weights, theirs, turned=True)

  @property
  def products(self) -> tuple[tuple[int, int], ...]:
    """Which banks are multiplied: (of the rows, of the columns)."""
    return ((0, 0), (0, 1), (1, 0), (1, 1)) if self.mixed else self.blocks

  def mix(self, vectors: Vectors) -> Mix | None:
    """The part of the vectors that is no bank."""
    return vectors[2] if self.mixed else None

  def table(
    self,
    products: Sequence[Array],
    mine: Mix | None,
    theirs: Mix | None,
    factor: Array | None = None,
  ) -> list[Array]:
    """e_a^j · e_m^k for every block (a, m), times `factor` if any.

    Args:
      products: (R, C) each, of `products`.
      mine, theirs: `mix` of the rows' vectors and of the columns'.
      factor: (R, C).
    """
    found = list(products)
    if self.mixed:
      nine = _nine(*products, mine, theirs)
      found = [nine[block] for block in self.blocks]
    return found if factor is None else [factor * x for x in found]

  def gradient(
    self,
    others: Vectors,
    weights: Sequence[Array],
    mix: Mix | None,
    *,
    turned: bool = False,
  ) -> Vectors:
    """dL/d(vectors) of one side, from dL/d(products) and the other side's vectors.

    The weights are rounded to the type of the embeddings; sums are float32.

    Args:
      others: the columns' vectors; turned: the rows'.
      weights: (R, C) each, of `products`.
      mix: dL/d(mix) of this side, which is handed on.
    """
    sums: dict[int, Array] = {}
    for (a, m), weight in zip(self.products, weights, strict=True):
      to, of = (m, a) if turned else (a, m)
      bank = others[of]
      weight = weight.astype(bank.dtype)
      if turned:
        # weightᵀ bank as (bankᵀ weight)ᵀ: a CPU's product with its left side transposed
        # runs at three quarters of the rate, and transposing (B, D) is cheap.
        more = self._dot(jax.lax.optimization_barrier(bank.T), weight).T
      else:
        more = self._dot(weight, bank)
      sums[to] = sums[to] + more if to in sums else more
    banks = [sums[bank] for bank in range(2 if self.mixed else self.modalities)]
    return (*banks, mix) if self.mixed else tuple(banks)

  def _dot(self, x: Array, y: Array) -> Array:
    return jnp.dot(x, y, precision=self.precision, preferred_element_type=jnp.float32)

  def _multiplied(self, rows: Vectors, columns: Vectors) -> list[Array]:
    return [similarities(rows[a], columns[m], self.precision) for a, m in self.products]

  def weights(
    self,
    logits: list[Array],
    rows: Block,
    columns: Block,
    own: Anchors,
    others: Anchors,
  ) -> list[Array]:
    """dL/dX / s for every block of the tile, (R, C): X as anchors' rows have it, and
    as others' candidates.
    """
    return jax.lax.cond(
      self.one_will_do(rows, columns, own, others),
      lambda: self.one_exponential(
        logits, different(rows.ids, columns.ids), own, others, own.lse[0, 0]
      ),
      lambda: self.two_exponentials(
        logits, self.read(rows, columns), self.read_back(rows, columns), own, others
      ),
    )

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
    return jax.tree.map(lambda x: x[order], running)

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


def updated(
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


def _nine(
  a: Array, b: Array, c: Array, t: Array, mix: Mix, other: Mix
) -> dict[tuple[int, int], Array]:
  """The nine similarities (R, C) of a Mix from four; what is not read costs nothing.

  Args:
    a, b, c, t: image · image, image · text, text · image, text · text.
    mix: (R,) each, of the rows. other: (C,) each, of the columns.
  """
  alpha, beta = (weight[:, None] for weight in mix)
  other_alpha, other_beta = (weight[None, :] for weight in other)
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
