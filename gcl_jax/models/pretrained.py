"""One loader: a model with its processor from whatever file or folder holds it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings
from gcl_jax.models.config import CLIPConfig
from gcl_jax.models.formats import find, recognise
from gcl_jax.models.huggingface import (
  local_folder,
  open_clip_weights,
  read_pretrained,
)
from gcl_jax.models.open_clip import DESCRIPTION
from gcl_jax.models.torchscript import is_torchscript
from gcl_jax.models.weights import open_weights
from gcl_jax.processing import Processor, Tokenizer

# CLIP's vocabulary, as the packages of OpenAI, OpenCLIP and TinyCLIP carry it.
_MERGES = "bpe_simple_vocab_16e6.txt.gz"


class Pretrained(NamedTuple):
  """A model that was found: its shape, how it fuses, its parameters, its processor."""

  config: CLIPConfig
  fusion: FusionSettings
  params: dict[str, Any]
  processor: Processor


def read_model(source: str | os.PathLike, tokenizer: str = "") -> Pretrained:
  """Reads what `source` names, by what lies there.

  A Hugging Face folder or hub id, one of OpenCLIP's, a folder that was exported here; or a
  file: OpenAI's `.pt` archive, OpenCLIP's weights with `open_clip_config.json` beside
  them, TinyCLIP's `.pt`. Files have no tokenizer of their own: CLIP's vocabulary is
  looked for beside them.

  Args:
    source: a folder, a file, or a hub id.
    tokenizer: the folder, hub id or file of CLIP's vocabulary; "" is the model's own.

  Raises:
    UserError: nothing of the kind is there; it is a model of another kind, which the
      message names; it is damaged; or it has no tokenizer.
  """
  path = Path(source).expanduser()
  if path.is_file():
    return _read_file(path, tokenizer)
  folder = local_folder(source)
  weights = open_clip_weights(folder)
  if weights is not None:
    return _read_file(weights, tokenizer)
  if tokenizer:
    processor = Processor(
      Processor.images_from_folder(folder), find_tokenizer(tokenizer)
    )
  else:
    processor = Processor.from_folder(folder)  # before the weights: quick to fail
  return Pretrained(*read_pretrained(folder), processor)


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


def find_tokenizer(source: str | os.PathLike) -> Tokenizer:
  """CLIP's vocabulary from a folder, a hub id, or `bpe_simple_vocab_16e6.txt.gz`.

  Raises:
    UserError: it is not there, or is something else.
  """
  path = Path(source).expanduser()
  if path.is_file():
    return Tokenizer.from_merges(path)
  return Tokenizer.from_folder(local_folder(source, weights=False))


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
