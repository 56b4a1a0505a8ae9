"""CLIP folders in Hugging Face's layout: found or downloaded, read, and written.

Files may come from strangers: weights are read as safetensors; a `pytorch_model.bin`
only through `torch.load(weights_only=True)`, where PyTorch is installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings
from gcl_jax.models.config import CLIPConfig
from gcl_jax.models.convert import from_hf, to_hf

CONFIG, WEIGHTS, SETTINGS = "config.json", "model.safetensors", "gcl_jax.json"
_BIN = "pytorch_model.bin"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What is fetched from the hub: never the same weights in three frameworks' formats.
_SMALL_FILES = (
  CONFIG,
  SETTINGS,
  "preprocessor_config.json",
  "processor_config.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "vocab.json",
  "merges.txt",
)
_SAFETENSORS_FILES = (WEIGHTS, "model-*.safetensors", f"{WEIGHTS}.index.json")
_BIN_FILES = (_BIN, "pytorch_model-*.bin", f"{_BIN}.index.json")


def local_folder(source: str | os.PathLike) -> Path:
  """A folder as it is, or a Hugging Face hub id downloaded (or found in the cache).

  Raises:
    UserError: neither a folder nor an id, or the hub has no such model, or cannot be
      reached and the cache does not have it.
  """
  path = Path(source).expanduser()
  if path.is_dir():
    return path
  name = os.fspath(source)
  if path.exists():
    raise UserError(f"{name} is a file: name the folder of a model that holds it.")
  if path.is_absolute() or not _HUB_ID.fullmatch(name) or name.startswith("."):
    raise UserError(f"there is no folder {name}: name a CLIP folder or a hub id.")
  patterns = [*_SMALL_FILES, *_SAFETENSORS_FILES]
  folder = _snapshot(name, patterns)
  if not any((folder / file).exists() for file in (WEIGHTS, f"{WEIGHTS}.index.json")):
    folder = _snapshot(name, [*patterns, *_BIN_FILES])
  return folder


def _snapshot(name: str, patterns: list[str]) -> Path:
  from huggingface_hub import errors as hub
  from huggingface_hub import snapshot_download

  here = f"{name} is no folder here, and as a Hugging Face hub id "
  try:
    return Path(snapshot_download(name, allow_patterns=patterns))
  except hub.GatedRepoError as error:
    raise UserError(
      f"{here}it needs permission: accept its terms on huggingface.co, then set HF_TOKEN."
    ) from error
  except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
    raise UserError(
      f"{here}it does not exist, or is private (set HF_TOKEN): check the spelling."
    ) from error
  except Exception as error:
    # Whatever the network library raises: no route, no name, a broken proxy (which
    # snapshot_download does not look into the cache for), no room on the disk.
    with contextlib.suppress(Exception):
      local = snapshot_download(name, allow_patterns=patterns, local_files_only=True)
      return Path(local)
    raise UserError(
      f"{here}it could not be downloaded ({type(error).__name__}) and is not in the "
      "cache: download the model on a machine with a network and name its folder, or "
      "copy that machine's cache (HF_HOME) here."
    ) from error


def read_pretrained(
  folder: str | os.PathLike,
) -> tuple[CLIPConfig, FusionSettings, dict[str, Any]]:
  """A Hugging Face `CLIPModel` folder: its shape, how it fuses, its parameters.

  Weights in `model.safetensors`, in shards with an index, or in `pytorch_model.bin`;
  half precision is widened. Fusion settings are those of `gcl_jax.json`, or the
  defaults where there is none.

  Returns:
    config, fusion settings, and a nested dict of NumPy float32 arrays for `bind`.

  Raises:
    UserError: a file is missing or unreadable, the folder holds another kind of model,
      or keys and shapes do not fit config.json (it names them).
  """
  folder = Path(folder)
  config = _read_config(folder)
  fusion = _read_fusion(folder / SETTINGS)
  with _open_weights(folder) as tensors:
    params = from_hf(tensors, config, str(folder))
  if fusion.learned:
    params["fusion"] = {
      name: np.float32(getattr(fusion, name))
      for name in ("image_weight", "text_weight")
    }
  return config, fusion, params


def write_pretrained(
  folder: str | os.PathLike,
  config: CLIPConfig,
  params: Mapping[str, Any],
  fusion: FusionSettings | None = None,
) -> None:
  """Writes config.json, model.safetensors and gcl_jax.json; makes the folder.

  Each file appears whole or not at all, config.json last. `CLIPModel.from_pretrained`
  loads the folder and `read_pretrained` gives the same bits back.

  Args:
    folder: where.
    config: the shape.
    params: arrays of any kind, all on this process.
    fusion: how the model fuses; None is the defaults. Where its weights are learned,
      those in `params["fusion"]` are written.

  Raises:
    UserError: the folder cannot be written.
    ValueError: the parameters are not of this config.
  """
  from safetensors.numpy import save_file

  folder = Path(folder)
  fusion = FusionSettings() if fusion is None else fusion
  if fusion.learned:
    weights = {name: float(value) for name, value in params["fusion"].items()}
    fusion = FusionSettings(of=fusion.of, learned=True, **weights)
  tensors = to_hf(params, config)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    # transformers refuses a file that does not say which framework wrote it.
    _write(
      folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"})
    )
    _write_json(folder / SETTINGS, {"fusion": fusion.to_dict()})
    _write_json(folder / CONFIG, config.to_hf())
  except OSError as error:
    raise UserError(
      f"the model cannot be written to {folder} ({error.strerror or error}): is there "
      "room, and may you write there?"
    ) from error


def _write(path: Path, write: Callable[[Path], None]) -> None:
  handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
  os.close(handle)
  try:
    write(Path(temporary))
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are for their owner alone
    os.replace(temporary, path)
  except BaseException:
    Path(temporary).unlink(missing_ok=True)
    raise


def _write_json(path: Path, value: Any) -> None:
  text = json.dumps(value, indent=2, sort_keys=True) + "\n"
  _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _read_json(path: Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read as JSON: {error}.") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} holds no JSON object: is it the right file?")
  return value


def _read_config(folder: Path) -> CLIPConfig:
  if not (folder / CONFIG).is_file():
    raise UserError(
      f"{folder} has no {CONFIG}: name a folder as CLIPModel.save_pretrained writes it."
    )
  fields = _read_json(folder / CONFIG)
  kind = fields.get("model_type")
  towers = {f"{t}_config{d}" for t in ("text", "vision") for d in ("", "_dict")}
  if kind != "clip" and not (kind is None and towers & set(fields)):
    names = fields.get("architectures") or []
    named = f" ({', '.join(map(str, names))})" if isinstance(names, list) else ""
    raise UserError(
      f"{folder} holds a model of type {kind!r}{named}, not a CLIP: {CONFIG} must say "
      'model_type "clip" (CLIPModel).'
    )
  try:
    return CLIPConfig.from_hf(fields)
  except UserError as error:
    raise UserError(f"{folder / CONFIG}: {error}") from error


def _read_fusion(path: Path) -> FusionSettings:
  if not path.is_file():
    return FusionSettings()
  fields = _read_json(path).get("fusion", {})
  if not isinstance(fields, dict):
    raise UserError(f"{path}: fusion is {fields!r}, not the settings by name.")
  try:
    return FusionSettings.from_dict(fields)
  except UserError as error:
    raise UserError(f"{path}: {error}") from error


class _Tensors(Mapping):
  """Arrays by key, read from their files when they are asked for."""

  def __init__(self, readers: Mapping[str, Callable[[], np.ndarray]]):
    self._readers = readers

  def __getitem__(self, key: str) -> np.ndarray:
    return self._readers[key]()

  def __iter__(self) -> Iterator[str]:
    return iter(self._readers)

  def __len__(self) -> int:
    return len(self._readers)


@contextlib.contextmanager
def _open_weights(folder: Path) -> Iterator[Mapping[str, np.ndarray]]:
  """The tensors of whichever weight files the folder has, safetensors first."""
  for name, open_file in ((WEIGHTS, _open_safetensors), (_BIN, _open_bin)):
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
      files = [folder / name]
    elif index.is_file():
      files = _shards(index)
    else:
      continue
    with contextlib.ExitStack() as stack:
      readers = {}
      for file in files:
        readers |= open_file(file, stack)
      yield _Tensors(readers)
    return
  raise UserError(
    f"{folder} has no weights: it needs {WEIGHTS}, its shards with {WEIGHTS}.index.json, "
    f"or {_BIN}."
  )


def _shards(index: Path) -> list[Path]:
  where = _read_json(index).get("weight_map")
  if not isinstance(where, dict) or not all(isinstance(n, str) for n in where.values()):
    raise UserError(f"{index} has no weight_map from keys to files.")
  files = [index.parent / name for name in sorted(set(where.values()))]
  # A name such as ../../x comes from a stranger too.
  absent = [f.name for f in files if f.parent != index.parent or not f.is_file()]
  if absent:
    raise UserError(
      f"{index} names files that {index.parent} does not hold: {', '.join(absent)}. "
      "Download them too."
    )
  return files


def _open_safetensors(file: Path, stack: contextlib.ExitStack) -> dict[str, Callable]:
  from safetensors import SafetensorError, safe_open

  try:
    opened = stack.enter_context(safe_open(file, framework="numpy"))
    keys = list(opened.keys())
  except (SafetensorError, OSError) as error:
    raise UserError(
      f"{file} is not a whole safetensors file ({error}): download it again."
    ) from error
  return {key: lambda key=key: opened.get_tensor(key) for key in keys}


def _open_bin(file: Path, stack: contextlib.ExitStack) -> dict[str, Callable]:
  del stack
  try:
    import torch
  except ImportError as error:
    raise UserError(
      f"{file} is a pickle that only PyTorch reads safely: pip install torch, or convert "
      f"it to {WEIGHTS} on a machine that has it."
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
      f"{WEIGHTS}."
    ) from error
  if not isinstance(tensors, dict):
    raise UserError(f"{file} holds a {type(tensors).__name__}, not weights by name.")
  tensors = {k: t for k, t in tensors.items() if isinstance(t, torch.Tensor)}

  def read(tensor) -> np.ndarray:
    # NumPy has no bfloat16 of PyTorch's.
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

  return {key: lambda t=t: read(t) for key, t in tensors.items()}
