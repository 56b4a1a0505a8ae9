"""One loader: a model with its processor from whatever file or folder holds it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings
from gcl_jax.models.formats import find, recognise
from gcl_jax.models.huggingface import (
  CONFIG,
  clip_config,
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
  text_encoder_config,
  write_vista,
)
from gcl_jax.models.weights import open_weights
from gcl_jax.processing import (
  EncoderTokenizer,
  Processor,
  Tokenizer,
  has_tokenizer,
  read_tokenizer,
)

# CLIP's vocabulary, as the packages of OpenAI, OpenCLIP and TinyCLIP carry it.
_MERGES = "bpe_simple_vocab_16e6.txt.gz"
_LARGEST_ID = 2  # this end token in a CLIP's config means: pool at the largest id


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
    tokenizer: the folder, hub id or file of the vocabulary of a model that has none of
      its own; "" looks beside a file.

  Raises:
    UserError: nothing of the kind is there; it is a model of another kind, which the
      message names; it is damaged; or it has no tokenizer, or another one.
  """
  with _opened(source, tokenizer) as found:
    return Pretrained(found.config, found.fusion, found.params(), found.processor)


def read_without_weights(
  source: str | os.PathLike, tokenizer: str = ""
) -> tuple[Config, FusionSettings, Processor]:
  """What `read_model` gives but for the parameters, which are mostly not even read."""
  with _opened(source, tokenizer) as found:
    return found.config, found.fusion, found.processor


class _Opened(NamedTuple):
  config: Config
  fusion: FusionSettings
  processor: Processor
  params: Callable[[], dict[str, Any]]  # as long as the context lasts


@contextlib.contextmanager
def _opened(source: str | os.PathLike, tokenizer: str) -> Iterator[_Opened]:
  path = Path(source).expanduser()
  file = path if path.is_file() else None
  if file is None or holds_vista(file):
    folder = local_folder(source) if file is None else file.parent
    if file is not None or is_vista(folder):
      yield _open_vista(folder, file, tokenizer)
      return
    file = open_clip_weights(folder)
    if file is None:
      yield _open_clip(folder, tokenizer)
      return
  with open_weights([file]) as tensors:
    found = find(file, tensors, is_torchscript(file), _described(file.parent))
    read = recognise(found).read(found)
    words = find_tokenizer(tokenizer) if tokenizer else _tokenizer_beside(file)
    words = fitting_tokenizer(words, read.config, file)
    yield _Opened(
      read.config, FusionSettings(), Processor(read.images, words), read.params
    )


def _open_clip(folder: Path, tokenizer: str) -> _Opened:
  _refuse_half(folder)
  config, fusion = clip_config(folder)
  words = fitting_tokenizer(own_tokenizer(folder, tokenizer), config, folder)
  processor = Processor(Processor.images_from_folder(folder), words)
  return _Opened(config, fusion, processor, lambda: read_clip(folder)[2])


def _open_vista(folder: Path, file: Path | None, tokenizer: str) -> _Opened:
  text_encoder_config(folder)  # what lacks is said in the order of what matters
  words = own_tokenizer(folder, tokenizer)
  images = Processor.images_from_folder(folder)
  config, params = read_vista(folder, file)
  processor = Processor(images, fitting_tokenizer(words, config, folder))
  return _Opened(
    config, FusionSettings(), with_size_of(processor, config), lambda: params
  )


def own_tokenizer(folder: Path, named: str = "") -> Tokenizer | EncoderTokenizer:
  """A folder's tokenizer; where it has none, the one that is named.

  Raises:
    UserError: both are there, and differ; or neither, or one that cannot be read.
  """
  if named and not has_tokenizer(folder):
    return find_tokenizer(named)
  own = read_tokenizer(folder)
  refuse_other_words(own, named, folder)
  return own


def refuse_other_words(
  own: Tokenizer | EncoderTokenizer, named: str, where: Any
) -> None:
  """Refuses a vocabulary that is named for a model that has another one.

  Raises:
    UserError: it is another one.
  """
  if named and not own.reads_like(find_tokenizer(named)):
    raise UserError(
      f"{named} holds another vocabulary than the one that {where} has of its own, which "
      "its model was trained with: leave config.tokenizer.path (in Python, tokenizer) "
      "empty."
    )


def fitting_tokenizer(
  words: Tokenizer | EncoderTokenizer, config: Config, where: Any
) -> Tokenizer | EncoderTokenizer:
  """The tokenizer for a model of this shape, cut to the texts that it can read.

  Raises:
    UserError: it is another model's. The text tower would pool where no text ends, or
      look up what its table has not: all of it silently wrong.
  """
  text, of_encoder = config.text, isinstance(config, VistaConfig)
  if isinstance(words, EncoderTokenizer) != of_encoder:
    wanted = "a text encoder's (BERT, XLM-RoBERTa)" if of_encoder else "a CLIP's"
    raise UserError(
      f"the tokenizer for {where} is of another kind: this model takes {wanted}."
    )
  pools_largest = not of_encoder and text.eos_id == _LARGEST_ID
  if words.vocab_size > text.vocab_size or (
    words.eos_id != text.eos_id and not pools_largest
  ):
    raise UserError(
      f"the tokenizer for {where} has {words.vocab_size} entries and its end token is "
      f"{words.eos_id}; the model's are {text.vocab_size} and {text.eos_id}: use the "
      "model's own vocabulary."
    )
  return words.cut_to(text.context) if words.max_length > text.context else words


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


def with_size_of(processor: Processor, config: Config) -> Processor:
  """A processor whose pictures are as large as the image tower wants them.

  A text encoder's folder has no settings for pictures, and a `.pth` brings none.
  """
  size = config.vision.image_size
  if processor.image.image_size == size:
    return processor
  image = dataclasses.replace(processor.image, shortest_edge=size, crop_size=size)
  return dataclasses.replace(processor, image=image)


def _refuse_half(folder: Path) -> None:
  if is_text_encoder(folder):
    kind = read_json(folder / CONFIG)["model_type"]
    raise UserError(
      f"{folder} holds a text encoder alone ({kind}), half of a VISTA: put a VISTA's .pth "
      f"there, or train one from it: config.init.pretrained={folder} with "
      "config.init.image_tower."
    )


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
    f"{file} has no tokenizer, and none lies beside it. Put CLIP's vocab.json and "
    f"merges.txt, or {_MERGES}, into {folder}; or name a folder or hub id that has them: "
    "--config.tokenizer.path=openai/clip-vit-base-patch32 of a training, or in Python "
    "load(..., tokenizer=...)."
  )


def _described(folder: Path) -> dict[str, Any]:
  path = folder / DESCRIPTION
  return read_json(path) if path.is_file() else {}
