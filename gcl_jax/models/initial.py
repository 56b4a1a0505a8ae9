"""Random parameters as the originals draw them: a table of paths per kind of model.

All random numbers are one draw, cut up: JAX compiles a draw for a third of a second,
and the modules' own initialisers would make one for every array.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gcl_jax.fusion import FusionSettings
from gcl_jax.models.config import CLIPConfig, ResNetConfig
from gcl_jax.models.vista_config import EvaConfig, VistaConfig
from gcl_jax.sharding import first_match, map_with_path

_PRETRAINED_SIDE = 16  # patches a side of the pictures that EVA02's angles were set for
_THETA = 10_000.0

# Of a convolution before a ReLU, by the numbers that go into a sum (arXiv 1502.01852).
_CONVOLUTION = r"vision/(.*/)?(shortcut_)?conv\d?/kernel"


def _deviations(config: CLIPConfig | VistaConfig) -> list[tuple[str, Any]]:
  """(path pattern, standard deviation); for a block's arrays it may be one per layer."""
  if isinstance(config, VistaConfig):
    return _vista_deviations(config)
  rules, towers = [], [("vision", config.vision), ("text", config.text)]
  if isinstance(config.vision, ResNetConfig):
    towers.pop(0)
    rules = [
      (
        "vision/(position_embedding|pool)/.*(kernel|embedding)",
        config.vision.features**-0.5,
      )
    ]
  for name, tower in towers:
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
    ("image_projection/kernel", config.vision.features**-0.5),
    ("text_projection/kernel", config.text.width**-0.5),
  ]


def _vista_deviations(config: VistaConfig) -> list[tuple[str, Any]]:
  depth = np.arange(1, config.vision.layers + 1, dtype=np.float32)[:, None, None]
  return [
    # Deeper blocks add less, as EVA02 begins.
    ("vision/blocks/(attention/out|mlp/fc2)/kernel", 0.02 / np.sqrt(2 * depth)),
    ("image_projection/kernel", (3 * config.vision.width) ** -0.5),  # nn.Linear's
    ("(vision|text|fixed)/.*/(kernel|embedding)|vision/class_embedding", 0.02),
  ]


def rotary_tables(config: EvaConfig) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines of EVA02's rotary positions: (patches, head) float32 each.

  Half of a head turns with the row and half with the column, neighbours in pairs; the
  picture counts as 16 patches wide, whatever it is cut into.
  """
  half = config.width // config.heads // 2
  rates = _THETA ** -(np.arange(0, half, 2) / half)
  places = np.arange(config.grid) / config.grid * _PRETRAINED_SIDE
  angles = np.repeat(places[:, None] * rates, 2, axis=1)  # (grid, half)
  rows = np.broadcast_to(angles[:, None], (config.grid, *angles.shape))
  columns = np.broadcast_to(angles[None], rows.shape)
  both = np.concatenate([rows, columns], axis=-1).reshape(config.grid**2, -1)
  return np.cos(both).astype(np.float32), np.sin(both).astype(np.float32)


def _constants(
  config: CLIPConfig | VistaConfig, fusion: FusionSettings
) -> list[tuple[str, Any]]:
  """(path pattern, value)."""
  of_kind: list[tuple[str, Any]] = []
  if isinstance(config, VistaConfig):
    cos, sin = rotary_tables(config.vision)
    of_kind = [("fixed/rotary_cos", cos), ("fixed/rotary_sin", sin)]
    of_kind += [("fixed/vision_logit_scale", math.log(1 / 0.07))]
  return [
    *of_kind,
    (".*/(bias|mean)", 0.0),
    # A ResNet's blocks begin as the identity, for their statistics are not of any data.
    (r"vision/stage\d_block\d+/norm3/scale", 0.0),
    (".*/var", 1.0),
    (".*/scale", 1.0),
    ("logit_scale", config.logit_scale_init),
    ("fusion/image_weight", fusion.image_weight),
    ("fusion/text_weight", fusion.text_weight),
  ]


def initial_params(
  config: CLIPConfig | VistaConfig, fusion: FusionSettings, shapes: Any, key: Array
) -> Any:
  """Float32 arrays in the place of `shapes`, a pure function of the key.

  Raises:
    ValueError: a path that no row of the tables covers.
  """
  deviations, constants = _deviations(config), _constants(config, fusion)
  drawn = {}  # how many numbers each random array needs

  def deviation(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
    if re.fullmatch(_CONVOLUTION, path):
      return math.sqrt(2 / math.prod(leaf.shape[:-1]))
    return first_match(deviations, path, None)

  def count(path: str, leaf: jax.ShapeDtypeStruct) -> None:
    if deviation(path, leaf) is not None:
      drawn[path] = math.prod(leaf.shape)

  map_with_path(count, shapes)
  numbers = jax.random.normal(key, (sum(drawn.values()),))
  ends = dict(zip(drawn, itertools.accumulate(drawn.values()), strict=True))

  def cut(path: str, leaf: jax.ShapeDtypeStruct) -> Array:
    if path in drawn:
      part = numbers[ends[path] - drawn[path] : ends[path]]
      return deviation(path, leaf) * part.reshape(leaf.shape)
    value = first_match(constants, path, None)
    if value is None:
      raise ValueError(f"no rule gives the parameter {path} a first value")
    return jnp.broadcast_to(jnp.asarray(value, jnp.float32), leaf.shape)

  return map_with_path(cut, shapes)
