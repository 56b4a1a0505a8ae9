"""Multiply-adds of a program, counted in what JAX traces: exact, and for any device.

The compilers' own figures count the body of a loop once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from gcl_jax.models import Model

# A training step: the forward, and twice as much backward.
TRAINING = 3


def pair_flops(model: Model, text_length: int) -> int:
  """Operations of one pair's forward through both towers; what MFU is a share of.

  Args:
    model: of `models.build`.
    text_length: tokens of a text.
  """
  size = model.config.vision.image_size
  pixels = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
  tokens = jax.ShapeDtypeStruct((1, text_length), "int32")

  def forward(params, pixels, tokens):
    return model.bind(params).embed_pair(pixels, tokens)

  return 2 * multiply_adds(forward, model.abstract(), pixels, tokens)


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
