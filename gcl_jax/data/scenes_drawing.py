"""Draws a scene. All that its captions do not say is left to the generator.

Where a shape stands within its quarter, its exact size, tint and tilt, where the dots
are in the other half, the background's tone, texture and light, and the noise: drawn
afresh for each view.
"""

from __future__ import annotations

import math
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from gcl_jax.data.scenes_grammar import Scene, Thing

# Channels keep 24 from either end, tint and noise take less: no byte overflows.
COLOUR_RGB = {
  "red": (208, 32, 38),
  "yellow": (228, 206, 40),
  "green": (36, 150, 52),
  "blue": (34, 58, 205),
  "pink": (228, 84, 190),
}
_DIAMETER = {"small": (0.17, 0.27), "large": (0.35, 0.47)}  # of the picture's width
_DOT = (0.05, 0.11)  # a dot's diameter
DOT_RGB = (244, 244, 244)
_TINT = 20  # largest change of a colour channel
_NOISE_BITS = 4  # of a pixel's channel: −8 ... 7
_SUPERSAMPLING = 4


def _star(points: int, inner: float) -> list[tuple[float, float]]:
  corners = []
  for k in range(2 * points):
    r = inner if k % 2 else 0.56
    angle = math.pi * (k / points - 0.5)
    corners.append((r * math.cos(angle), 0.03 + r * math.sin(angle)))
  return corners


def _disc(radius: float) -> list[tuple[float, float]]:
  angles = [2 * math.pi * k / 28 for k in range(28)]
  return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


# Outlines about the origin, y downwards, one diameter across: 255 paints, 0 cuts out.
_W = 0.16  # half the width of a cross's arm
_OUTLINES = {
  "circle": [(_disc(0.5), 255)],
  "square": [([(-0.43, -0.43), (0.43, -0.43), (0.43, 0.43), (-0.43, 0.43)], 255)],
  "triangle": [([(0, -0.52), (0.52, 0.42), (-0.52, 0.42)], 255)],
  "cross": [
    ([(-_W, -0.5), (_W, -0.5), (_W, 0.5), (-_W, 0.5)], 255),
    ([(-0.5, -_W), (0.5, -_W), (0.5, _W), (-0.5, _W)], 255),
  ],
  "ring": [(_disc(0.5), 255), (_disc(0.27), 0)],
  "star": [(_star(5, 0.23), 255)],
}


# (column, row) of the quarter that holds each thing.
_QUARTERS = {
  "top": ((0, 0), (1, 0)),
  "bottom": ((0, 1), (1, 1)),
  "left": ((0, 0), (0, 1)),
  "right": ((1, 0), (1, 1)),
}


def draw_scene(scene: Scene, image_size: int, rng: Random) -> Image.Image:
  """`scene` as an RGB picture, `image_size` pixels square; `rng` draws the rest."""
  image = Image.fromarray(_background(image_size, rng))
  half = image_size // 2
  quarters = _QUARTERS[scene.place]
  things = zip((scene.first, scene.second), quarters, strict=True)
  for thing, (column, row) in things:
    colour, mask = _draw_thing(thing, image_size, rng)
    image.paste(colour, (column * half, row * half), mask)
  _draw_dots(image, scene, rng)
  pixels = np.asarray(image)
  noise = np.frombuffer(rng.randbytes(pixels.size), np.int8) >> (8 - _NOISE_BITS)
  return Image.fromarray(pixels + noise.view(np.uint8).reshape(pixels.shape))


def _background(size: int, rng: Random) -> np.ndarray:
  """(size, size, 3) uint8: a greyish tone with one of five textures."""
  tone, strength = rng.uniform(90, 166), rng.uniform(3, 12)
  angle = rng.uniform(0, 2 * math.pi)
  steps = np.arange(size, dtype=np.float32) / np.float32(size) - np.float32(0.5)
  along = math.cos(angle) * steps + math.sin(angle) * steps[:, None]
  kind = int(rng.random() * 5)
  if kind == 0:  # light from one side
    field = 1.4 * along
  elif kind == 1:  # stripes
    field = np.sin(rng.uniform(15, 60) * along + rng.uniform(0, 6))
  elif kind == 2:  # tiles
    waves = np.sign(np.sin(rng.uniform(12, 40) * steps + rng.uniform(0, 6)))
    field = waves * waves[:, None]
  elif kind == 3:  # patches
    coarse = int(rng.uniform(4, 11))
    values = np.frombuffer(rng.randbytes(coarse * coarse), np.uint8)
    patches = Image.fromarray(values.reshape(coarse, coarse))
    patches = patches.resize((size, size), Image.Resampling.BILINEAR)
    field = np.asarray(patches) / np.float32(100) - np.float32(1.3)
  else:
    field = np.zeros((size, size), np.float32)
  grey = (tone + strength * field).astype(np.uint8)
  cast = [round(rng.uniform(0, 20)) for _ in range(3)]
  return grey[..., None] + np.array(cast, np.uint8)


def _draw_thing(thing: Thing, image_size: int, rng: Random):
  """The thing's colour, and its mask over a quarter of the picture."""
  diameter = rng.uniform(*_DIAMETER[thing.size])
  colour = tuple(
    round(channel + rng.uniform(-_TINT, _TINT)) for channel in COLOUR_RGB[thing.colour]
  )
  margin = diameter / 2 + 0.01
  x, y = rng.uniform(margin, 0.5 - margin), rng.uniform(margin, 0.5 - margin)
  fine = image_size * _SUPERSAMPLING  # mask pixels to a picture's width
  quarter = image_size // 2 * _SUPERSAMPLING
  mask = Image.new("L", (quarter, quarter))
  canvas = ImageDraw.Draw(mask)
  tilt = rng.uniform(-0.16, 0.16)
  cos, sin = math.cos(tilt) * diameter * fine, math.sin(tilt) * diameter * fine
  dx, dy = x * fine - 0.5, y * fine - 0.5  # ImageDraw counts from pixels' centres
  for outline, ink in _OUTLINES[thing.shape]:
    canvas.polygon(
      [(cos * u - sin * v + dx, sin * u + cos * v + dy) for u, v in outline], fill=ink
    )
  return colour, mask.reduce(_SUPERSAMPLING)


def _draw_dots(image: Image.Image, scene: Scene, rng: Random) -> None:
  """The dots, each in its own slot of the half without things."""
  size, radius = image.width, rng.uniform(*_DOT) / 2 * image.width
  canvas = ImageDraw.Draw(image)
  slots = [0, 1, 2, 3]
  rng.shuffle(slots)
  for slot in slots[: scene.dots]:
    along = (0.125 + 0.25 * slot + rng.uniform(-0.06, 0.06)) * size
    across = rng.uniform(0.08, 0.42) * size
    if scene.place in ("top", "left"):
      across += size / 2
    x, y = (along, across) if scene.side_by_side else (across, along)
    canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=DOT_RGB)
