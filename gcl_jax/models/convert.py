"""Weights between Hugging Face's names and ours: one table, read in both directions.

A row is (our path, their key, transform). `{i}` in a key is the layer: their one tensor
per layer is our one array with a leading axis of layers. Transforms only move elements,
so that a round trip is bit-identical, and every key of both sides is in the table, so
that whatever is missing or left over is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.models.config import CLIPConfig
from gcl_jax.sharding import path_of


class Row(NamedTuple):
  """One parameter, under both names."""

  path: str
  key: str
  transform: str


class _Transform(NamedTuple):
  to_ours: Callable[[np.ndarray], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
  return x


def _matrix(x: np.ndarray) -> np.ndarray:
  return x.T


_TRANSFORMS = {
  "same": _Transform(_same, _same),
  "matrix": _Transform(_matrix, _matrix),  # (out, in) <-> (in, out)
  "patches": _Transform(  # (W, 3, P, P) <-> (P, P, 3, W)
    lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
  ),
}

_BLOCK = (
  ("norm1", "layer_norm1", "norm"),
  ("norm2", "layer_norm2", "norm"),
  ("attention/query", "self_attn.q_proj", "linear"),
  ("attention/key", "self_attn.k_proj", "linear"),
  ("attention/value", "self_attn.v_proj", "linear"),
  ("attention/out", "self_attn.out_proj", "linear"),
  ("mlp/up", "mlp.fc1", "linear"),
  ("mlp/down", "mlp.fc2", "linear"),
)


def _affine(path: str, key: str, kind: str) -> list[Row]:
  ours, transform = ("scale", "same") if kind == "norm" else ("kernel", "matrix")
  return [
    Row(f"{path}/{ours}", f"{key}.weight", transform),
    Row(f"{path}/bias", f"{key}.bias", "same"),
  ]


def _blocks(tower: str) -> list[Row]:
  return [
    row
    for ours, theirs, kind in _BLOCK
    for row in _affine(
      f"{tower}/blocks/{ours}", f"{tower}_model.encoder.layers.{{i}}.{theirs}", kind
    )
  ]


TABLE: tuple[Row, ...] = (
  Row("logit_scale", "logit_scale", "same"),
  Row("image_projection/kernel", "visual_projection.weight", "matrix"),
  Row("text_projection/kernel", "text_projection.weight", "matrix"),
  Row("vision/class_embedding", "vision_model.embeddings.class_embedding", "same"),
  Row(
    "vision/patch_embedding/kernel",
    "vision_model.embeddings.patch_embedding.weight",
    "patches",
  ),
  Row(
    "vision/position_embedding/embedding",
    "vision_model.embeddings.position_embedding.weight",
    "same",
  ),
  *_affine("vision/pre_norm", "vision_model.pre_layrnorm", "norm"),  # their spelling
  *_blocks("vision"),
  *_affine("vision/post_norm", "vision_model.post_layernorm", "norm"),
  Row(
    "text/token_embedding/embedding",
    "text_model.embeddings.token_embedding.weight",
    "same",
  ),
  Row(
    "text/position_embedding/embedding",
    "text_model.embeddings.position_embedding.weight",
    "same",
  ),
  *_blocks("text"),
  *_affine("text/final_norm", "text_model.final_layer_norm", "norm"),
)

# Buffers of old files, no weights: 0, 1, 2, ...
IGNORED_KEYS = frozenset(
  f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")
)


def _keys(row: Row, config: CLIPConfig) -> list[str]:
  if "{i}" not in row.key:
    return [row.key]
  tower = config.vision if row.path.startswith("vision/") else config.text
  return [row.key.format(i=i) for i in range(tower.layers)]


def to_ours(
  tensors: Mapping[str, np.ndarray], config: CLIPConfig, shapes: Any, where: str
) -> dict[str, Any]:
  """Hugging Face's tensors -> our nested dict of float32 arrays.

  Args:
    tensors: by their keys, of any float type.
    config: the model's shape.
    shapes: our nested dict of `jax.ShapeDtypeStruct`, without `fusion`.
    where: the file or folder, for messages.

  Raises:
    UserError: names every key that is missing, left over or of another shape.
  """
  wanted = {
    path_of(path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
  }
  used = {key for row in TABLE for key in _keys(row, config)}
  missing = sorted(used - tensors.keys())
  left_over = sorted(tensors.keys() - used - IGNORED_KEYS)
  if missing or left_over:
    _refuse(where, {"missing": missing, "left over": left_over})
  params: dict[str, Any] = {}
  misshapen = []
  for row in TABLE:
    forward = _TRANSFORMS[row.transform].to_ours
    stacked = "{i}" in row.key
    rows = [_float32(tensors[key]) for key in _keys(row, config)]
    expected = wanted[row.path][1:] if stacked else wanted[row.path]
    for key, tensor in zip(_keys(row, config), rows, strict=True):
      turned = forward(tensor).shape if tensor.ndim == len(expected) else tensor.shape
      if turned != expected:
        misshapen.append(f"{key} {tuple(tensor.shape)}")
    if not misshapen:
      turned = [forward(tensor) for tensor in rows]
      value = np.stack(turned) if stacked else np.ascontiguousarray(turned[0])
      _put(params, row.path, value.reshape(wanted[row.path]))
  if misshapen:
    _refuse(where, {"of another shape than config.json says": misshapen})
  return params


def to_theirs(params: Mapping[str, Any], config: CLIPConfig) -> dict[str, np.ndarray]:
  """Our parameters -> Hugging Face's tensors: contiguous float32 arrays by key."""
  tensors = {}
  for row in TABLE:
    value = np.asarray(_get(params, row.path), np.float32)
    back = _TRANSFORMS[row.transform].to_theirs
    keys = _keys(row, config)
    layers = value if "{i}" in row.key else [value]
    for key, layer in zip(keys, layers, strict=True):
      # safetensors writes the memory as it lies: a transposed view would be garbage.
      tensors[key] = np.array(back(layer), dtype=np.float32, order="C", copy=True)
  return tensors


def _float32(tensor: np.ndarray) -> np.ndarray:
  return np.asarray(tensor, dtype=np.float32)


def _put(tree: dict[str, Any], path: str, value: np.ndarray) -> None:
  *parents, last = path.split("/")
  for name in parents:
    tree = tree.setdefault(name, {})
  tree[last] = value


def _get(tree: Mapping[str, Any], path: str) -> Any:
  for name in path.split("/"):
    tree = tree[name]
  return tree


def _refuse(where: str, wrong: Mapping[str, list[str]]) -> None:
  parts = [
    f"{len(keys)} tensors {what}: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
    for what, keys in wrong.items()
    if keys
  ]
  raise UserError(
    f"{where} does not hold the CLIP that its config.json describes. "
    f"{'; '.join(parts)}. Use weights and config.json of the same CLIPModel."
  )
