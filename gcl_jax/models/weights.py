"""Files of weights from strangers: their tensors by key, and no code of theirs.

safetensors are read as they are. What PyTorch saved is read by
`torch.load(weights_only=True)`, where PyTorch is installed; TorchScript archives, which
PyTorch would execute, by `torchscript.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.models.torchscript import is_torchscript, read_torchscript

SAFETENSORS = ".safetensors"
# Under these, training scripts keep the weights beside their optimizer.
_NESTED = ("state_dict", "model_state_dict", "model")


class Reader(NamedTuple):
  """A tensor that is read when it is asked for."""

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


class Tensors(Mapping):
  """Arrays by key, read from their files when they are asked for."""

  def __init__(self, readers: Mapping[str, Reader]):
    self._readers = dict(readers)

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
    """The same tensors under other keys."""
    return Tensors({name(key): reader for key, reader in self._readers.items()})


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
    yield Tensors(readers)


def _of_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, Reader]:
  return {key: Reader(a.shape, lambda a=a: a) for key, a in arrays.items()}


def _open_safetensors(file: Path, stack: contextlib.ExitStack) -> dict[str, Reader]:
  from safetensors import SafetensorError, safe_open

  try:
    opened = stack.enter_context(safe_open(file, framework="numpy"))
    keys = list(opened.keys())
    shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in keys}
  except (SafetensorError, OSError) as error:
    raise UserError(
      f"{file} is not a whole safetensors file ({error}): download it again."
    ) from error
  return {
    key: Reader(shape, lambda key=key: opened.get_tensor(key))
    for key, shape in shapes.items()
  }


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
  except Exception as error:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise UserError(
      f"{file} is refused: it is no plain file of weights ({reason}). Take the model's "
      "safetensors."
    ) from error
  if not isinstance(tensors, dict):
    raise UserError(f"{file} holds a {type(tensors).__name__}, not weights by name.")
  for name in _NESTED:
    if isinstance(tensors.get(name), dict):
      tensors = tensors[name]
      break
  tensors = {k: t for k, t in tensors.items() if isinstance(t, torch.Tensor)}

  def read(tensor) -> np.ndarray:
    # NumPy has no bfloat16 of PyTorch's.
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

  return {
    str(key): Reader(tuple(t.shape), lambda t=t: read(t)) for key, t in tensors.items()
  }
