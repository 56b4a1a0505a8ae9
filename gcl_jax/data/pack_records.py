"""From a source's record to the bytes that are packed of it."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from gcl_jax.data.packed_format import encode_record
from gcl_jax.data.record import BadRecord, Record, Source
from gcl_jax.data.settings import DataSettings
from gcl_jax.data.splits import group_hash
from gcl_jax.errors import UserError
from gcl_jax.processing import ImageProcessor, decode_image

_MESSAGE = 300
_LOOSE = 4  # bytes a pixel beyond which a small picture's file is not kept as it is


@dataclasses.dataclass(frozen=True)
class Packing:
  """How records are packed; part of what a manifest is compared by.

  Attributes:
    shorter_side: pixels; larger pictures are reduced to it, no picture is enlarged.
    quality: of JPEG, 1 to 95.
    lossless: PNG in place of JPEG.
    shard_records: records of the source a shard.

  Raises UserError for values out of range.
  """

  shorter_side: int
  quality: int = 92
  lossless: bool = False
  shard_records: int = 8192

  def __post_init__(self):
    if self.shorter_side < 1:
      raise UserError(f"--size and --margin give pictures of {self.shorter_side} pixels")
    if not 1 <= self.quality <= 95:
      raise UserError(f"--quality={self.quality} is outside 1 to 95")
    if self.shard_records < 1:
      raise UserError(f"--shard_records={self.shard_records} must be at least 1")


def shorter_side(size: int, margin: float, settings: DataSettings) -> int:
  """Pixels of the shorter side to keep for a model that takes `size` x `size`.

  Args:
    size: of the model's pictures.
    margin: a factor on it; 0 is 1 where training does not crop at random, and where it
      does, as much as leaves the smallest square crop `size` pixels.
    settings: for `augment` and `crop_scale`.

  Raises:
    UserError: a size below 1 or a margin between 0 and 1.
  """
  if size < 1:
    raise UserError(
      "--size is missing: the side in pixels of the pictures that the model takes, such "
      "as 224"
    )
  if margin and margin < 1:
    raise UserError(f"--margin={margin:g} is below 1: pictures would be enlarged later")
  if not margin:
    margin = 1 / math.sqrt(settings.crop_scale[0]) if "crop" in settings.augment else 1
  return math.ceil(size * margin - 1e-9)


class Packed(NamedTuple):
  """What becomes of one record."""

  raw: bytes  # b"" where the record is left out
  group: int
  split: str
  errors: list[str]


def pack_record(source: Source, index: int, packing: Packing) -> Packed:
  """Reads, reduces and encodes one record. What cannot be read is in `errors`.

  A picture that cannot be read is left out, and with it a record that has no other.
  """
  name = f"record {index}"
  try:
    record = source[index]
    name = record["id"]
    images, errors = _pictures(record, name, packing)
    if not images and (errors or not len(record["texts"])):
      raise BadRecord("; ".join(errors) or "neither an image nor a text")
  except (ValueError, OSError) as error:  # as the pipeline: ImageError, BadRecord
    said = str(error)
    message = said if said.startswith(f"{name}: ") else f"{name}: {said}"
    return Packed(b"", 0, "", [message[:_MESSAGE]])
  group = record.get("group") or name
  raw = encode_record({**record, "group": group}, images)
  return Packed(raw, group_hash(group), record.get("split", ""), errors)


def _pictures(
  record: Record, name: str, packing: Packing
) -> tuple[list[bytes], list[str]]:
  images, errors = [], []
  for k in range(len(record["images"])):
    try:
      images.append(pack_picture(record["images"][k], packing))
    except (ValueError, OSError) as error:
      errors.append(f"{name}: {error}"[:_MESSAGE])
  return images, errors


def pack_picture(picture: Any, packing: Packing) -> bytes:
  """The encoded bytes to keep of a picture, no shorter side above `shorter_side`.

  A picture that is small enough keeps its own file, byte for byte; a larger one is
  reduced as the processor would reduce it (bicubic, the same rounding of the longer
  side), so that a processor of that size has nothing left to resize.

  Raises:
    ImageError, OSError: it cannot be read.
  """
  raw = picture
  if isinstance(picture, (str, os.PathLike)):
    image = decode_image(picture)  # names the file when it cannot be read
    raw = Path(picture).read_bytes()
  else:
    image = decode_image(picture)
  side = packing.shorter_side
  if min(image.size) <= side:
    width, height = image.size
    if isinstance(raw, bytes) and len(raw) <= _LOOSE * width * height + 65_536:
      return raw
    lossless = packing.lossless or isinstance(raw, bytes)
  else:
    resized = ImageProcessor(shortest_edge=side).resized(image.size)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    lossless = packing.lossless
  file = io.BytesIO()
  if lossless:
    image.save(file, "PNG")
  else:
    image.save(file, "JPEG", quality=packing.quality)
  return file.getvalue()
