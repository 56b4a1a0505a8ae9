"""The device mesh, and first-match rules from parameter paths to shardings.

The only file that names mesh axes. Three of them: `data` and `fsdp` split the batch,
`fsdp` and `tensor` may split parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gcl_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Every parameter on every device. Rows are (path pattern, PartitionSpec).
REPLICATED_PARAMETERS: tuple[tuple[str, P], ...] = ((r".*", P()),)

T = TypeVar("T")


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh of axes (`data`, `fsdp`, `tensor`); one of the sizes may be -1: the rest.

  Args:
    data, fsdp, tensor: devices along each axis.
    devices: by default all devices of all processes.

  Raises:
    UserError: the sizes do not use every device exactly once.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  wrong = {k: v for k, v in sizes.items() if v == 0 or v < -1}
  open_axes = [name for name, size in sizes.items() if size == -1]
  if wrong or len(open_axes) > 1:
    raise UserError(
      f"config.mesh is {sizes}: each size is a number of devices, and at most one is "
      "-1 (the rest)."
    )
  fixed = int(np.prod([size for size in sizes.values() if size != -1]))
  if open_axes and len(devices) % fixed == 0:
    sizes[open_axes[0]] = len(devices) // fixed
  if int(np.prod(list(sizes.values()))) != len(devices):
    raise UserError(
      f"config.mesh is {sizes}, which does not use the {len(devices)} devices here "
      "exactly once: mend config.mesh.data, .fsdp or .tensor (-1 means the rest)."
    )
  shape = tuple(sizes[name] for name in AXES)
  # Auto axes: the compiler partitions the towers; JAX's default became Explicit.
  return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows split over `data` and `fsdp`, in that order."""
  return NamedSharding(mesh, P(BATCH_AXES))


def batch_devices(mesh: Mesh) -> int:
  """How many parts a batch is split into."""
  return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same array on every device."""
  return NamedSharding(mesh, P())


def path_of(key_path: Sequence[Any]) -> str:
  """A tree path as text: `vision/blocks/attention/query/kernel`."""
  return jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")


def map_with_path(function, tree: Any) -> Any:
  """`jax.tree.map` whose function takes (path text, leaf)."""
  return jax.tree_util.tree_map_with_path(
    lambda key_path, leaf: function(path_of(key_path), leaf), tree
  )


def first_match(rules: Sequence[tuple[str, T]], path: str, default: T) -> T:
  """The value of the first rule whose pattern matches the whole path."""
  for pattern, value in rules:
    if re.fullmatch(pattern, path):
      return value
  return default


def unused_patterns(rules: Sequence[tuple[str, Any]], tree: Any) -> list[str]:
  """The patterns that match no path of the tree: most often a slip of the pen."""
  paths = [path_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
  return [r for r, _ in rules if not any(re.fullmatch(r, path) for path in paths)]


def shardings(mesh: Mesh, tree: Any, rules: Sequence[tuple[str, P]]) -> Any:
  """A NamedSharding for every leaf, by the first rule that matches its path.

  Raises:
    ValueError: no rule covers a path, or an axis does not divide its dimension (JAX
      itself would replicate such an array without a word).
  """

  def one(path: str, leaf: Any) -> NamedSharding:
    spec = first_match(rules, path, None)
    if spec is None:
      raise ValueError(f"no sharding rule covers the parameter {path}")
    for size, axes in zip(leaf.shape, spec, strict=False):
      names = axes if isinstance(axes, tuple) else (axes,)
      parts = int(np.prod([mesh.shape[a] for a in names if a is not None]))
      if size % parts:
        raise ValueError(f"{path}: {size} is not divisible over mesh axes {names}")
    return NamedSharding(mesh, spec)

  return map_with_path(one, tree)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """This process's rows of a batch -> global arrays split over the batch axes."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, rows)
    for name, rows in batch.items()
  }
