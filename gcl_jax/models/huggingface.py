"""CLIP folders in Hugging Face's layout: found or downloaded, read, and written.

A model that `CLIPModel` cannot hold (pruned, or with a ResNet) has a folder of the same
form with a `config.json` that says so, weights under OpenCLIP's keys, and beside them a
PyTorch file that loads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings
from gcl_jax.models.config import OWN_TYPE, CLIPConfig
from gcl_jax.models.convert import (
  HUGGING_FACE,
  from_hf,
  from_tensors,
  to_hf,
  to_tensors,
)
from gcl_jax.models.native import native_layout, native_table
from gcl_jax.models.open_clip import DESCRIPTION
from gcl_jax.models.weights import open_weights

CONFIG, WEIGHTS, SETTINGS = "config.json", "model.safetensors", "gcl_jax.json"
PYTORCH_FILE = "pytorch_clip.py"
_BIN = "pytorch_model.bin"
# No model's hub id ends so: a name that does is that of a file.
_FILE_ENDINGS = (".pt", ".pth", ".bin", ".safetensors", ".gz")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What is fetched from the hub: never the same weights in three frameworks' formats.
_SMALL_FILES = (
  CONFIG,
  DESCRIPTION,
  SETTINGS,
  "preprocessor_config.json",
  "processor_config.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "vocab.json",
  "merges.txt",
  "vocab.txt",
  "sentencepiece.bpe.model",
)
_SAFETENSORS_FILES = (WEIGHTS, "model-*.safetensors", f"{WEIGHTS}.index.json")
_BIN_FILES = (_BIN, "pytorch_model-*.bin", f"{_BIN}.index.json")
_VISTA_FILES = ("Visualized*.pth",)
_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def local_folder(source: str | os.PathLike, weights: bool = True) -> Path:
  """A folder as it is, or a Hugging Face hub id downloaded (or found in the cache).

  Args:
    source: the folder or id.
    weights: whether they are wanted, of a hub id, beside the small files.

  Raises:
    UserError: neither a folder nor an id (but a file's name), or the hub has no such
      model, or cannot be reached and the cache does not have it.
  """
  path = Path(source).expanduser()
  if path.is_dir():
    return path
  name = os.fspath(source)
  if path.exists():
    raise UserError(f"{name} is a file: name the folder of a model that holds it.")
  if path.suffix in _FILE_ENDINGS:
    raise UserError(f"there is no file {name}: check its name and folder.")
  if path.is_absolute() or not _HUB_ID.fullmatch(name) or name.startswith("."):
    raise UserError(f"there is no folder {name}: name a model's folder or a hub id.")
  if not weights:
    return _snapshot(name, [*_SMALL_FILES])
  patterns = [*_SMALL_FILES, *_SAFETENSORS_FILES]
  folder = _snapshot(name, patterns)
  if is_open_clip(folder):
    for file in _OPEN_CLIP_FILES:
      folder = _snapshot(name, [*_SMALL_FILES, file])
      if (folder / file).exists():
        break
  elif not any((folder / file).exists() for file in (WEIGHTS, f"{WEIGHTS}.index.json")):
    # Without a config.json nothing here could read them.
    vista = _VISTA_FILES if (folder / CONFIG).is_file() else ()
    folder = _snapshot(name, [*patterns, *_BIN_FILES, *vista])
  return folder


def is_open_clip(folder: Path) -> bool:
  """Whether a folder is OpenCLIP's, and not also that of a `CLIPModel`."""
  if not (folder / DESCRIPTION).is_file():
    return False
  config = folder / CONFIG
  return not (config.is_file() and is_clip(read_json(config)))


def open_clip_weights(folder: Path) -> Path | None:
  """The weights in a folder of OpenCLIP's; None if it is another kind of folder.

  Raises:
    UserError: it is OpenCLIP's, and has none.
  """
  if not is_open_clip(folder):
    return None
  for name in _OPEN_CLIP_FILES:
    if (folder / name).is_file():
      return folder / name
  raise UserError(
    f"{folder} has {DESCRIPTION} and no weights beside it: it needs "
    f"{' or '.join(_OPEN_CLIP_FILES)}, or name the file itself."
  )


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


def clip_config(folder: str | os.PathLike) -> tuple[CLIPConfig, FusionSettings]:
  """The shape of a `CLIPModel` folder and how it fuses, without its weights.

  Raises:
    UserError: as `read_clip`.
  """
  folder = Path(folder)
  return _read_config(folder), _read_fusion(folder / SETTINGS)


def read_clip(
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
  config, fusion = clip_config(folder)
  with open_weights(weight_files(folder)) as tensors:
    if config.plain:
      params = from_hf(tensors, config, str(folder))
    else:
      layout = native_layout(config, HUGGING_FACE.described_by, HUGGING_FACE.mend)
      params = from_tensors(tensors, config, str(folder), layout)
  if fusion.learned:
    params["fusion"] = {
      name: np.float32(getattr(fusion, name))
      for name in ("image_weight", "text_weight")
    }
  return config, fusion, params


def write_clip(
  folder: str | os.PathLike,
  config: CLIPConfig,
  params: Mapping[str, Any],
  fusion: FusionSettings | None = None,
) -> None:
  """Writes config.json, model.safetensors and gcl_jax.json; makes the folder.

  Each file appears whole or not at all, config.json last. `CLIPModel.from_pretrained`
  loads the folder and `read_clip` gives the same bits back. Where `CLIPModel` has
  no such shape, `pytorch_clip.py`, which is written beside them, loads it instead.

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
  if config.plain:
    tensors = to_hf(params, config)
  else:
    tensors = to_tensors(params, config, native_table(config))
  try:
    folder.mkdir(parents=True, exist_ok=True)
    # transformers refuses a file that does not say which framework wrote it.
    write_file(
      folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"})
    )
    if not config.plain:
      source = Path(__file__).with_name(PYTORCH_FILE).read_text(encoding="utf-8")
      write_file(
        folder / PYTORCH_FILE, lambda path: path.write_text(source, encoding="utf-8")
      )
    write_json(folder / SETTINGS, {"fusion": fusion.to_dict()})
    write_json(folder / CONFIG, config.to_hf())
  except OSError as error:
    raise UserError(
      f"the model cannot be written to {folder} ({error.strerror or error}): is there "
      "room, and may you write there?"
    ) from error


def write_file(path: Path, write: Callable[[Path], None]) -> None:
  """Lets `write` fill a file beside `path`, which then takes its place."""
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


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file whole or not at all."""
  text = json.dumps(value, indent=2, sort_keys=True) + "\n"
  write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object.

  Raises:
    UserError: it cannot be read, or holds something else.
  """
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read as JSON: {error}.") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} holds no JSON object: is it the right file?")
  return value


def _read_config(folder: Path) -> CLIPConfig:
  if not (folder / CONFIG).is_file():
    files = [f.name for f in sorted(folder.glob("*.pt")) + sorted(folder.glob("*.bin"))]
    lying = f" ({', '.join(files[:3])})" if files else ""
    raise UserError(
      f"{folder} has no {CONFIG}: name a folder as CLIPModel.save_pretrained writes it, or "
      f"the file of another kind of model itself{lying}. A VISTA's .pth "
      "(BAAI/bge-visualized) lies beside the config.json and tokenizer files of its text "
      "encoder."
    )
  fields = read_json(folder / CONFIG)
  kind = fields.get("model_type")
  if not is_clip(fields):
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


def is_clip(fields: Mapping[str, Any]) -> bool:
  kind = fields.get("model_type")
  towers = {f"{t}_config{d}" for t in ("text", "vision") for d in ("", "_dict")}
  return kind in ("clip", OWN_TYPE) or (kind is None and bool(towers & set(fields)))


def _read_fusion(path: Path) -> FusionSettings:
  if not path.is_file():
    return FusionSettings()
  fields = read_json(path).get("fusion", {})
  if not isinstance(fields, dict):
    raise UserError(f"{path}: fusion is {fields!r}, not the settings by name.")
  try:
    return FusionSettings.from_dict(fields)
  except UserError as error:
    raise UserError(f"{path}: {error}") from error


def weight_files(folder: Path) -> list[Path]:
  """Whichever weight files the folder has, safetensors first.

  Raises:
    UserError: none, or not all of its shards.
  """
  for name in (WEIGHTS, _BIN):
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
      return [folder / name]
    if index.is_file():
      return _shards(index)
  raise UserError(
    f"{folder} has no weights: it needs {WEIGHTS}, its shards with {WEIGHTS}.index.json, "
    f"or {_BIN}."
  )


def _shards(index: Path) -> list[Path]:
  where = read_json(index).get("weight_map")
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
