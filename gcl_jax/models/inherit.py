"""A small CLIP's first weights, cut out of a larger one: TinyCLIP's manual inheritance.

Source: Wu et al., arXiv 2309.12314; https://github.com/microsoft/Cream, TinyCLIP.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.models.config import CLIPConfig, ResNetConfig, TextConfig, VisionConfig
from gcl_jax.models.model import build
from gcl_jax.sharding import map_with_path

_ALIKE = {
  "vision": ("patch", "image_size", "act", "eps"),
  "text": ("vocab_size", "context", "act", "eps"),
}
_AT_MOST = ("layers", "width", "heads", "mlp")


def inherited(params: Any, larger: CLIPConfig, smaller: CLIPConfig) -> dict[str, Any]:
  """Parameters of the smaller shape, each a part of the larger one's.

  Of the larger tower's L blocks, the j-th of the smaller one's l takes block j ⌊L / l⌋.
  Of every array it takes what comes first: first channels, first heads (whole ones),
  first columns of a projection. The scale is kept.

  Args:
    params: of the larger model; arrays, a nested dict. `fusion` is left out.
    larger, smaller: their shapes.

  Raises:
    UserError: the smaller is no part of the larger: it says of which field.
  """
  for tower, fields in _ALIKE.items():
    for shape in (getattr(larger, tower), getattr(smaller, tower)):
      if isinstance(shape, ResNetConfig) or not shape.plain:
        raise UserError(
          f"no weights to inherit: the {tower} tower of one of the two is a ResNet or was "
          "pruned, and only whole transformers are cut."
        )
    _check_tower(tower, getattr(larger, tower), getattr(smaller, tower), fields)
  _check("projection_dim", larger.projection_dim, smaller.projection_dim)

  def cut(path: str, leaf: Any) -> np.ndarray:
    array = params
    for name in path.split("/"):
      array = array[name]
    array = np.asarray(array)
    if "/blocks/" in path:
      count = leaf.shape[0]
      array = array[:: len(array) // count][:count]
    first = tuple(slice(size) for size in leaf.shape)
    return np.ascontiguousarray(array[first]).reshape(leaf.shape)

  return map_with_path(cut, build(smaller).abstract())


def _check_tower(
  tower: str,
  larger: VisionConfig | TextConfig,
  smaller: VisionConfig | TextConfig,
  alike: tuple[str, ...],
) -> None:
  for field in alike:
    theirs, ours = getattr(larger, field), getattr(smaller, field)
    if theirs != ours:
      raise UserError(
        f"no weights to inherit: {tower}.{field} is {ours} here and {theirs} in the "
        "larger model, and they must agree."
      )
  for field in _AT_MOST:
    _check(f"{tower}.{field}", getattr(larger, field), getattr(smaller, field))
  theirs, ours = larger.head, smaller.head
  if theirs != ours:
    raise UserError(
      f"no weights to inherit: a head of the {tower} tower has {ours} channels here and "
      f"{theirs} in the larger model, and heads are taken whole."
    )


def _check(name: str, larger: int, smaller: int) -> None:
  if smaller > larger:
    raise UserError(
      f"no weights to inherit: {name} is {smaller} here, more than the larger model's "
      f"{larger}."
    )
