"""One loader: a model with its processor from whatever file or folder holds it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings
from gcl_jax.models.formats import find, recognise
from gcl_jax.models.huggingface import (
  CONFIG,
  local_folder,
  open_clip_weights,
  read_clip,
  read_json,
  write_clip,
)
from gcl_jax.models.model import Config
from gcl_jax.models.open_clip import DESCRIPTION
from gcl_jax.models.torchscript import is_torchscript
from gcl_jax.models.vista_config import VistaConfig
from gcl_jax.models.vista_files import (
  holds_vista,
  is_text_encoder,
  is_vista,
  read_vista,
  write_vista,
)
from gcl_jax.models.weights import open_weights
from gcl_jax.processing import (
  EncoderTokenizer,
  Processor,
  Tokenizer,
  read_tokenizer,
)

# CLIP's vocabulary, as the packages of OpenAI, OpenCLIP and TinyCLIP carry it.
_MERGES = "bpe_simple_vocab_16e6.txt.gz"


class Pretrained(NamedTuple):
  """A model that was found: its shape, how it fuses, its parameters, its processor."""

  config: Config
  fusion: FusionSettings
  params: dict[str, Any]
  processor: Processor


def read_model(source: str | os.PathLike, tokenizer: str = "") -> Pretrained:
  """Reads what `source` names, by what lies there.

  A Hugging Face folder or hub id, one of OpenCLIP's, a folder that was exported here; or a
  file: OpenAI's `.pt` archive, OpenCLIP's weights with `open_clip_config.json` beside
  them, TinyCLIP's `.pt`. Files have no tokenizer of their own: CLIP's vocabulary is
  looked for beside them. A VISTA is a folder with one `.pth` and its text encoder's
  files, or that `.pth`.

  Args:
    source: a folder, a file, or a hub id.
    tokenizer: the folder, hub id or file of CLIP's vocabulary; "" is the model's own.

  Raises:
    UserError: nothing of the kind is there; it is a model of another kind, which the
      message names; it is damaged; or it has no tokenizer.
  """
  path = Path(source).expanduser()
  if path.is_file():
    if holds_vista(path):
      return _read_vista(path.parent, path)
    return _read_file(path, tokenizer)
  folder = local_folder(source)
  if is_vista(folder):
    return _read_vista(folder)
  weights = open_clip_weights(folder)
  if weights is not None:
    return _read_file(weights, tokenizer)
  _refuse_half(folder)
  if tokenizer:
    processor = Processor(
      Processor.images_from_folder(folder), find_tokenizer(tokenizer)
    )
  else:
    processor = Processor.from_folder(folder)  # before the weights: quick to fail
  return Pretrained(*read_clip(folder), processor)


def read_pretrained(
  folder: str | os.PathLike,
) -> tuple[Config, FusionSettings, dict[str, Any]]:
  """What `write_pretrained` wrote, or a folder of Hugging Face's: shape, fusion, weights.

  Raises:
    UserError: see `read_clip` and `read_vista`; or it holds a text encoder alone.
  """
  if is_vista(folder):
    config, params = read_vista(folder)
    return config, FusionSettings(), params
  _refuse_half(Path(folder))
  return read_clip(folder)


def write_pretrained(
  folder: str | os.PathLike,
  config: Config,
  params: Mapping[str, Any],
  fusion: FusionSettings | None = None,
) -> None:
  """Writes what `read_pretrained` gives back to the bit. Needs no PyTorch.

  Raises:
    UserError: the folder cannot be written.
    ValueError: the parameters are not of this config.
  """
  if isinstance(config, VistaConfig):
    write_vista(folder, config, params)
  else:
    write_clip(folder, config, params, fusion)


def fitted(processor: Processor, config: Config) -> Processor:
  """The processor that a folder gave, for the model that it holds.

  A VISTA's `.pth` brings no image settings: pictures are as large as its tower wants.
  """
  if not isinstance(config, VistaConfig):
    return processor
  size = config.vision.image_size
  image = dataclasses.replace(processor.image, shortest_edge=size, crop_size=size)
  return dataclasses.replace(processor, image=image)


def _read_vista(folder: Path, file: Path | None = None) -> Pretrained:
  processor = Processor.from_folder(folder)  # before the weights: quick to fail
  config, params = read_vista(folder, file)
  return Pretrained(config, FusionSettings(), params, fitted(processor, config))


def _refuse_half(folder: Path) -> None:
  if is_text_encoder(folder):
    kind = read_json(folder / CONFIG)["model_type"]
    raise UserError(
      f"{folder} holds a text encoder alone ({kind}), half of a VISTA: put a VISTA's .pth "
      f"there, or train one from it: config.init.pretrained={folder} with "
      "config.init.image_tower."
    )


def _read_file(file: Path, tokenizer: str) -> Pretrained:
  with open_weights([file]) as tensors:
    found = find(file, tensors, is_torchscript(file), _described(file.parent))
    read = recognise(found).read(found)
    words = find_tokenizer(tokenizer) if tokenizer else _tokenizer_beside(file)
    text = read.config.text
    if (words.eos_id, words.vocab_size) != (text.eos_id, text.vocab_size):
      raise UserError(
        f"the tokenizer for {file} has {words.vocab_size} entries and its end token is "
        f"{words.eos_id}; the model's are {text.vocab_size} and {text.eos_id}: use CLIP's "
        "own vocabulary."
      )
    if words.max_length > text.context:
      words = words.cut_to(text.context)
    processor = Processor(read.images, words)
    return Pretrained(read.config, FusionSettings(), read.params(), processor)


def find_tokenizer(source: str | os.PathLike) -> Tokenizer | EncoderTokenizer:
  """A vocabulary from a folder, a hub id, or CLIP's `bpe_simple_vocab_16e6.txt.gz`.

  Raises:
    UserError: it is not there, or is something else.
  """
  path = Path(source).expanduser()
  if path.is_file():
    return Tokenizer.from_merges(path)
  return read_tokenizer(local_folder(source, weights=False))


def _tokenizer_beside(file: Path) -> Tokenizer:
  folder = file.parent
  if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
    return Tokenizer.from_folder(folder)
  if (folder / _MERGES).is_file():
    return Tokenizer.from_merges(folder / _MERGES)
  raise UserError(
    f"{file} has no tokenizer, and none lies beside it. Name a folder or hub id with CLIP's "
    "vocabulary, --config.tokenizer.path=openai/clip-vit-base-patch32 or in Python "
    f"load(..., tokenizer=...), or put its vocab.json and merges.txt, or {_MERGES}, into "
    f"{folder}."
  )


def _described(folder: Path) -> dict[str, Any]:
  path = folder / DESCRIPTION
  if not path.is_file():
    return {}
  try:
    described = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read as JSON: {error}.") from error
  if not isinstance(described, dict):
    raise UserError(f"{path} holds no JSON object: is it the right file?")
  return described
