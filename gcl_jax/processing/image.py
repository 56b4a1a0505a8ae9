"""CLIP's image processing: short side to S, centre crop, mean and standard deviation.

Equal to transformers' `CLIPImageProcessor` (PIL backend) given the same RGB picture:
bit for bit up to the crop, within 1e-6 after normalising.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from gcl_jax.errors import UserError
from gcl_jax.processing.decode import decode_image

if TYPE_CHECKING:
  import jax

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Where the resized picture is this many times longer than wide, only the strip that
# the crop keeps is computed: a 1 x 1000 picture would otherwise become 224 x 224,000.
_EXTREME = 4
_BITS = 22  # of fixed-point precision in Pillow's resampling of 8-bit channels


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
  """What a Hugging Face `preprocessor_config.json` says, and how to do it.

  Attributes:
    shortest_edge: the short side after resizing, in pixels.
    crop_size: the side of the square centre crop (black border where it is larger).
    mean, std: per channel, of values in 0..1.
    resample: Pillow's number of the filter: 1 Lanczos, 2 bilinear, 3 bicubic.
    keep_aspect: False resizes both sides to `shortest_edge`.
    round_crop: where the centre crop begins if the excess is odd: torchvision rounds
      half of it to even, transformers down. One pixel, in every fourth size.
  """

  shortest_edge: int = 224
  crop_size: int = 224
  mean: tuple[float, float, float] = CLIP_MEAN
  std: tuple[float, float, float] = CLIP_STD
  resample: int = 3
  keep_aspect: bool = True
  round_crop: bool = False

  @property
  def image_size(self) -> int:
    """S, the side of the square that a model gets, in pixels."""
    return self.crop_size

  def pixels(self, source: bytes | str | os.PathLike | Image.Image) -> np.ndarray:
    """Decoded, resized and cropped: uint8 (S, S, 3). Raises `ImageError`."""
    image = decode_image(source)
    width, height = self.resized(image.size)
    if max(width, height) > _EXTREME * max(self.crop_size, min(width, height)):
      return self._strip(image, (width, height))
    if image.size != (width, height):
      image = image.resize((width, height), Image.Resampling(self.resample))
    return self._center_crop(np.asarray(image))

  def normalize(self, pixels: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """((x / 255) - mean) / std in float32, channels last; any leading shape.

    A JAX array in gives a JAX array out (usable inside `jax.jit`), else NumPy.
    """
    if isinstance(pixels, np.ndarray):
      xp = np
    else:
      import jax.numpy as xp
    mean, std = xp.asarray(self.mean, xp.float32), xp.asarray(self.std, xp.float32)
    return (pixels.astype(xp.float32) / xp.float32(255) - mean) / std

  @classmethod
  def from_dict(cls, settings: Mapping[str, Any], where: str = "") -> ImageProcessor:
    """Reads a `preprocessor_config.json`, a `processor_config.json`, old or new.

    Sizes may be numbers (old files) or dicts; absent keys mean CLIP's defaults.

    Args:
      settings: the JSON object; a nested `image_processor` is taken where there is one.
      where: named in the error message.

    Raises:
      UserError: settings that would not give a square of normalised bicubic pixels.
    """
    nested = settings.get("image_processor")
    d = nested if isinstance(nested, Mapping) else settings

    def refuse(what: str):
      raise UserError(
        f"image processor settings{f' in {where}' if where else ''}: {what}. Use the "
        "preprocessor_config.json of a CLIP model."
      )

    for key in ("do_resize", "do_rescale"):
      if d.get(key, True) is False:
        refuse(f"{key} is false, which is not supported")
    factor = d.get("rescale_factor", 1 / 255)
    if not math.isclose(factor or 0, 1 / 255, rel_tol=1e-6):
      refuse(f"rescale_factor is {factor}; only 1/255 is supported")
    resample = d.get("resample", 3)
    if resample not in _FILTERS:
      refuse(f"resample is {resample}; supported are {sorted(_FILTERS)}")
    try:
      edge, keep_aspect = _edge(d.get("size", 224))
      crop = edge
      if d.get("do_center_crop", True) is not False:
        crop = _square(d.get("crop_size", 224))
      elif keep_aspect:
        refuse("without a centre crop pictures would not be square")
      if min(edge, crop) < 1:
        raise ValueError(f"sizes {edge} and {crop}")
      mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
      if d.get("do_normalize", True) is not False:
        mean = _three(d.get("image_mean", CLIP_MEAN))
        std = _three(d.get("image_std", CLIP_STD))
      if min(std) <= 0:
        raise ValueError(f"image_std {std}")
    except (KeyError, TypeError, ValueError) as error:
      refuse(f"not understood: {error}")
    rounds = d.get("round_crop", False) is True  # ours: transformers has no word for it
    return cls(edge, crop, mean, std, int(resample), keep_aspect, rounds)

  def to_dict(self) -> dict[str, Any]:
    """The layout of a `preprocessor_config.json`, for `CLIPImageProcessor`."""
    edge, crop = self.shortest_edge, self.crop_size
    return {
      "image_processor_type": "CLIPImageProcessor",
      "do_convert_rgb": True,
      "do_resize": True,
      "size": {"shortest_edge": edge}
      if self.keep_aspect
      else {"height": edge, "width": edge},
      "resample": self.resample,
      "do_center_crop": True,
      "crop_size": {"height": crop, "width": crop},
      "do_rescale": True,
      "rescale_factor": 1 / 255,
      "do_normalize": True,
      "image_mean": list(self.mean),
      "image_std": list(self.std),
      **({"round_crop": True} if self.round_crop else {}),
    }

  def resized(self, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) before the crop, of a picture of this (width, height)."""
    edge = self.shortest_edge
    if not self.keep_aspect:
      return edge, edge
    width, height = size
    # The product first, then a float division, truncated: transformers' rounding.
    if width <= height:
      return edge, int(edge * height / width)
    return int(edge * width / height), edge

  def _first(self, length: int, kept: int) -> int:
    """Where the middle `kept` pixels of so many begin."""
    return round((length - kept) / 2) if self.round_crop else (length - kept) // 2

  def _center_crop(self, pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) to a contiguous (S, S, 3), black where there is nothing."""
    size = self.crop_size
    out = np.zeros((size, size, 3), np.uint8)
    source, target = [], []
    for length in pixels.shape[:2]:
      start = self._first(length, size)  # below zero: -start black pixels come first
      source.append(slice(max(start, 0), max(start, 0) + size))
      target.append(slice(max(-start, 0), max(-start, 0) + min(length, size)))
    out[tuple(target)] = pixels[tuple(source)]
    return out

  def _strip(self, image: Image.Image, resized: tuple[int, int]) -> np.ndarray:
    """`pixels` of a long picture, computing only what the crop keeps of the long side.

    Pillow resamples one axis, rounds to 8 bits, then the other; each line by itself. So
    the long axis can be done here for the kept positions alone (`resize(box=...)`
    would round the box to float32 and miss by a grey level now and then), and Pillow
    does the short axis, in the order in which it would have.
    """
    axis = 0 if image.width > image.height else 1
    keep = min(self.crop_size, resized[axis])
    first = self._first(resized[axis], keep)
    starts, weights = _taps(
      image.size[axis], resized[axis], range(first, first + keep), self.resample
    )
    low, high = (
      min(starts),
      max(s + len(w) for s, w in zip(starts, weights, strict=True)),
    )
    box = (low, 0, high, image.height) if axis == 0 else (0, low, image.width, high)
    part = image.crop(box)
    shrinks = resized[axis] < image.size[axis]
    long_side_first = axis == 0 or (shrinks and _tall_shrinks_down_first())
    for along_long_side in (long_side_first, not long_side_first):
      if along_long_side:
        lines = np.asarray(part) if axis == 0 else np.asarray(part).swapaxes(0, 1)
        lines = _resample_columns(lines, [s - low for s in starts], weights)
        part = Image.fromarray(lines if axis == 0 else lines.swapaxes(0, 1).copy())
      else:
        short = (part.width, resized[1]) if axis == 0 else (resized[0], part.height)
        part = part.resize(short, Image.Resampling(self.resample))
    return self._center_crop(np.asarray(part))


@functools.cache
def _tall_shrinks_down_first() -> bool:
  """Whether this Pillow resamples a tall picture that gets smaller along y first.

  Pillow 13 does, earlier ones always went along x first. The rounding in between shows
  it, so a picture of noise tells.
  """
  values = np.random.default_rng(0).integers(0, 256, (900, 10, 3), np.uint8)
  image, bicubic = Image.fromarray(values), Image.Resampling.BICUBIC
  across_first = image.resize((8, 900), bicubic).resize((8, 720), bicubic)
  whole = image.resize((8, 720), bicubic)
  return not np.array_equal(np.asarray(whole), np.asarray(across_first))


def _bilinear(x: float) -> float:
  return max(1.0 - abs(x), 0.0)


def _bicubic(x: float) -> float:
  a, x = -0.5, abs(x)
  if x < 1.0:
    return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
  return (((x - 5.0) * x + 8.0) * x - 4.0) * a if x < 2.0 else 0.0


def _lanczos(x: float) -> float:
  def sinc(t: float) -> float:
    return 1.0 if t == 0.0 else math.sin(t * math.pi) / (t * math.pi)

  return sinc(x) * sinc(x / 3) if -3.0 <= x < 3.0 else 0.0


# Pillow's number of the filter: the filter and its reach.
_FILTERS: dict[int, tuple[Callable[[float], float], float]] = {
  1: (_lanczos, 3.0),
  2: (_bilinear, 1.0),
  3: (_bicubic, 2.0),
}


def _taps(
  length: int, resized: int, positions: range, resample: int
) -> tuple[list[int], list[np.ndarray]]:
  """For each output position its first input position and its integer weights.

  The arithmetic of `precompute_coeffs` and `normalize_coeffs_8bpc` in Pillow's
  Resample.c, operation by operation.
  """
  kernel, reach = _FILTERS[resample]
  scale = float(np.float32(length)) / resized
  stretch = max(scale, 1.0)
  support, inverse = reach * stretch, 1.0 / stretch
  starts, weights = [], []
  for position in positions:
    center = (position + 0.5) * scale
    start = max(int(center - support + 0.5), 0)
    stop = min(int(center + support + 0.5), length)
    raw = [kernel((x - center + 0.5) * inverse) for x in range(start, stop)]
    total = 0.0
    for value in raw:  # in order, as C does: `sum` compensates from Python 3.12 on
      total += value
    fixed = [value / total * (1 << _BITS) for value in raw]
    starts.append(start)
    weights.append(np.array([int(v - 0.5 if v < 0 else v + 0.5) for v in fixed]))
  return starts, weights


def _resample_columns(
  pixels: np.ndarray, starts: list[int], weights: list[np.ndarray]
) -> np.ndarray:
  """uint8 (H, W, 3) to uint8 (H, len(starts), 3), as Pillow's 8-bit passes do it."""
  out = np.empty((pixels.shape[0], len(starts), 3), np.uint8)
  for k, (start, weight) in enumerate(zip(starts, weights, strict=True)):
    window = pixels[:, start : start + len(weight)].astype(np.int64)
    total = np.tensordot(window, weight, axes=(1, 0)) + (1 << (_BITS - 1))
    out[:, k] = np.clip(total >> _BITS, 0, 255)
  return out


def _edge(size: Any) -> tuple[int, bool]:
  """(shortest edge, aspect kept) from any of the layouts of `size`."""
  if isinstance(size, Mapping) and "shortest_edge" in size:
    if size.get("longest_edge"):
      raise ValueError(f"size {dict(size)} limits the longer edge")
    return int(size["shortest_edge"]), True
  if isinstance(size, (int, float)):
    return int(size), True
  return _square(size), False


def _square(size: Any) -> int:
  if isinstance(size, (int, float)):
    return int(size)
  if isinstance(size, Mapping):
    size = (size["height"], size["width"])
  height, width = size
  if height != width:
    raise ValueError(f"{height} x {width} is not square")
  return int(height)


def _three(values: Any) -> tuple[float, float, float]:
  if isinstance(values, (int, float)):
    values = (values,) * 3
  red, green, blue = values
  return float(red), float(green), float(blue)
