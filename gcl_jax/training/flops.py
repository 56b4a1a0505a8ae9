"""Multiply-adds of a program, counted in what JAX traces: exact, and for any device.

The compilers' own figures count the body of a loop once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from ml_collections import ConfigDict

from gcl_jax.models import Model, VistaConfig
from gcl_jax.training.patch_dropout import kept_count

# A tower that is trained: the forward, and twice as much backward.
_TRAINED, _LOCKED = 3, 1


def pair_flops(
  model: Model,
  text_length: int,
  *,
  patch_dropout: float = 0.0,
  locked: str = "",
  teacher: Model | None = None,
  fused: bool = True,
) -> int:
  """Operations that training needs of a pair; what MFU is a share of.

  A forward through both towers and the backward of those that are trained. Of adapters
  (LoRA) the whole backward counts, though less is needed.

  Args:
    model: of `models.build`.
    text_length: tokens of a text.
    patch_dropout: part of the patches that the image tower does not see.
    locked: "image" or "text": a tower without a backward.
    teacher: a model that embeds the pair too, without a backward.
    fused: whether the loss asks for what a model makes of both, where that is a pass of
      its own (VISTA).
  """
  of_kind = _vista_flops if isinstance(model.config, VistaConfig) else _clip_flops
  own = of_kind(model, text_length, patch_dropout, locked, fused)
  if teacher is None:
    return own
  size = teacher.config.vision.image_size
  pixels = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
  tokens = jax.ShapeDtypeStruct((1, text_length), "int32")

  def both(params, pixels, tokens):
    return teacher.bind(params).embed_pair(pixels, tokens)

  return own + 2 * multiply_adds(both, teacher.abstract(), pixels, tokens)


def flops_options(config: ConfigDict, teacher: Model | None) -> dict[str, Any]:
  """What `pair_flops` is told of a run's config.

  Args:
    config: the run's.
    teacher: its teacher's model; None where it has none.
  """
  return {
    "patch_dropout": config.model.patch_dropout,
    "locked": config.optimizer.locked_tower,
    "teacher": teacher,
    # A teacher's affinities are of fused rows too, whatever the run's own loss.
    "fused": config.loss.name == "gcl" or teacher is not None,
  }


def _clip_flops(
  model: Model, text_length: int, patch_dropout: float, locked: str, fused: bool
) -> int:
  del fused  # a sum
  size, patches = model.config.vision.image_size, model.config.vision.grid**2
  pixels = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
  tokens = jax.ShapeDtypeStruct((1, text_length), "int32")
  kept = jax.ShapeDtypeStruct((1, kept_count(patches, patch_dropout)), "int32")

  def image(params, pixels, kept):
    options = {"kept_patches": kept} if patch_dropout else {}
    return model.bind(params).embed_image(pixels, **options)

  def text(params, tokens):
    return model.bind(params).embed_text(tokens)

  params = model.abstract()
  passes = {name: _LOCKED if name == locked else _TRAINED for name in ("image", "text")}
  return 2 * (
    passes["image"] * multiply_adds(image, params, pixels, kept)
    + passes["text"] * multiply_adds(text, params, tokens)
  )


def _vista_flops(
  model: Model, text_length: int, patch_dropout: float, locked: str, fused: bool
) -> int:
  """The image tower once, the encoder on each document. Through a locked encoder the
  gradient of the image tower still passes: a backward without that of its kernels."""
  size, patches = model.config.vision.image_size, model.config.vision.grid**2
  pixels = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
  tokens = jax.ShapeDtypeStruct((1, text_length), "int32")
  kept = jax.ShapeDtypeStruct((1, kept_count(patches, patch_dropout)), "int32")
  params = model.abstract()

  def tower(params, pixels, kept):
    return model.bind(params).embed_patches(pixels, kept if patch_dropout else None)

  def image(params, pixels, kept):
    options = {"kept_patches": kept} if patch_dropout else {}
    return model.bind(params).embed_image(pixels, **options)

  def both(params, pixels, tokens, kept):
    options = {"kept_patches": kept} if patch_dropout else {}
    return model.bind(params).embed_both(pixels, tokens, **options)

  def text(params, tokens):
    return model.bind(params).embed_text(tokens)

  of_tower = multiply_adds(tower, params, pixels, kept)
  beside = multiply_adds(image, params, pixels, kept) - of_tower
  if fused:
    beside += multiply_adds(both, params, pixels, tokens, kept) - of_tower
  alone = multiply_adds(text, params, tokens)
  through = 2 if locked == "text" else _TRAINED
  return 2 * (
    of_tower * (_LOCKED if locked == "image" else _TRAINED)
    + beside * through
    + alone * (_LOCKED if locked == "text" else _TRAINED)
  )


def multiply_adds(function: Callable[..., Any], *arguments: Any) -> int:
  """Multiply-adds of a function's products, over all devices.

  Args:
    arguments: arrays or shapes.
  """
  return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      depth = math.prod(left[axis] for axis in contracted)
      total += math.prod(equation.outvars[0].aval.shape) * depth
    elif name == "conv_general_dilated":
      # Every output is a sum over a kernel's window and its input channels.
      kernel, spec = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
      depth = math.prod(kernel) // kernel[spec[0]]
      total += math.prod(equation.outvars[0].aval.shape) * depth
    elif name == "cond":
      total += max(_count(branch.jaxpr) for branch in params["branches"])
    else:
      # The number of rounds of a `while` is not known here: it counts as one.
      times = params.get("length", 1) if name == "scan" else 1
      if name == "shard_map":
        mesh = params["mesh"]
        axes = params.get("newly_manual_axes", params.get("manual_axes"))  # by release
        times = math.prod(mesh.shape[axis] for axis in axes)
      total += times * sum(_count(inner) for inner in _inner(params))
  return total


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
  found = []
  for value in params.values():
    for one in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(one, ClosedJaxpr):
        found.append(one.jaxpr)
      elif isinstance(one, Jaxpr):
        found.append(one)
  return found
