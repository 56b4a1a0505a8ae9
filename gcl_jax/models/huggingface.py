"""Hugging Face folders of CLIP models, read and written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings
from gcl_jax.models.clip import build
from gcl_jax.models.config import CLIPConfig
from gcl_jax.models.convert import to_ours, to_theirs

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
FUSION = "gcl_jax.json"

# What a download brings: nothing of other frameworks.
_PATTERNS = ("*.json", "*.safetensors", "merges.txt", "vocab.json")


def read_pretrained(
  folder: str | os.PathLike,
) -> tuple[CLIPConfig, FusionSettings, dict[str, Any]]:
  """A `CLIPModel` folder -> shape, fusion settings, parameters.

  Weights come from model.safetensors, its shards, or pytorch_model.bin (the last only
  through `torch.load(weights_only=True)`), in any float type.

  Returns:
    The parameters are a nested dict of float32 NumPy arrays. Without gcl_jax.json the
    fusion is raw with weights 1 and 1.

  Raises:
    UserError: no CLIP there, or tensors missing, left over or of other shapes.
  """
  folder = Path(folder)
  config = CLIPConfig.from_hf(_read_json(folder, CONFIG))
  fusion = FusionSettings()
  if (folder / FUSION).is_file():
    fusion = FusionSettings.from_dict(_read_json(folder, FUSION)["fusion"])
  params = to_ours(_tensors(folder), config, build(config).abstract(), str(folder))
  return config, fusion, params


def write_pretrained(
  folder: str | os.PathLike,
  config: CLIPConfig,
  params: Mapping[str, Any],
  fusion: FusionSettings | None = None,
) -> None:
  """Writes config.json, model.safetensors and gcl_jax.json; weights last, and whole.

  Args:
    folder: made where there is none.
    config: the model's shape.
    params: nested dict of float32 arrays.
    fusion: how the model fuses; numbers, not learned.
  """
  from safetensors.numpy import save_file

  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  settings = {"fusion": (fusion or FusionSettings()).to_dict()}
  for name, value in ((CONFIG, config.to_hf()), (FUSION, settings)):
    part = folder / f"{name}.part"
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, folder / name)
  part = folder / f"{WEIGHTS}.part"
  save_file(to_theirs(params, config), part, metadata={"format": "pt"})
  os.replace(part, folder / WEIGHTS)


def local_folder(name: str | os.PathLike) -> Path:
  """A folder as it is, or a hub id downloaded (a copy in the cache needs no network).

  Raises:
    UserError: neither a folder nor a hub id that can be reached.
  """
  path = Path(name).expanduser()
  if path.is_dir():
    return path
  text = str(name)
  if path.exists() or text.count("/") > 1 or text.startswith((".", "/", "~")):
    raise UserError(f"{text} is no folder: name one that holds {CONFIG}, or a hub id.")
  from huggingface_hub import snapshot_download

  try:
    return Path(
      snapshot_download(text, local_files_only=True, allow_patterns=_PATTERNS)
    )
  except Exception:  # not cached: whatever its reason, the download decides
    pass
  try:
    folder = Path(snapshot_download(text, allow_patterns=_PATTERNS))
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
      folder = Path(snapshot_download(text, allow_patterns=(*_PATTERNS, PICKLED)))
    return folder
  except Exception as error:  # the hub client has a dozen ways to say no
    reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    raise UserError(
      f"{text!r} is no folder here, and cannot be had from the Hugging Face hub "
      f"({type(error).__name__}: {reason}). Check the name and the network, or download "
      "it elsewhere and name the folder."
    ) from error


def _read_json(folder: Path, name: str) -> dict[str, Any]:
  try:
    return json.loads((folder / name).read_text())
  except FileNotFoundError:
    raise UserError(
      f"{folder} has no {name}: name a folder that CLIPModel.save_pretrained wrote."
    ) from None
  except (OSError, ValueError) as error:
    raise UserError(f"{folder / name} cannot be read: {error}.") from None


def _tensors(folder: Path) -> dict[str, np.ndarray]:
  if (folder / WEIGHTS).is_file():
    return _safetensors([folder / WEIGHTS])
  if (folder / INDEX).is_file():
    names = sorted(set(_read_json(folder, INDEX)["weight_map"].values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
      raise UserError(f"{folder} lacks {', '.join(absent)}, which {INDEX} names.")
    return _safetensors([folder / name for name in names])
  if (folder / PICKLED).is_file():
    return _pickled(folder / PICKLED)
  raise UserError(f"{folder} has no weights: it needs {WEIGHTS} (or {PICKLED}).")


def _safetensors(files: list[Path]) -> dict[str, np.ndarray]:
  import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
  from safetensors import SafetensorError
  from safetensors.numpy import load_file

  tensors: dict[str, np.ndarray] = {}
  for file in files:
    try:
      tensors |= load_file(file)
    except (OSError, SafetensorError) as error:
      raise UserError(f"{file} is damaged or no safetensors file: {error}.") from None
  return tensors


def _pickled(file: Path) -> dict[str, np.ndarray]:
  try:
    import torch
  except ImportError:
    raise UserError(
      f"{file} is a PyTorch pickle and PyTorch is not installed: pip install torch, or "
      f"convert it to {WEIGHTS}."
    ) from None
  try:
    tensors = torch.load(file, map_location="cpu", weights_only=True)
  except Exception as error:  # refused pickles and damaged files alike
    reason = str(error).splitlines()[0]
    raise UserError(
      f"{file} holds more than tensors, or is damaged, and is not read ({reason})."
    ) from None
  return {
    key: (value.float() if value.is_floating_point() else value).numpy()
    for key, value in tensors.items()
  }
