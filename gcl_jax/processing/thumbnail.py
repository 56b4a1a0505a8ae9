"""A picture made small enough to stand inside a page or a JSON file."""

from __future__ import annotations

import base64
import io
import os

from PIL import Image

from gcl_jax.processing.decode import MAX_PIXELS, decode_image

SIDE = 128  # pixels of the longer side
_QUALITY = 75


def thumbnail(
  source: bytes | str | os.PathLike | Image.Image,
  *,
  side: int = SIDE,
  max_pixels: int = MAX_PIXELS,
) -> bytes:
  """The picture as a JPEG whose longer side is at most `side` pixels.

  Nothing but the pixels is kept of it: no EXIF, no name. A small picture stays small.

  Raises ImageError as `decode_image`, for more than `max_pixels` too.
  """
  image = decode_image(source, max_pixels=max_pixels).copy()
  image.info = {}  # a comment would travel with it
  image.thumbnail((side, side), Image.Resampling.LANCZOS)
  out = io.BytesIO()
  image.save(out, "JPEG", quality=_QUALITY, optimize=True)
  return out.getvalue()


def data_uri(jpeg: bytes) -> str:
  """A JPEG as the address of itself, for an <img> that needs no other file."""
  return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
