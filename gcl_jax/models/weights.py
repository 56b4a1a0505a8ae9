"""Files of weights from strangers: their tensors by key, and no code of theirs.

safetensors are read as they are. What PyTorch saved is read by
`torch.load(weights_only=True)`, where PyTorch is installed; TorchScript archives, which
PyTorch would execute, by `torchscript.py`.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.models.torchscript import is_torchscript, read_torchscript

SAFETENSORS = ".safetensors"
# Under these, training scripts keep the weights beside their optimizer.
_NESTED = ("state_dict", "model_state_dict", "model")
# What is read, by the names of safetensors and of PyTorch. Of 8 bits there are integers
# alone: a float of 8 bits means nothing without a factor that lies elsewhere.
_SAFE_KINDS = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
_TORCH_KINDS = {"float64", "float32", "float16", "bfloat16"}
_TORCH_KINDS |= {"int64", "int32", "int16", "int8", "uint8", "bool"}
# How PyTorch's files begin: a zip, or its number in a pickle.
_ZIP, _OLD = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"


class Reader(NamedTuple):
  """A tensor that is read when it is asked for."""

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


class Tensors(Mapping):
  """Arrays by key, read from their files when they are asked for."""

  def __init__(self, readers: Mapping[str, Reader], where: str = ""):
    self._readers, self._where = dict(readers), where

  def __getitem__(self, key: str) -> np.ndarray:
    return self._readers[key].read()

  def __iter__(self) -> Iterator[str]:
    return iter(self._readers)

  def __len__(self) -> int:
    return len(self._readers)

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Of every tensor, without reading any."""
    return {key: reader.shape for key, reader in self._readers.items()}

  def renamed(self, name: Callable[[str], str]) -> Tensors:
    """The same tensors under other keys.

    Raises:
      UserError: two that differ would get one key.
    """
    of: dict[str, str] = {}
    for key in self._readers:
      first = of.setdefault(name(key), key)
      if first != key and not np.array_equal(self[first], self[key]):
        raise UserError(
          f"{self._where} holds {first} and {key}, two different tensors for one place "
          f"({name(key)}): take one of them out."
        )
    return Tensors({new: self._readers[key] for new, key in of.items()}, self._where)


@contextlib.contextmanager
def open_weights(files: Sequence[Path]) -> Iterator[Tensors]:
  """The tensors of some files, by their endings, as long as the context lasts.

  Raises:
    UserError: a file is damaged, or is more than weights, or needs PyTorch.
  """
  with contextlib.ExitStack() as stack:
    readers: dict[str, Reader] = {}
    for file in files:
      if file.suffix == SAFETENSORS:
        readers |= _open_safetensors(file, stack)
      elif is_torchscript(file):
        readers |= _of_arrays(read_torchscript(file))
      else:
        readers |= _open_torch(file)
    yield Tensors(readers, ", ".join(map(str, files)))


def _of_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, Reader]:
  return {key: Reader(a.shape, lambda a=a: a) for key, a in arrays.items()}


def _open_safetensors(file: Path, stack: contextlib.ExitStack) -> dict[str, Reader]:
  from safetensors import SafetensorError, safe_open

  try:
    opened = stack.enter_context(safe_open(file, framework="numpy"))
    keys = list(opened.keys())
    slices = {key: opened.get_slice(key) for key in keys}
    found = {k: (tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}
  except (SafetensorError, OSError) as error:
    raise UserError(
      f"{file} is not a whole safetensors file ({error}): download it again."
    ) from error

  def read(key: str, kind: str) -> np.ndarray:
    if kind not in _SAFE_KINDS:
      raise _unread(file, key, kind)
    return opened.get_tensor(key)

  return {
    key: Reader(shape, lambda key=key, kind=kind: read(key, kind))
    for key, (shape, kind) in found.items()
  }


def _unread(file: Path, key: str, kind: str) -> UserError:
  return UserError(
    f"{file}: {key} is a tensor of kind {kind!r}, which is not read: save the weights as "
    "dense float32, float16 or bfloat16."
  )


def _open_torch(file: Path) -> dict[str, Reader]:
  try:
    import torch
  except ImportError as error:
    raise UserError(
      f"{file} is a pickle that only PyTorch reads safely: pip install torch, or convert "
      "it to safetensors on a machine that has it."
    ) from error
  if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
    # Until 2.6 weights_only could be made to run code (CVE-2025-32434).
    raise UserError(f"{file} needs PyTorch 2.6 or newer; {torch.__version__} is here.")
  try:
    tensors = torch.load(file, map_location="cpu", weights_only=True)
  except Exception as error:  # a file that is none of its own makes it raise anything
    raise UserError(f"{file} is refused: {_refusal(file, error)}") from error
  if not isinstance(tensors, dict):
    raise UserError(f"{file} holds a {type(tensors).__name__}, not weights by name.")
  for name in _NESTED:
    if isinstance(tensors.get(name), dict):
      tensors = tensors[name]
      break
  tensors = {k: t for k, t in tensors.items() if isinstance(t, torch.Tensor)}

  def read(key: str, tensor) -> np.ndarray:
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided:
      kind += f", {str(tensor.layout).removeprefix('torch.')}"
    if tensor.device.type != "cpu":
      kind += f", without its numbers ({tensor.device})"
    if kind not in _TORCH_KINDS:
      raise _unread(file, key, kind)
    # NumPy has no bfloat16 of PyTorch's.
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

  return {
    str(key): Reader(tuple(t.shape), lambda key=key, t=t: read(key, t))
    for key, t in tensors.items()
  }


def _refusal(file: Path, error: Exception) -> str:
  """Why PyTorch did not read a file, and how to mend it; none of PyTorch's own advice."""
  named = re.search(r"GLOBAL ([\w.]+)", str(error))
  more = "Take the model's safetensors, or save its state_dict alone."
  if named:
    return f"it holds more than tensors ({named[1]}). {more}"
  try:
    ours = _of_pytorch(file)
  except OSError as unreadable:
    return f"it cannot be read ({unreadable.strerror})."
  if not ours:
    return "it is no file that PyTorch saved. Take the model's file of weights."
  if isinstance(error, pickle.UnpicklingError):
    return f"it holds more than tensors, or is damaged. {more}"
  return "it is damaged, or only a part of the file: download it again."


def _of_pytorch(file: Path) -> bool:
  """Whether a file begins as those that PyTorch saves do."""
  with open(file, "rb") as opened:
    start = opened.read(len(_OLD))
  if not start.startswith(_ZIP):
    return start == _OLD
  try:
    with zipfile.ZipFile(file) as archive:
      return any(name.endswith("/data.pkl") for name in archive.namelist())
  except zipfile.BadZipFile:
    return True  # a part of one
