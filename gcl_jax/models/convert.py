"""Between our parameter tree and Hugging Face's keys: one table, read both ways.

A row is (our path, Hugging Face's key, transform). `{i}` in a key is the layer: our
array stacks what they keep per layer. A transform is a pair of NumPy functions that
only move numbers about, so that a round trip is bit-identical.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.models.clip import build
from gcl_jax.models.config import CLIPConfig

_LISTED = 8  # keys that an error names before it counts
_FLOATS = ("float16", "bfloat16", "float32", "float64")


class Transform(NamedTuple):
  """Theirs to ours, and back."""

  ours: Callable[[np.ndarray, CLIPConfig], np.ndarray]
  theirs: Callable[[np.ndarray, CLIPConfig], np.ndarray]


def _patch_ours(kernel: np.ndarray, config: CLIPConfig) -> np.ndarray:
  # (width, 3, P, P), a convolution -> (P·P·3, width), a product with flat patches.
  del config
  return kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])


def _patch_theirs(kernel: np.ndarray, config: CLIPConfig) -> np.ndarray:
  patch = config.vision.patch
  return kernel.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)


SAME = Transform(lambda x, _: x, lambda x, _: x)
TRANSPOSED = Transform(lambda x, _: x.T, lambda x, _: x.T)
PATCHES = Transform(_patch_ours, _patch_theirs)


def _linear(ours: str, theirs: str) -> tuple[tuple[str, str, Transform], ...]:
  return (
    (f"{ours}/kernel", f"{theirs}.weight", TRANSPOSED),
    (f"{ours}/bias", f"{theirs}.bias", SAME),
  )


def _norm(ours: str, theirs: str) -> tuple[tuple[str, str, Transform], ...]:
  return (
    (f"{ours}/scale", f"{theirs}.weight", SAME),
    (f"{ours}/bias", f"{theirs}.bias", SAME),
  )


def _blocks(tower: str) -> tuple[tuple[str, str, Transform], ...]:
  ours, theirs = f"{tower}/blocks", f"{tower}_model.encoder.layers.{{i}}"
  return (
    *_linear(f"{ours}/attention/query", f"{theirs}.self_attn.q_proj"),
    *_linear(f"{ours}/attention/key", f"{theirs}.self_attn.k_proj"),
    *_linear(f"{ours}/attention/value", f"{theirs}.self_attn.v_proj"),
    *_linear(f"{ours}/attention/out", f"{theirs}.self_attn.out_proj"),
    *_norm(f"{ours}/norm1", f"{theirs}.layer_norm1"),
    *_norm(f"{ours}/norm2", f"{theirs}.layer_norm2"),
    *_linear(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1"),
    *_linear(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2"),
  )


_IMAGE, _TEXT = "vision_model.embeddings", "text_model.embeddings"
TABLE: tuple[tuple[str, str, Transform], ...] = (
  ("logit_scale", "logit_scale", SAME),
  ("image_projection/kernel", "visual_projection.weight", TRANSPOSED),
  ("text_projection/kernel", "text_projection.weight", TRANSPOSED),
  ("vision/class_embedding", f"{_IMAGE}.class_embedding", SAME),
  ("vision/patch_embedding/kernel", f"{_IMAGE}.patch_embedding.weight", PATCHES),
  (
    "vision/position_embedding/embedding",
    f"{_IMAGE}.position_embedding.weight",
    SAME,
  ),
  *_norm("vision/pre_norm", "vision_model.pre_layrnorm"),  # their spelling
  *_norm("vision/post_norm", "vision_model.post_layernorm"),
  *_blocks("vision"),
  ("text/token_embedding/embedding", f"{_TEXT}.token_embedding.weight", SAME),
  ("text/position_embedding/embedding", f"{_TEXT}.position_embedding.weight", SAME),
  *_norm("text/final_norm", "text_model.final_layer_norm"),
  *_blocks("text"),
)

# Buffers of files written before transformers stopped saving them.
_IGNORED = re.compile(r"(text|vision)_model\.embeddings\.position_ids")


class Row(NamedTuple):
  """A row of the table in a model of one shape."""

  path: str
  shape: tuple[int, ...]  # ours, with the layers axis where there is one
  keys: list[str]  # theirs, one per layer where there are layers
  transform: Transform
  stacked: bool


def _rows(config: CLIPConfig) -> Iterator[Row]:
  shapes = build(config).abstract()
  for path, pattern, transform in TABLE:
    shape, stacked = _leaf(shapes, path).shape, "{i}" in pattern
    layers = range(shape[0] if stacked else 1)
    keys = [pattern.format(i=i) for i in layers]
    yield Row(path, shape, keys, transform, stacked)


def hf_shapes(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
  """Every key of a `CLIPModel` of this shape, and its array's shape."""
  shapes = {}
  for row in _rows(config):
    # An array without memory, to see what the transform makes of its shape.
    empty = np.broadcast_to(np.float32(0), row.shape[row.stacked :])
    theirs = row.transform.theirs(empty, config).shape
    shapes.update(dict.fromkeys(row.keys, theirs))
  return shapes


def from_hf(
  tensors: Mapping[str, np.ndarray], config: CLIPConfig, where: str
) -> dict[str, Any]:
  """Hugging Face's tensors -> our parameters, NumPy float32.

  Args:
    tensors: by key; each is asked for once, so it may be read from a file then. Any
      float type; `position_ids` are ignored.
    config: the shape that they must have.
    where: names the file or folder in errors.

  Raises:
    UserError: keys are missing or left over, or shapes differ; names them.
  """
  wanted = hf_shapes(config)
  missing = [key for key in wanted if key not in tensors]
  extra = [k for k in tensors if k not in wanted and not _IGNORED.fullmatch(k)]
  wrong, params = [], {}
  for row in _rows(config):
    array = np.empty(row.shape, np.float32)
    slots = array if row.stacked else array[None]
    for index, key in enumerate(row.keys):
      if key in missing:
        continue
      tensor = tensors[key]
      # Some tools write scalars as one number in a list.
      tensor = tensor.reshape(()) if tensor.size == 1 and not wanted[key] else tensor
      if tensor.shape != wanted[key]:
        wrong.append(f"{key} {tensor.shape}, not {wanted[key]}")
      elif tensor.dtype.name not in _FLOATS:
        wrong.append(f"{key} holds {tensor.dtype.name}, not floats")
      else:
        slots[index] = row.transform.ours(tensor, config)
    _put(params, row.path, array)
  problems = [
    f"{len(keys)} {what}: {', '.join(keys[:_LISTED])}"
    + (", ..." if len(keys) > _LISTED else "")
    for what, keys in (
      ("missing", missing),
      ("left over", sorted(extra)),
      ("other than config.json says", wrong),
    )
    if keys
  ]
  if problems:
    raise UserError(
      f"{where} does not hold the CLIP that its config.json describes: "
      f"{'; '.join(problems)}. Take config.json and weights from the same model."
    )
  return params


def to_hf(params: Mapping[str, Any], config: CLIPConfig) -> dict[str, np.ndarray]:
  """Our parameters -> Hugging Face's tensors: contiguous float32, `logit_scale` ().

  `fusion` is not theirs and stays out.

  Raises:
    ValueError: the parameters are not of this config.
  """
  tensors = {}
  for row in _rows(config):
    array = np.asarray(_leaf(params, row.path), np.float32)
    if array.shape != row.shape:
      raise ValueError(f"{row.path} is {array.shape}; the config says {row.shape}")
    for key, layer in zip(row.keys, array if row.stacked else array[None], strict=True):
      theirs = row.transform.theirs(layer, config)
      # safetensors writes the memory as it lies, and ascontiguousarray makes () (1,).
      tensors[key] = np.ascontiguousarray(theirs).reshape(theirs.shape)
  return tensors


def _leaf(tree: Any, path: str) -> Any:
  for name in path.split("/"):
    tree = tree[name]
  return tree


def _put(tree: dict[str, Any], path: str, array: np.ndarray) -> None:
  *parents, last = path.split("/")
  for name in parents:
    tree = tree.setdefault(name, {})
  tree[last] = array
