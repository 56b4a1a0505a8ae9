"""The batch as the losses see it: checked, float32, absent entries zeroed.

Everything here is O(N · D). The engines (`streaming.py`, `dense.py`) do what is quadratic in N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, Mesh, PartitionSpec
from jax.typing import ArrayLike

from gcl_jax.fusion import Mix

FORMS = ("auto", "dense", "streaming", "ring")
KERNELS = ("xla", "pallas")
KERNEL_DEPTH = 16  # the kernels take D that is a multiple of it

BANKS = ("image", "text", "fused")


class Pairs(NamedTuple):
  """Rows of the batch. Every array's leading axis is the pair; absent rows are zero.

  image, text: (n, D). fused: (n, D), `Mix` of (n,) float32, or None where the loss has
  no third modality. Banks are all float32 or all bfloat16. has_image, has_text: (n,)
  bool. ids: (n, K) integers. features: what has no gradient: (n, F)
  float32 unit rows of texts, a teacher's banks, or None.
  """

  image: Array
  text: Array
  fused: Array | Mix | None
  has_image: Array
  has_text: Array
  ids: Array
  features: Any = None

  @property
  def banks(self) -> tuple[Array, ...]:
    """The unit embeddings (n, D) of every modality: image, text and fused if any."""
    rows = self.written_out()
    return (rows.image, rows.text, rows.fused)[: len(self.there)]

  def in_float32(self) -> Pairs:
    """The same with float32 banks."""
    banks = (self.image, self.text, self.fused)
    return self._replace(**dict(zip(BANKS, _float32(banks), strict=True)))

  def written_out(self) -> Pairs:
    """The same in float32, with a fused bank in the place of a Mix."""
    rows = self.in_float32()
    if not isinstance(rows.fused, Mix):
      return rows
    alpha, beta = (weight[:, None] for weight in rows.fused)
    return rows._replace(fused=alpha * rows.image + beta * rows.text)

  @property
  def same_pair(self) -> Array:
    """e_a · e_b of each pair, (M, M, n); of a Mix without its bank."""
    if isinstance(self.fused, Mix):
      (alpha, beta), (image, text, _) = self.fused, self.in_float32()[:3]
      ii, it, tt = _dot(image, image), _dot(image, text), _dot(text, text)
      image_fused, text_fused = alpha * ii + beta * it, alpha * it + beta * tt
      fused = alpha * image_fused + beta * text_fused
      table = (
        (ii, it, image_fused),
        (it, tt, text_fused),
        (image_fused, text_fused, fused),
      )
    else:
      table = [[_dot(x, y) for y in self.banks] for x in self.banks]
    return jnp.stack([jnp.stack(row) for row in table])

  @property
  def there(self) -> tuple[Array, ...]:
    """Which entries of `banks` exist, (n,) bool each."""
    single = (self.has_image, self.has_text)
    return single if self.fused is None else (*single, self.has_image & self.has_text)


class Summing(NamedTuple):
  """What a loss needs of the other devices: their rows, and the sum over them."""

  gather: Callable[[Any], Any]  # (n, ...) leaves -> (N, ...)
  total: Callable[[Array], Array]


def make_pairs(
  image: Array,
  text: Array,
  fused: Array | Mix | None = None,
  *,
  pair_ids: Array | None,
  has_image: Array | None,
  has_text: Array | None,
  text_features: Array | None = None,
) -> Pairs:
  """Checks shapes and zeroes what is absent.

  Banks that are all bfloat16 stay so, half of the bytes to send; others are cast to
  float32.

  Absent entries are replaced before any product, because 0 · NaN is NaN in the value
  and in the gradient; the replacement's own gradient is exactly zero.

  Raises:
    ValueError: a shape or a type is not what the losses' docstrings say.
  """
  if image.ndim != 2:
    raise ValueError(f"image has shape {image.shape}, not (N, D)")
  _check("text", text, image.shape)
  rows = image.shape[:1]
  image_there = _presence("has_image", has_image, rows)
  text_there = _presence("has_text", has_text, rows)
  both = image_there & text_there
  banks = [bank.dtype for bank in (image, text, fused) if isinstance(bank, Array)]
  dtype = jnp.bfloat16 if set(banks) == {jnp.dtype("bfloat16")} else jnp.float32
  if isinstance(fused, Mix):
    for name, weight in zip(Mix._fields, fused, strict=True):
      _check(f"fused.{name}", weight, rows)
    fused = Mix(*(_zero_absent(weight, both) for weight in fused))
  elif fused is not None:
    _check("fused", fused, image.shape)
    fused = _zero_absent(fused, both, dtype)
  if text_features is not None:
    if text_features.ndim != 2 or text_features.shape[:1] != rows:
      raise ValueError(f"text_features has shape {text_features.shape}, not (N, F)")
    text_features = _unit(_zero_absent(text_features, text_there))
    text_features = jax.lax.stop_gradient(text_features)
  return Pairs(
    image=_zero_absent(image, image_there, dtype),
    text=_zero_absent(text, text_there, dtype),
    fused=fused,
    has_image=image_there,
    has_text=text_there,
    ids=_ids(pair_ids, rows),
    features=text_features,
  )


def scalar_scale(logit_scale: ArrayLike, name: str = "logit_scale") -> Array:
  """The scale as a float32 scalar; ValueError for any other shape."""
  scale = jnp.asarray(logit_scale, jnp.float32)
  if scale.shape:
    raise ValueError(f"{name} has shape {scale.shape}, not ()")
  return scale


def matmul_precision(pairs: Pairs) -> jax.lax.Precision:
  """How exactly an accelerator must multiply these banks.

  Products of bfloat16 with float32 sums are what it does anyway. Of float32 banks it
  would round the entries, and 1e-3 of a similarity is 0.1 of a logit at scale 100.
  """
  exact = pairs.image.dtype == jnp.bfloat16
  return jax.lax.Precision.DEFAULT if exact else jax.lax.Precision.HIGHEST


def check_form(form: str, block_size: int | None, kernel: str = "xla") -> None:
  """Raises ValueError for a form or a kernel that is not available."""
  if form not in FORMS:
    raise ValueError(f"form={form!r} is not available: choose from {', '.join(FORMS)}")
  if block_size is not None and block_size < 1:
    raise ValueError(f"block_size={block_size}: give a positive number of rows or None")
  if kernel not in KERNELS or (kernel != "xla" and form == "dense"):
    raise ValueError(
      f"kernel={kernel!r} with form={form!r} is not available: choose from "
      f"{', '.join(KERNELS)}; the dense form has no tiles and takes xla alone"
    )


def over_batch(
  local: Callable[[Pairs, Any, Summing], Any],
  pairs: Pairs,
  shared: Any,
  *,
  mesh: Mesh | None,
  batch_axes: Sequence[str],
) -> Any:
  """Calls `local` on each device's rows; its results must be sums over the batch.

  Without a mesh: one call on all rows. With one: `jax.shard_map` over `batch_axes`;
  `gather` is an all-gather (backward: reduce-scatter), `total` an all-reduce.

  Raises:
    ValueError: an axis is not of the mesh, or N is not divisible over the axes.
  """
  if mesh is None:
    return local(pairs, shared, Summing(lambda rows: rows, lambda value: value))
  axes = tuple(batch_axes)
  check_mesh(mesh, axes, pairs.ids.shape[0])
  summing = Summing(
    gather=lambda rows: jax.tree.map(
      lambda leaf: jax.lax.all_gather(leaf, axes, tiled=True), rows
    ),
    total=lambda value: jax.lax.psum(value, axes),
  )
  return jax.shard_map(
    lambda rows, same: local(rows, same, summing),
    mesh=mesh,
    in_specs=(PartitionSpec(axes), PartitionSpec()),
    out_specs=PartitionSpec(),
  )(pairs, shared)


def batch_parts(mesh: Mesh, axes: Sequence[str]) -> int:
  """Over how many devices these axes split the batch."""
  return math.prod(mesh.shape[axis] for axis in axes)


def check_mesh(mesh: Mesh | None, axes: Sequence[str], rows: int) -> None:
  """Raises ValueError for axes the mesh lacks, that are not Auto, or do not divide."""
  if mesh is None:
    return
  missing = [axis for axis in axes if axis not in mesh.shape]
  if missing or not axes:
    raise ValueError(f"batch_axes={axes}: the mesh has axes {tuple(mesh.shape)}")
  kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  if any(kinds[axis] != AxisType.Auto for axis in axes):
    raise ValueError(
      f"mesh axes {axes} are {[str(kinds[axis]) for axis in axes]}: make the mesh with "
      "axis_types=(jax.sharding.AxisType.Auto, ...)"
    )
  devices = batch_parts(mesh, axes)
  if rows % devices:
    raise ValueError(
      f"{rows} pairs are not divisible over {devices} devices "
      f"(mesh axes {axes}): pad with rows that have neither image nor text"
    )


def _check(name: str, array: Array, shape: tuple[int, ...]) -> None:
  if array.shape != shape:
    raise ValueError(f"{name} has shape {array.shape}, not {shape}")


def _presence(name: str, has: Array | None, rows: tuple[int]) -> Array:
  if has is None:
    return jnp.ones(rows, bool)
  _check(name, has, rows)
  return jnp.asarray(has, bool)


def _ids(pair_ids: Array | None, rows: tuple[int]) -> Array:
  if pair_ids is None:
    return jnp.arange(rows[0], dtype=jnp.int32)[:, None]
  pair_ids = jnp.asarray(pair_ids)
  if not jnp.issubdtype(pair_ids.dtype, jnp.integer):
    raise ValueError(f"pair_ids are {pair_ids.dtype}, not integers")
  if pair_ids.ndim not in (1, 2) or pair_ids.shape[:1] != rows or not pair_ids.size:
    raise ValueError(f"pair_ids has shape {pair_ids.shape}, not {rows} or (N, K)")
  return pair_ids.reshape(rows[0], -1)


def _zero_absent(rows: Array, there: Array, dtype=jnp.float32) -> Array:
  there = there.reshape(there.shape + (1,) * (rows.ndim - 1))
  return jnp.where(there, rows.astype(dtype), jnp.zeros((), dtype))


def _float32(tree: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _dot(x: Array, y: Array) -> Array:
  return jnp.sum(x * y, axis=-1)


def _unit(rows: Array) -> Array:
  # Zero rows stay zero: their cosine with anything is 0.
  norm = jnp.linalg.norm(rows, axis=-1, keepdims=True)
  return rows / jnp.maximum(norm, 1e-12)
