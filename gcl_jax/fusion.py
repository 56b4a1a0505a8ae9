"""Score fusion: how an image and a text embedding become one document embedding.

The fused embedding of a pair is `alpha e_i + beta e_t` of its two unit embeddings. The
two numbers per pair (`Mix`) are all that the losses need: the fused bank itself is
written out only where somebody asks for it (`fuse`).

Source: UniIR's CLIP_SF (https://github.com/TIGER-AI-Lab/UniIR), which the GCL paper
follows: the projected vectors are added as they are and only the sum is normalised.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gcl_jax.errors import UserError

KINDS = ("raw", "unit")
ENCODER = "encoder"  # where settings are told: of a model that fuses by itself
NORM_FLOOR = 1e-6


class Mix(NamedTuple):
  """Fused embeddings as weights of unit embeddings: e_it = alpha e_i + beta e_t.

  Both (N,) float32. A pytree: it passes through `jax.jit` and `jax.grad`.
  """

  alpha: Array
  beta: Array


@dataclasses.dataclass(frozen=True)
class FusionSettings:
  """What an exported model needs to fuse as it was trained to (`gcl_jax.json`).

  Attributes:
    of: "raw" adds projected vectors, "unit" adds their directions.
    image_weight, text_weight: factors before the sum; the initial ones when learned.
    learned: whether the two weights are parameters of the model.

  Raises:
    UserError: a field holds something else.
  """

  of: str = "raw"
  image_weight: float = 1.0
  text_weight: float = 1.0
  learned: bool = False

  def __post_init__(self):
    if self.of not in KINDS:
      raise UserError(f"fusion.of is {self.of!r}: it is one of {', '.join(KINDS)}.")
    for name in ("image_weight", "text_weight"):
      value = getattr(self, name)
      number = isinstance(value, int | float) and not isinstance(value, bool)
      if not number or not math.isfinite(value):
        raise UserError(f"fusion.{name} is {value!r}: give a finite number.")
    if not isinstance(self.learned, bool):
      raise UserError(f"fusion.learned is {self.learned!r}: give true or false.")

  def to_dict(self) -> dict[str, Any]:
    """The fields as plain JSON values."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> FusionSettings:
    """The inverse of `to_dict`; fields left out take their defaults.

    Raises:
      UserError: a field is unknown or holds something that it cannot.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
      raise UserError(
        f"unknown fusion settings {', '.join(unknown)}: the known ones are "
        f"{', '.join(known)}."
      )
    return cls(**fields)


def score_fusion(
  image_raw: Array,
  text_raw: Array,
  *,
  image_weight: ArrayLike = 1,
  text_weight: ArrayLike = 1,
  of: str = "raw",
  has_image: Array | None = None,
  has_text: Array | None = None,
) -> tuple[Array, Array, Mix]:
  """Unit embeddings of both modalities, and the weights that fuse them.

  With x the projected vectors (`of="raw"`, UniIR's CLIP_SF) or their directions
  (`of="unit"`), fused = (w_i x_i + w_t x_t) / ‖·‖. Every norm is floored at 1e-6: a
  zero row gives zeros, opposite embeddings give a finite value and gradient.
  Differentiable in both embeddings and both weights. No collectives.

  Args:
    image_raw, text_raw: (N, D), projected and not normalised, any float type.
    image_weight, text_weight: scalars; may be traced (learned).
    of: "raw" or "unit".
    has_image, has_text: (N,) bool, None where all are there. Rows that lack a modality
      may hold anything there, NaN included; their gradient is zero.

  Returns:
    unit image (N, D), unit text (N, D), both float32 and zero where absent, and
    `Mix`. Where one modality is missing the fused embedding is the other's: (1, 0) or
    (0, 1); (0, 0) where both are.

  Raises:
    ValueError: shapes disagree, or `of` is something else.
  """
  if of not in KINDS:
    raise ValueError(f"of={of!r} is not one of {KINDS}")
  if image_raw.ndim != 2 or image_raw.shape != text_raw.shape:
    raise ValueError(
      f"image {image_raw.shape} and text {text_raw.shape}: both must be (N, D)"
    )
  image_there = _presence(has_image, image_raw, "has_image")
  text_there = _presence(has_text, text_raw, "has_text")
  unit_image, image_norm = _unit(image_raw, image_there)
  unit_text, text_norm = _unit(text_raw, text_there)
  w_image = jnp.asarray(image_weight, jnp.float32)
  w_text = jnp.asarray(text_weight, jnp.float32)
  if of == "raw":
    w_image, w_text = w_image * image_norm, w_text * text_norm
  total = w_image[..., None] * unit_image + w_text[..., None] * unit_text
  norm = _norm(total)
  both = image_there & text_there
  alpha = jnp.where(both, w_image / norm, image_there)
  beta = jnp.where(both, w_text / norm, text_there)
  return unit_image, unit_text, Mix(alpha, beta)


def unit_bank(
  image_raw: Array,
  text_raw: Array,
  fused_raw: Array,
  *,
  has_image: Array | None = None,
  has_text: Array | None = None,
) -> tuple[Array, Array, Array]:
  """Unit rows of a model that fuses by itself: image, text and fused, (N, D) float32.

  As `score_fusion`: where one modality is missing the fused row is the other's, rows
  that lack one may hold anything there, and norms are floored at 1e-6.

  Raises:
    ValueError: shapes disagree.
  """
  if image_raw.ndim != 2 or not (image_raw.shape == text_raw.shape == fused_raw.shape):
    raise ValueError(
      f"image {image_raw.shape}, text {text_raw.shape} and fused {fused_raw.shape}: all "
      "must be (N, D)"
    )
  image_there = _presence(has_image, image_raw, "has_image")
  text_there = _presence(has_text, text_raw, "has_text")
  image, _ = _unit(image_raw, image_there)
  text, _ = _unit(text_raw, text_there)
  both = image_there & text_there
  fused, _ = _unit(fused_raw, both)
  return image, text, jnp.where(both[:, None], fused, image + text)


def fuse(unit_image: Array, unit_text: Array, fused: Mix | Array) -> Array:
  """The fused bank (N, D) float32, written out: alpha e_i + beta e_t of a `Mix`.

  A bank is returned as it is.
  """
  if not isinstance(fused, Mix):
    return fused
  alpha, beta = (weight.astype(jnp.float32)[:, None] for weight in fused)
  return alpha * unit_image + beta * unit_text


def _presence(has: Array | None, rows: Array, name: str) -> Array:
  if has is None:
    return jnp.ones(rows.shape[0], bool)
  if has.shape != rows.shape[:1]:
    raise ValueError(f"{name} has shape {has.shape}, not {rows.shape[:1]}")
  return jnp.asarray(has, bool)


def _norm(rows: Array) -> Array:
  # The floor is inside the root: the root of zero has an infinite derivative.
  return jnp.sqrt(jnp.maximum(jnp.sum(rows * rows, axis=-1), NORM_FLOOR**2))


def _unit(rows: Array, there: Array) -> tuple[Array, Array]:
  # Absent rows are replaced before any product: 0 · NaN would be NaN.
  rows = jnp.where(there[:, None], rows.astype(jnp.float32), 0.0)
  norm = _norm(rows)
  return rows / norm[:, None], norm
