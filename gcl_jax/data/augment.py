"""What training does to a picture before the processor resizes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from gcl_jax.data.settings import nearest
from gcl_jax.errors import UserError

NAMES = ("none", "crop", "flip", "crop_flip")
_RATIO = (3 / 4, 4 / 3)  # width / height of a crop: torchvision's RandomResizedCrop

Augment = Callable[[Any, np.random.Generator], Any]


def make_augment(name: str, *, size: int, scale: tuple[float, float]) -> Augment:
  """A function (picture, generator) -> picture; the generator alone decides.

  `none` hands on what it is given. `crop` draws a box of `scale` of the picture's area
  and of width : height between 3:4 and 4:3, and squeezes it to `size` x `size` pixels.
  `flip` mirrors every other picture, so that "left" and "right" in a caption lose
  their meaning.

  Raises:
    UserError: an unknown name, or a scale that is no range within (0, 1].
  """
  if name not in NAMES:
    raise UserError(
      f'config.data.augment "{name}" is none of {", ".join(NAMES)}'
      f"{nearest(name, NAMES)}"
    )
  if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
    raise UserError(
      f"config.data.crop_scale is {scale}; give two parts of the area, 0 < low <= high "
      "<= 1, such as (0.5, 1.0)"
    )
  if name == "none":
    return lambda image, rng: image
  crops, flips = "crop" in name, "flip" in name

  def augment(source: Any, rng: np.random.Generator) -> Image.Image:
    from gcl_jax.processing import decode_image

    image = decode_image(source)
    if crops:
      box = _box(image.size, scale, rng)
      image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if flips and rng.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image

  return augment


def _box(
  size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
  width, height = size
  area = width * height * rng.uniform(*scale)
  ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
  wide = min(width, max(1, round(math.sqrt(area * ratio))))
  high = min(height, max(1, round(math.sqrt(area / ratio))))
  left = int(rng.integers(width - wide + 1))
  top = int(rng.integers(height - high + 1))
  return left, top, left + wide, top + high
