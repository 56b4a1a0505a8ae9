"""The device mesh, and first-match rules from parameter paths to shardings.

The only file that names mesh axes. Three of them: `data` and `fsdp` split the batch,
`fsdp` and `tensor` may split parameters.
"""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gcl_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Where every parameter of the towers lies: (path pattern, PartitionSpec), first match.
# A product's two matrices are split over `tensor` in the dimension between them, so that
# one sum over the devices closes a layer; what else is large is split over `fsdp` and
# gathered where it is used. The leading axis of a block's arrays is the layer.
PARAMETER_RULES: tuple[tuple[str, P], ...] = (
  (r".*/attention/(query|key|value)/kernel", P(None, "fsdp", "tensor")),
  (r".*/attention/(query|key|value)/bias", P(None, "tensor")),
  (r".*/attention/out/kernel", P(None, "tensor", "fsdp")),
  (r".*/mlp/(fc1|gate)/kernel", P(None, "fsdp", "tensor")),
  (r".*/mlp/(fc1|gate)/bias", P(None, "tensor")),
  (r".*/mlp/fc2/kernel", P(None, "tensor", "fsdp")),
  (r"text/token_embedding/embedding", P(None, "fsdp")),
  (r"vision/patch_embedding/kernel", P(None, "fsdp")),
  (r"(image|text)_projection/kernel", P("fsdp", None)),
  # A ResNet's convolutions are small beside its pool.
  (r"vision/pool/(query|key|value)/kernel", P("fsdp", None)),
  (r"vision/pool/(query|key|value)/bias|image_projection/bias", P()),
  (r"vision/(.*/)?(shortcut_)?conv\d?/kernel", P()),
  (r".*/(\w*norm\d?)/(scale|bias|mean|var)", P()),
  (r".*/(out|fc2|patch_embedding)/bias", P()),
  (r".*/(position|type)_embedding/embedding", P()),
  (r"vision/class_embedding|logit_scale|fusion/\w+", P()),
  (r"lora/.*/[ab]", P()),
  (r"fixed/.*", P()),
)

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
  # Neighbours in the mesh are neighbours in a TPU's torus; elsewhere the given order.
  arranged = mesh_utils.create_device_mesh(
    shape, devices, allow_split_physical_axes=True
  )
  # Auto axes: the compiler partitions the towers; JAX's default became Explicit.
  return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows split over `data` and `fsdp`, in that order."""
  return NamedSharding(mesh, P(BATCH_AXES))


def batch_devices(mesh: Mesh) -> int:
  """How many parts a batch is split into."""
  return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


class Share(NamedTuple):
  """Which parts of a batch a process reads, ascending, of how many equal ones."""

  held: tuple[int, ...] = (0,)
  parts: int = 1

  def rows(self, batch_size: int, cuts: int = 1) -> np.ndarray:
    """Places of this process's rows in a batch, or in each of its `cuts` pieces."""
    places = np.arange(batch_size).reshape(cuts, self.parts, -1)
    return places[:, list(self.held)].reshape(-1)


def batch_share(mesh: Mesh) -> Share:
  """What of a batch lies on this process's devices.

  Parts need not be neighbours: on a TPU the mesh follows the torus, and a host's chips
  are a square of it. Processes that hold the same part (`tensor` spans them) read it
  both.
  """
  parts = batch_devices(mesh)
  places = batch_sharding(mesh).devices_indices_map((parts,))
  here = jax.process_index()
  held = {rows.start or 0 for d, (rows,) in places.items() if d.process_index == here}
  return Share(tuple(sorted(held)), parts)


def spans_processes(mesh: Mesh) -> bool:
  """Whether devices of several processes share the mesh."""
  return len({device.process_index for device in mesh.devices.flat}) > 1


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
    ValueError: no rule covers a path.
    UserError: an axis does not divide its dimension (JAX itself would replicate such
      an array without a word).
  """

  def one(path: str, leaf: Any) -> NamedSharding:
    spec = first_match(rules, path, None)
    if spec is None:
      raise ValueError(f"no sharding rule covers the parameter {path}")
    for size, axes in zip(leaf.shape, spec, strict=False):
      names = axes if isinstance(axes, tuple) else (axes,)
      parts = int(np.prod([mesh.shape[a] for a in names if a is not None]))
      if size % parts:
        raise UserError(
          f"config.mesh.{names[0]} is {parts}, which does not divide the {size} of "
          f"{path} {leaf.shape}: take a number that does."
        )
    return NamedSharding(mesh, spec)

  return map_with_path(one, tree)


_used_on: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar(
  "mesh", default=None
)


@contextlib.contextmanager
def used_on(mesh: Mesh) -> Iterator[None]:
  """What is traced inside gathers parameters where it uses them, and keeps rows apart.

  Left to itself the compiler may as well keep a parameter split and send the rows of
  all devices round instead: then `fsdp` would save no memory and no time.
  """
  token = _used_on.set(mesh)
  try:
    yield
  finally:
    _used_on.reset(token)


def gathered(params: Any, path: str, layer: bool = False) -> Any:
  """Parameters whole but for `tensor`, as they are used; the same outside `used_on`.

  An all-gather over `fsdp` where they lie split over it; backward: a sum over the
  devices, of which each keeps its part.

  Args:
    params: a tree, or an array. path: where it stands among the parameters.
    layer: one layer of what is stored with a leading axis of layers.
  """
  mesh = _used_on.get()
  if mesh is None or mesh.shape["fsdp"] == 1:
    return params

  def one(below: str, leaf: Any) -> Any:
    place = f"{path}/{below}" if below else path
    spec = first_match(PARAMETER_RULES, place, P())[int(layer) :]
    whole = P(*(None if axis == "fsdp" else axis for axis in spec))
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, whole))

  return map_with_path(one, params)


def rows_apart(x: jax.Array) -> jax.Array:
  """Activations (B, ...) split over the batch axes; the same outside `used_on`."""
  mesh = _used_on.get()
  if mesh is None or mesh.shape["fsdp"] == 1:
    return x
  return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def state_shardings(mesh: Mesh, tree: Any, params: Any, placed: Any) -> Any:
  """Shardings for a tree of which some leaves go with a parameter, others nowhere.

  A leaf whose path ends in a parameter's path, and that has its shape (a moment), lies
  as the parameter does; any other lies everywhere.

  Args:
    tree: of shapes, such as an optimizer's state.
    params: the parameters' shapes. placed: their shardings.
  """
  known = {}
  map_with_path(lambda path, leaf: known.setdefault(path, leaf.shape), params)
  where = {}
  map_with_path(where.setdefault, placed)

  def one(path: str, leaf: Any) -> NamedSharding:
    parts = path.split("/")
    for start in range(len(parts)):
      name = "/".join(parts[start:])
      if known.get(name) == leaf.shape:
        return where[name]
    return replicated(mesh)

  return map_with_path(one, tree)


def put(tree: Any, places: Any) -> Any:
  """Host arrays that every process holds whole -> global arrays, each part copied."""

  def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])

  return jax.tree.map(one, tree, places)


def put_batch(
  mesh: Mesh, batch: Mapping[str, np.ndarray], axis: int = 0
) -> dict[str, jax.Array]:
  """This process's rows of a batch (`Share.rows`) -> global arrays over the batch axes.

  `axis` is that of the rows; what lies before it is not split.
  """
  before = (slice(None),) * axis
  sharding = NamedSharding(mesh, P(*[None] * axis, BATCH_AXES))
  share = batch_share(mesh)

  def one(rows: np.ndarray) -> jax.Array:
    size = rows.shape[axis] // len(share.held)  # of a part

    def part(at: tuple[slice, ...]) -> np.ndarray:
      place = share.held.index((at[axis].start or 0) // size)
      return rows[(*before, slice(place * size, (place + 1) * size))]

    shape = (*rows.shape[:axis], share.parts * size, *rows.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, sharding, part)

  return {name: one(np.asarray(rows)) for name, rows in batch.items()}
