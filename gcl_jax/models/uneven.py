"""Towers whose layers differ in size: how they are kept, and cut when they run.

A pruned tower has its own number of heads and MLP channels in every layer, and a layer
may lack its attention or its MLP. Its parameters are stored as those of any tower, one
array for all layers, as large as the largest needs and zero beyond a layer's own size: so
sharding rules, optimizers, LoRA, checkpoints and averages see what they always see. When
the tower runs, each layer's arrays are cut to its size, layer after layer instead of in a
scan. What is cut off takes no part: results are those of the pruned layers, not of padded
ones under a mask, no product is larger than it must be, and the gradient there is exactly
zero. A file holds the cut arrays, so that reading and writing moves bits about and no
more. The price is a program that grows with depth.
"""

from __future__ import annotations

from typing import Any

import jax

from gcl_jax.models.config import CLIPConfig

# The axes of a layer's array, of those that have any, that its heads or its MLP size.
_BY_HEADS = {
  "query/kernel": 1,
  "key/kernel": 1,
  "value/kernel": 1,
  "query/bias": 0,
  "key/bias": 0,
  "value/bias": 0,
  "out/kernel": 0,
}
_BY_MLP = {"fc1/kernel": 1, "fc1/bias": 0, "fc2/kernel": 0}
_HALVES = {"norm1": 0, "attention": 0, "norm2": 1, "mlp": 1}


def sizes_of(tower: Any, layer: int) -> tuple[int | None, int | None]:
  """A layer's heads and MLP channels; None where it lacks that half."""
  return tower.layer_heads[layer], tower.layer_mlps[layer]


def layer_shape(
  config: CLIPConfig, path: str, layer: int, shape: tuple[int, ...]
) -> tuple[int, ...] | None:
  """What a layer has of an array; None where the layer lacks it.

  Args:
    config: the model's.
    path: the parameter's, `vision/blocks/...` or `text/blocks/...`.
    layer: which.
    shape: the array's, without the layers axis.
  """
  name, _, rest = path.partition("/blocks/")
  tower = getattr(config, name)
  return _kept(tower, rest, layer, shape) if tower.uneven else shape


def cut(tower: Any, layer: int, params: dict[str, Any]) -> dict[str, Any]:
  """A layer's parameters at its own size, without the halves that it lacks.

  Args:
    tower: its config.
    layer: which.
    params: the layer's, padded; a nested dict.
  """
  kept = {}
  for name, tree in params.items():
    if sizes_of(tower, layer)[_HALVES[name]] is None:
      continue

    def one(key_path, leaf: jax.Array, name: str = name) -> jax.Array:
      below = "/".join(str(key.key) for key in key_path)
      shape = _kept(tower, f"{name}/{below}", layer, leaf.shape)
      return leaf[tuple(slice(size) for size in shape)]

    kept[name] = jax.tree_util.tree_map_with_path(one, tree)
  return kept


def _kept(tower, path: str, layer: int, shape: tuple[int, ...]):
  half, _, rest = path.partition("/")
  size = sizes_of(tower, layer)[_HALVES[half]]
  if size is None:
    return None
  axis, size = (
    (_BY_HEADS.get(rest), size * tower.head)
    if half == "attention"
    else (_BY_MLP.get(rest), size)
  )
  if half.startswith("norm") or axis is None:
    return shape
  return (*shape[:axis], size, *shape[axis + 1 :])
