"""The weights of a TorchScript archive, without running it.

OpenAI published CLIP so: a zip whose `data.pkl` pickles the module and whose `data/` holds
the numbers. PyTorch can only execute such a file, and it may contain any code. Here the
pickle is read with a table of what it may name: tensors, containers and the module's own
classes, which become plain holders of attributes. Anything else is refused, and the
archive's code is not looked at. Needs no PyTorch.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.errors import UserError

_STORAGES = {
  "DoubleStorage": "float64",
  "FloatStorage": "float32",
  "HalfStorage": "float16",
  "LongStorage": "int64",
  "IntStorage": "int32",
  "ShortStorage": "int16",
  "CharStorage": "int8",
  "ByteStorage": "uint8",
  "BoolStorage": "bool",
}


class _Module:
  """What the archive calls a class of its own: a holder of attributes."""

  def __setstate__(self, state: Any) -> None:
    self.attributes = state if isinstance(state, dict) else {}


class _Storage:
  """What the archive calls a type of storage."""

  def __init__(self, dtype: str):
    self.dtype = dtype


def is_torchscript(file: Path) -> bool:
  """Whether a file is a zip with a TorchScript module in it."""
  try:
    with zipfile.ZipFile(file) as archive:
      return _root(archive) is not None
  except (OSError, zipfile.BadZipFile):
    return False


def read_torchscript(file: Path) -> dict[str, np.ndarray]:
  """Parameters and buffers by their dotted names, read-only where they are whole.

  Raises:
    UserError: the archive is damaged, or names something that is no tensor.
  """
  try:
    with zipfile.ZipFile(file) as archive:
      root = _root(archive)
      pickled = io.BytesIO(archive.read(f"{root}/data.pkl"))
      module = _Unpickler(pickled, archive, root).load()
    found: dict[str, np.ndarray] = {}
    _collect(module, "", found, set())
    return found
  except Exception as error:  # a broken pickle raises anything
    raise UserError(
      f"{file} is refused: it is a TorchScript archive that holds more than a module's "
      f"weights, or is damaged ({error}). Take the file that was published."
    ) from error


def _root(archive: zipfile.ZipFile) -> str | None:
  """The archive's one folder, if it holds a module: its data and its code."""
  names = archive.namelist()
  for name in names:
    root, _, rest = name.partition("/")
    if rest == "data.pkl" and any(other.startswith(f"{root}/code/") for other in names):
      return root
  return None


class _Unpickler(pickle.Unpickler):
  """Builds what the table allows, and nothing else."""

  def __init__(self, file: io.BytesIO, archive: zipfile.ZipFile, root: str):
    super().__init__(file)
    self._archive, self._root = archive, root
    self._storages: dict[str, np.ndarray] = {}

  def find_class(self, module: str, name: str) -> Any:
    if module.split(".")[0] == "__torch__":
      return _Module
    if module == "torch" and name in _STORAGES:
      return _Storage(_STORAGES[name])
    allowed: dict[tuple[str, str], Callable[..., Any]] = {
      ("torch._utils", "_rebuild_tensor_v2"): _tensor,
      ("collections", "OrderedDict"): collections.OrderedDict,
      ("torch.jit._pickle", "build_intlist"): list,
      ("torch.jit._pickle", "build_doublelist"): list,
      ("torch.jit._pickle", "build_boollist"): list,
      ("torch.jit._pickle", "build_tensorlist"): list,
      ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
    }
    if (module, name) not in allowed:
      raise pickle.UnpicklingError(f"it names {module}.{name}")
    return allowed[module, name]

  def persistent_load(self, pid: Any) -> np.ndarray:
    kind, storage, key, _, size = pid
    if kind != "storage" or not isinstance(storage, _Storage):
      raise pickle.UnpicklingError(f"it refers to {kind!r}")
    if key not in self._storages:
      self._storages[key] = self._read(str(key), np.dtype(storage.dtype), int(size))
    return self._storages[key]

  def _read(self, key: str, dtype: np.dtype, size: int) -> np.ndarray:
    info = self._archive.getinfo(f"{self._root}/data/{key}")
    # PyTorch does not compress: a small file that claims to be large is none of its.
    if (
      info.compress_type != zipfile.ZIP_STORED or info.file_size < size * dtype.itemsize
    ):
      raise pickle.UnpicklingError(f"data/{key} is not {size} numbers of {dtype}")
    return np.frombuffer(self._archive.read(info), dtype)[:size]


def _tensor(storage: np.ndarray, offset: int, shape, strides, *_) -> np.ndarray:
  """A tensor as PyTorch describes it: a view of its storage."""
  numbers = (offset, *shape, *strides)
  if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(strides):
    raise pickle.UnpicklingError(f"a tensor at {numbers}")
  last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  if 0 not in shape and last >= storage.size:
    raise pickle.UnpicklingError(f"a tensor that ends at {last} of {storage.size}")
  steps = tuple(stride * storage.itemsize for stride in strides)
  start = storage[offset:] if 0 not in shape else storage[:0]
  return np.lib.stride_tricks.as_strided(start, tuple(shape), steps, writeable=False)


def _collect(node: Any, prefix: str, found: dict[str, np.ndarray], above: set) -> None:
  if not isinstance(node, _Module) or id(node) in above:
    return
  for name, value in getattr(node, "attributes", {}).items():
    if isinstance(value, np.ndarray):
      found[f"{prefix}{name}"] = value
    else:
      _collect(value, f"{prefix}{name}.", found, above | {id(node)})
