"""Between our parameter tree and a file's keys: one table per layout, read both ways.

A row is (our path, their key, transform). `{i}` in a key is the layer: our array stacks
what they keep per layer, padded where layers differ in size (`uneven.py`). Rows that name
the same key share its tensor, one part after the other along its first axis. A transform
is a pair of NumPy functions that only move numbers about, so that a round trip is
bit-identical. The table here is Hugging Face's; OpenCLIP's is in `native.py`, VISTA's in
`vista_table.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.models.config import CLIPConfig
from gcl_jax.models.model import Config, build
from gcl_jax.models.uneven import layer_shape

_LISTED = 8  # keys that an error names before it counts
_FLOATS = ("float16", "bfloat16", "float32", "float64")


class Transform(NamedTuple):
  """Theirs to ours, and back."""

  ours: Callable[[np.ndarray, Any], np.ndarray]
  theirs: Callable[[np.ndarray, Any], np.ndarray]


def _patch_ours(kernel: np.ndarray, config: Config) -> np.ndarray:
  # (width, 3, P, P), a convolution -> (P·P·3, width), a product with flat patches.
  del config
  return kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])


def _patch_theirs(kernel: np.ndarray, config: Config) -> np.ndarray:
  patch = config.vision.patch
  return kernel.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)


class Row(NamedTuple):
  """Where a parameter of ours lies in a file."""

  path: str
  key: str
  transform: Transform


class Layout(NamedTuple):
  """A kind of file: its table, and what errors say about it.

  Attributes:
    table: the rows.
    ignored: keys that may be left over.
    described_by: what says which keys there must be.
    mend: what to do where they are not there.
    kind: of model.
  """

  table: tuple[Row, ...]
  ignored: re.Pattern
  described_by: str
  mend: str
  kind: str = "CLIP"


SAME = Transform(lambda x, _: x, lambda x, _: x)
TRANSPOSED = Transform(lambda x, _: x.T, lambda x, _: x.T)
PATCHES = Transform(_patch_ours, _patch_theirs)


def linear(ours: str, theirs: str) -> tuple[Row, ...]:
  """The rows of a layer with a bias."""
  return (
    Row(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSED),
    Row(f"{ours}/bias", f"{theirs}.bias", SAME),
  )


def norm(ours: str, theirs: str) -> tuple[Row, ...]:
  """The rows of a layer norm."""
  return (
    Row(f"{ours}/scale", f"{theirs}.weight", SAME),
    Row(f"{ours}/bias", f"{theirs}.bias", SAME),
  )


def _blocks(tower: str) -> tuple[Row, ...]:
  ours, theirs = f"{tower}/blocks", f"{tower}_model.encoder.layers.{{i}}"
  return (
    *linear(f"{ours}/attention/query", f"{theirs}.self_attn.q_proj"),
    *linear(f"{ours}/attention/key", f"{theirs}.self_attn.k_proj"),
    *linear(f"{ours}/attention/value", f"{theirs}.self_attn.v_proj"),
    *linear(f"{ours}/attention/out", f"{theirs}.self_attn.out_proj"),
    *norm(f"{ours}/norm1", f"{theirs}.layer_norm1"),
    *norm(f"{ours}/norm2", f"{theirs}.layer_norm2"),
    *linear(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1"),
    *linear(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2"),
  )


_IMAGE, _TEXT = "vision_model.embeddings", "text_model.embeddings"
TABLE: tuple[Row, ...] = (
  Row("logit_scale", "logit_scale", SAME),
  Row("image_projection/kernel", "visual_projection.weight", TRANSPOSED),
  Row("text_projection/kernel", "text_projection.weight", TRANSPOSED),
  Row("vision/class_embedding", f"{_IMAGE}.class_embedding", SAME),
  Row("vision/patch_embedding/kernel", f"{_IMAGE}.patch_embedding.weight", PATCHES),
  Row(
    "vision/position_embedding/embedding",
    f"{_IMAGE}.position_embedding.weight",
    SAME,
  ),
  *norm("vision/pre_norm", "vision_model.pre_layrnorm"),  # their spelling
  *norm("vision/post_norm", "vision_model.post_layernorm"),
  *_blocks("vision"),
  Row("text/token_embedding/embedding", f"{_TEXT}.token_embedding.weight", SAME),
  Row("text/position_embedding/embedding", f"{_TEXT}.position_embedding.weight", SAME),
  *norm("text/final_norm", "text_model.final_layer_norm"),
  *_blocks("text"),
)

# Buffers of files written before transformers stopped saving them.
_IGNORED = re.compile(r"(text|vision)_model\.embeddings\.position_ids")
HUGGING_FACE = Layout(
  TABLE,
  _IGNORED,
  "its config.json",
  "Take config.json and weights from the same model.",
)


class Piece(NamedTuple):
  """What one row, in one layer, has of a tensor."""

  path: str
  layer: int | None  # of a stacked array
  shape: tuple[int, ...]  # ours, without the layers axis and without padding
  transform: Transform

  def theirs(self, config: Config) -> tuple[int, ...]:
    """Its shape in the file."""
    # An array without memory, to see what the transform makes of its shape.
    return self.transform.theirs(
      np.broadcast_to(np.float32(0), self.shape), config
    ).shape

  def within(self, array: np.ndarray) -> np.ndarray:
    """Its part of our array, a view."""
    array = array if self.layer is None else array[self.layer]
    return array[(*(slice(size) for size in self.shape), ...)]


def pieces(config: Config, table: Iterable[Row]) -> dict[str, list[Piece]]:
  """Every key of a model of this shape, and of what its tensor is made."""
  shapes, found = build(config).abstract(), {}
  for path, pattern, transform in table:
    shape = _leaf(shapes, path).shape
    if "{i}" not in pattern:
      found.setdefault(pattern, []).append(Piece(path, None, shape, transform))
      continue
    for i in range(shape[0]):
      kept = layer_shape(config, path, i, shape[1:])
      if kept is not None:
        piece = Piece(path, i, kept, transform)
        found.setdefault(pattern.format(i=i), []).append(piece)
  return found


def key_shapes(config: Config, table: Iterable[Row]) -> dict[str, tuple[int, ...]]:
  """Every key of a model of this shape, and its tensor's shape."""
  return {
    key: _joined([piece.theirs(config) for piece in parts])
    for key, parts in pieces(config, table).items()
  }


def _joined(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
  if len(shapes) == 1:
    return shapes[0]
  return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def from_tensors(
  tensors: Mapping[str, np.ndarray],
  config: Config,
  where: str,
  layout: Layout,
) -> dict[str, Any]:
  """A file's tensors -> our parameters, NumPy float32.

  Args:
    tensors: by key; each is asked for once, so it may be read from a file then. Any
      float type.
    config: the shape that they must have.
    where: names the file or folder in errors.
    layout: the file's.

  Raises:
    UserError: keys are missing or left over, or shapes differ; names them.
  """
  wanted = pieces(config, layout.table)
  missing = [key for key in wanted if key not in tensors]
  extra = [k for k in tensors if k not in wanted and not layout.ignored.fullmatch(k)]
  wrong, params = [], {}
  for path, leaf in _leaves(build(config).abstract(), layout.table):
    _put(params, path, np.zeros(leaf.shape, np.float32))
  for key, parts in wanted.items():
    if key in missing:
      continue
    tensor, shapes = tensors[key], [piece.theirs(config) for piece in parts]
    # Some tools write scalars as one number in a list.
    tensor = tensor.reshape(()) if tensor.size == 1 and shapes == [()] else tensor
    if tensor.shape != _joined(shapes):
      wrong.append(f"{key} {tensor.shape}, not {_joined(shapes)}")
    elif tensor.dtype.name not in _FLOATS:
      wrong.append(f"{key} holds {tensor.dtype.name}, not floats")
    else:
      start = 0
      for piece, shape in zip(parts, shapes, strict=True):
        part = tensor
        if len(parts) > 1:
          part, start = tensor[start : start + shape[0]], start + shape[0]
        piece.within(_leaf(params, piece.path))[...] = piece.transform.ours(
          part, config
        )
  problems = [
    f"{len(keys)} {what}: {', '.join(keys[:_LISTED])}"
    + (", ..." if len(keys) > _LISTED else "")
    for what, keys in (
      ("missing", missing),
      ("left over", sorted(extra)),
      (f"other than {layout.described_by.removeprefix('its ')} says", wrong),
    )
    if keys
  ]
  if problems:
    raise UserError(
      f"{where} does not hold the {layout.kind} that {layout.described_by} describes: "
      f"{'; '.join(problems)}. {layout.mend}"
    )
  return params


def to_tensors(
  params: Mapping[str, Any], config: Config, table: Iterable[Row]
) -> dict[str, np.ndarray]:
  """Our parameters -> a file's tensors: contiguous float32, `logit_scale` ().

  `fusion` is not theirs and stays out.

  Raises:
    ValueError: the parameters are not of this config.
  """
  arrays = {}
  for path, leaf in _leaves(build(config).abstract(), table):
    arrays[path] = np.asarray(_leaf(params, path), np.float32)
    if arrays[path].shape != leaf.shape:
      raise ValueError(f"{path} is {arrays[path].shape}; the config says {leaf.shape}")
  tensors = {}
  for key, parts in pieces(config, table).items():
    theirs = [
      piece.transform.theirs(piece.within(arrays[piece.path]), config)
      for piece in parts
    ]
    whole = theirs[0] if len(theirs) == 1 else np.concatenate(theirs)
    # safetensors writes the memory as it lies, and ascontiguousarray makes () (1,).
    tensors[key] = np.ascontiguousarray(whole).reshape(whole.shape)
  return tensors


def hf_shapes(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
  """`key_shapes` of a `CLIPModel`."""
  return key_shapes(config, TABLE)


def from_hf(
  tensors: Mapping[str, np.ndarray], config: Config, where: str
) -> dict[str, Any]:
  """`from_tensors` of a `CLIPModel`; `position_ids` are ignored."""
  return from_tensors(tensors, config, where, HUGGING_FACE)


def to_hf(params: Mapping[str, Any], config: Config) -> dict[str, np.ndarray]:
  """`to_tensors` of a `CLIPModel`."""
  return to_tensors(params, config, TABLE)


def _leaves(shapes: Any, table: Iterable[Row]) -> list[tuple[str, Any]]:
  return [(row.path, _leaf(shapes, row.path)) for row in table]


def _leaf(tree: Any, path: str) -> Any:
  for name in path.split("/"):
    tree = tree[name]
  return tree


def _put(tree: dict[str, Any], path: str, array: np.ndarray) -> None:
  *parents, last = path.split("/")
  for name in parents:
    tree = tree.setdefault(name, {})
  tree[last] = array
