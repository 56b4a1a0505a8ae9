"""From a file, bytes or a PIL image to RGB, the same way everywhere in the project.

Pictures come from strangers: the format goes by content, only formats of photographs
are opened (none that starts another program, as EPS does), and the number of pixels is
checked in the header, before anything is decoded.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

# 89 megapixels, the size at which Pillow warns: 268 MB as RGB.
MAX_PIXELS = 1024**3 // 4 // 3

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
  """A picture that cannot be read. The text names it and says why."""


def decode_image(
  source: bytes | str | os.PathLike | Image.Image, *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
  """The picture as RGB, 8 bits a channel.

  Files and bytes are turned upright by their EXIF orientation, PIL images are taken as
  they are (as transformers does). Transparency is composited on white (transformers 5).
  Of an animation the first frame. 16-bit grey is divided by 257; float pictures within
  0..1 are multiplied by 255, within 0..255 rounded; other ranges are refused.

  Args:
    source: encoded bytes, a path, or a PIL image (returned itself if already RGB).
    max_pixels: larger pictures are refused from their header. Pillow's own refusal at
      twice `MAX_PIXELS` holds whatever this is.

  Raises:
    ImageError: anything that cannot be read whole: missing, truncated, corrupt, not a
      picture, too large, or of a format that is not a photograph's.
  """
  name = _name(source)
  try:
    if isinstance(source, Image.Image):
      return _to_rgb(_loaded(source, max_pixels))
    if isinstance(source, (bytes, bytearray, memoryview)):
      return _decode(io.BytesIO(source), max_pixels)
    with open(source, "rb") as file:
      return _decode(file, max_pixels)
  except ImageError as error:
    raise ImageError(f"{name}: {error}") from None
  except FileNotFoundError:
    raise ImageError(f"{name}: no such file") from None
  except Exception as error:
    # Pillow's readers raise nearly anything on broken input: OSError, SyntaxError,
    # struct.error, zlib.error, DecompressionBombError.
    raise ImageError(f"{name}: {_reason(error)}") from error


def _decode(file: io.BufferedIOBase, max_pixels: int) -> Image.Image:
  formats = _FORMATS + (("HEIF",) if "HEIF" in Image.OPEN else ())  # pillow-heif
  with Image.open(file, formats=formats) as opened:
    image = _loaded(opened, max_pixels)
    # After the pixels: PNG may store its EXIF behind them, and Pillow turns TIFFs
    # itself and then removes the tag.
    turn = _UPRIGHT.get(_orientation(image))
    rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _loaded(image: Image.Image, max_pixels: int) -> Image.Image:
  width, height = image.size
  if width * height > max_pixels:
    raise ImageError(
      f"{width} x {height} pixels are more than the limit of {max_pixels}"
    )
  if width * height == 0:
    raise ImageError(f"{width} x {height}: no pixels")
  image.load()
  return image


def _orientation(image: Image.Image) -> int | None:
  try:
    return image.getexif().get(_ORIENTATION)
  except Exception:
    return None  # a broken EXIF block does not make the picture unreadable


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode in ("I", "F") or image.mode.startswith("I;16"):
    image = _eight_bit_grey(image)
  if "A" in image.getbands() or image.info.get("transparency") is not None:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(white, image)
  return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bit_grey(image: Image.Image) -> Image.Image:
  """Mode I;16, I or F scaled to L, or LA where one grey value means transparent."""
  values = np.asarray(image)
  low, high = values.min(), values.max()
  if not np.isfinite(low) or not np.isfinite(high):
    raise ImageError("grey values that are not finite")
  # PNG and PNM files of 16 bits may open as 32-bit integers; a picture of mode I from
  # elsewhere may hold plain 8-bit values.
  sixteen = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
  if low < 0 or high > 65535 or (image.mode == "F" and high > 255):
    raise ImageError(f"grey values from {low} to {high}: which is white is not known")
  if image.mode == "F":
    grey = np.rint(values * 255) if high <= 1 else np.rint(values)
  elif sixteen or high > 255:
    grey = (values.astype(np.int64) + 128) // 257
  else:
    grey = values
  scaled = Image.fromarray(grey.astype(np.uint8))
  key = image.info.get("transparency")
  if key is not None:
    opaque = np.where(values == key, 0, 255).astype(np.uint8)
    scaled = Image.merge("LA", (scaled, Image.fromarray(opaque)))
  return scaled


def _name(source: object) -> str:
  if isinstance(source, (str, os.PathLike)):
    return str(Path(source))
  if isinstance(source, (bytes, bytearray, memoryview)):
    return f"image bytes ({len(source)})"
  return f"image ({type(source).__name__})"


def _reason(error: Exception) -> str:
  if isinstance(error, Image.UnidentifiedImageError):
    return "not a picture in a known format"
  return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
