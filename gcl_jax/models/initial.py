"""Random parameters as transformers' `CLIPModel` draws them: a table of paths.

All random numbers are one draw, cut up: JAX compiles a draw for a third of a second,
and the modules' own initialisers would make one for every array.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gcl_jax.fusion import FusionSettings
from gcl_jax.models.config import CLIPConfig
from gcl_jax.sharding import first_match, map_with_path


def _deviations(config: CLIPConfig) -> list[tuple[str, float]]:
  """(path pattern, standard deviation)."""
  rules = []
  for name, tower in (("vision", config.vision), ("text", config.text)):
    blocks, outer = f"{name}/blocks", tower.width**-0.5
    inner = outer * (2 * tower.layers) ** -0.5
    rules += [
      (f"{name}/(token|position)_embedding/embedding", 0.02),
      (f"{name}/patch_embedding/kernel", 0.02),
      (f"{name}/class_embedding", outer),
      (f"{blocks}/attention/(query|key|value)/kernel", inner),
      (f"{blocks}/attention/out/kernel", outer),
      (f"{blocks}/mlp/fc1/kernel", (2 * tower.width) ** -0.5),
      (f"{blocks}/mlp/fc2/kernel", inner),
    ]
  return [
    *rules,
    ("image_projection/kernel", config.vision.width**-0.5),
    ("text_projection/kernel", config.text.width**-0.5),
  ]


def _constants(config: CLIPConfig, fusion: FusionSettings) -> list[tuple[str, float]]:
  """(path pattern, value)."""
  return [
    (".*/bias", 0.0),
    (".*/scale", 1.0),
    ("logit_scale", config.logit_scale_init),
    ("fusion/image_weight", fusion.image_weight),
    ("fusion/text_weight", fusion.text_weight),
  ]


def initial_params(
  config: CLIPConfig, fusion: FusionSettings, shapes: Any, key: Array
) -> Any:
  """Float32 arrays in the place of `shapes`, a pure function of the key.

  Raises:
    ValueError: a path that no row of the tables covers.
  """
  deviations, constants = _deviations(config), _constants(config, fusion)
  drawn = {}  # how many numbers each random array needs

  def count(path: str, leaf: jax.ShapeDtypeStruct) -> None:
    if first_match(deviations, path, None) is not None:
      drawn[path] = math.prod(leaf.shape)

  map_with_path(count, shapes)
  numbers = jax.random.normal(key, (sum(drawn.values()),))
  ends = dict(zip(drawn, itertools.accumulate(drawn.values()), strict=True))

  def cut(path: str, leaf: jax.ShapeDtypeStruct) -> Array:
    if path in drawn:
      part = numbers[ends[path] - drawn[path] : ends[path]]
      return first_match(deviations, path, None) * part.reshape(leaf.shape)
    value = first_match(constants, path, None)
    if value is None:
      raise ValueError(f"no rule gives the parameter {path} a first value")
    return jnp.full(leaf.shape, value, jnp.float32)

  return map_with_path(cut, shapes)
