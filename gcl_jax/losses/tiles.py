"""One tile of the similarity matrices: a block of anchors against a block of candidates.

An engine walks over tiles and knows neither modalities nor fusion: it asks a `Tile` for
the similarities of two blocks and differentiates what it gets. What is cheap about score
fusion (four products instead of nine) lives here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gcl_jax.fusion import Mix
from gcl_jax.losses.dense import different, similarities
from gcl_jax.losses.pairs import Pairs

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

  def __post_init__(self):
    assert {(m, a) for a, m in self.blocks} == set(self.blocks)

  @property
  def transposed(self) -> list[int]:
    """For each block (a, m), the place of (m, a)."""
    return [self.blocks.index((m, a)) for a, m in self.blocks]

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
