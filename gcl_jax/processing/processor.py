"""The image processor and the tokenizer of one model, and their files."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from gcl_jax.errors import UserError
from gcl_jax.processing.encoder_tokenizer import EncoderTokenizer, is_encoder_tokenizer
from gcl_jax.processing.image import ImageProcessor
from gcl_jax.processing.tokenizer import Tokenizer

VISTA_SIZE = 224  # pixels a side, of every VISTA that was published
_IMAGE_FILE = "preprocessor_config.json"
_NESTED_FILE = "processor_config.json"


@dataclasses.dataclass(frozen=True)
class Processor:
  """What turns pictures and texts into a model's inputs."""

  image: ImageProcessor
  tokenizer: Tokenizer | EncoderTokenizer

  @classmethod
  def from_folder(cls, folder: str | os.PathLike) -> Processor:
    """Reads a Hugging Face CLIP folder, as saved by transformers 4 or 5, or a VISTA's.

    A `processor_config.json` that holds the image processor wins over
    `preprocessor_config.json`, as in transformers. A text encoder's folder without
    either has VISTA's settings.

    Raises:
      UserError: names the file that is missing or not understood.
    """
    return cls(cls.images_from_folder(folder), read_tokenizer(folder))

  @staticmethod
  def images_from_folder(folder: str | os.PathLike) -> ImageProcessor:
    """The image processor of `from_folder`, by itself. UserError as there."""
    folder = Path(folder)
    if not folder.is_dir():
      raise UserError(f"no folder {folder}. Give the folder of a Hugging Face CLIP.")
    given = any((folder / name).is_file() for name in (_NESTED_FILE, _IMAGE_FILE))
    if not given and is_encoder_tokenizer(folder):
      return _vista_images(VISTA_SIZE)
    settings, where = _image_settings(folder)
    return ImageProcessor.from_dict(settings, str(where))

  def save(self, folder: str | os.PathLike) -> None:
    """Writes what `CLIPProcessor.from_pretrained` and `AutoProcessor` load.

    The image settings go to `preprocessor_config.json`, which every version of
    transformers reads; a `processor_config.json` that lies there already would win
    over it and is therefore rewritten to say the same.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings, name = self.image.to_dict(), self.tokenizer.processor_class
    of_class = {"processor_class": name} if name else {}
    _write(folder / _IMAGE_FILE, settings | of_class)
    if (folder / _NESTED_FILE).exists():
      _write(folder / _NESTED_FILE, {"image_processor": settings, **of_class})
    self.tokenizer.save(folder)


def read_tokenizer(folder: str | os.PathLike) -> Tokenizer | EncoderTokenizer:
  """A folder's tokenizer, of a CLIP or of a text encoder.

  Raises:
    UserError: files are missing or broken, or are of neither.
  """
  of_encoder = is_encoder_tokenizer(folder)
  return (EncoderTokenizer if of_encoder else Tokenizer).from_folder(folder)


def has_tokenizer(folder: str | os.PathLike) -> bool:
  """Whether a folder holds a tokenizer's files, of whatever kind."""
  return is_encoder_tokenizer(folder) or any(
    (Path(folder) / name).is_file() for name in ("tokenizer.json", "vocab.json")
  )


def default_clip_processor(image_size: int, tokenizer: Tokenizer) -> Processor:
  """CLIP's own settings (bicubic, its mean and standard deviation) at any size."""
  return Processor(
    ImageProcessor(shortest_edge=image_size, crop_size=image_size), tokenizer
  )


def default_vista_processor(
  image_size: int, tokenizer: Tokenizer | EncoderTokenizer
) -> Processor:
  """VISTA's settings: CLIP's numbers, and torchvision's way to find the centre."""
  return Processor(_vista_images(image_size), tokenizer)


def _vista_images(size: int) -> ImageProcessor:
  return ImageProcessor(shortest_edge=size, crop_size=size, round_crop=True)


def _image_settings(folder: Path) -> tuple[dict[str, Any], Path]:
  for name in (_NESTED_FILE, _IMAGE_FILE):
    path = folder / name
    if not path.is_file():
      continue
    try:
      settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
      raise UserError(f"{path} cannot be read: {error}. {_mend()}") from error
    if not isinstance(settings, dict):
      raise UserError(f"{path} does not hold a JSON object. {_mend()}")
    # Older processor_config.json files hold no image settings.
    if name == _IMAGE_FILE or "image_processor" in settings:
      return settings, path
  raise UserError(
    f"no image processor settings in {folder}: {_IMAGE_FILE} is missing. {_mend()}"
  )


def _mend() -> str:
  return (
    f"Copy {_IMAGE_FILE} from the original model there, or write it with "
    "CLIPImageProcessor.save_pretrained."
  )


def _write(path: Path, content: dict[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
