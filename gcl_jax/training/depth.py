"""Layer-wise learning-rate decay: what lies nearer to the input learns slower.

Source: Clark et al., arXiv 2003.10555 (ELECTRA); for image towers arXiv 2106.08254.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.sharding import map_with_path

_TOWERS = ("vision", "text")
# What comes before the blocks. What comes after them (last norm, projection) is not
# slowed down, nor is what belongs to no tower.
_INPUT = r"(patch|token|position|type|class)_embedding(/.*)?|(pre|embedding)_norm/.*"


def depth_factors(decay: float, params: Any) -> Any:
  """A tree of learning-rate factors: `decay` to the power of the layers above.

  Of a tower of L blocks: block i (from 0) gets decay^(L - i), the embeddings and the
  norm before the blocks decay^(L + 1), all else 1. LoRA's factors are their block's.

  Args:
    decay: above 0, at most 1.
    params: arrays or shapes, a nested dict.

  Raises:
    UserError: a tower has no stacked blocks, as a ResNet.

  Returns:
    Floats; for the blocks float32 arrays (L, 1, ...) that broadcast to the parameter.
  """
  layers = {}

  def count(path: str, leaf: Any) -> None:
    tower, _, rest = path.partition("/")
    if tower in _TOWERS and rest.startswith("blocks/"):
      layers[tower] = leaf.shape[0]

  map_with_path(count, params)
  if flat := [tower for tower in _TOWERS if tower in params and tower not in layers]:
    raise UserError(
      f"config.optimizer.layer_decay is {decay}, but the {flat[0]} tower is a ResNet, which "
      "has no layers of one kind: set it to 1."
    )

  def factor(path: str, leaf: Any) -> float | np.ndarray:
    tower, _, rest = path.removeprefix("lora/").partition("/")
    if tower not in _TOWERS:
      return 1.0
    depth = layers[tower]
    if rest.startswith("blocks/"):
      above = np.arange(depth, 0, -1).reshape(-1, *[1] * (len(leaf.shape) - 1))
      return (decay**above).astype(np.float32)
    return decay ** (depth + 1) if re.fullmatch(_INPUT, rest) else 1.0

  return map_with_path(factor, params)
