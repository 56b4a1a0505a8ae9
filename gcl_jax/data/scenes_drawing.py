"""Draws a scene. All that its captions do not say is left to the generator.

Where a group stands within its quarter, its exact size and tint, how two shapes stand
together, their tilt, the background's tone, texture and light, and the noise: drawn
afresh for each view.
"""

from __future__ import annotations

import math
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from gcl_jax.data.scenes_grammar import Group, Scene

COLOUR_RGB = {
  "red": (208, 32, 38),
  "yellow": (236, 212, 40),
  "green": (36, 152, 52),
  "cyan": (48, 208, 216),
  "blue": (34, 62, 205),
  "pink": (244, 92, 196),
}
_DIAMETER = {"small": 0.14, "large": 0.21}  # of the picture's width; ± 5 %
_TINT = 16  # largest change of a colour channel
_NOISE = 9  # largest change of a pixel by noise
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


# Outlines about the origin, y downwards, one diameter across.
_W = 0.16  # half the width of a cross's arm
_OUTLINES = {
  "circle": [_disc(0.5)],
  "square": [[(-0.43, -0.43), (0.43, -0.43), (0.43, 0.43), (-0.43, 0.43)]],
  "triangle": [[(0, -0.52), (0.52, 0.42), (-0.52, 0.42)]],
  "cross": [
    [(-_W, -0.5), (_W, -0.5), (_W, 0.5), (-_W, 0.5)],
    [(-0.5, -_W), (0.5, -_W), (0.5, _W), (-0.5, _W)],
  ],
  "ring": [_disc(0.5)],
  "star": [_star(5, 0.23)],
}
_HOLE = _disc(0.27)  # the ring's


def draw_scene(scene: Scene, image_size: int, rng: Random) -> Image.Image:
  """`scene` as an RGB picture, `image_size` pixels square; `rng` draws the rest."""
  image = Image.fromarray(_background(image_size, rng))
  for group, (column, row) in zip(
    (scene.first, scene.second), _quarters(scene.place), strict=True
  ):
    _draw_group(image, group, 0.5 * column, 0.5 * row, rng)
  pixels = np.asarray(image).astype(np.int16)
  noise = np.frombuffer(rng.randbytes(pixels.size), np.int8).reshape(pixels.shape)
  pixels += (noise.astype(np.int16) * _NOISE) >> 7
  return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _quarters(place: str) -> tuple[tuple[int, int], tuple[int, int]]:
  """(column, row) of the quarter of the picture that holds each group."""
  return {
    "top": ((0, 0), (1, 0)),
    "bottom": ((0, 1), (1, 1)),
    "left": ((0, 0), (0, 1)),
    "right": ((1, 0), (1, 1)),
  }[place]


def _background(size: int, rng: Random) -> np.ndarray:
  """(size, size, 3) uint8: a greyish tone with one of five textures."""
  tone = rng.uniform(50, 205)
  base = np.array([tone + rng.uniform(-14, 14) for _ in range(3)], np.float32)
  strength = rng.uniform(8, 26)
  angle = rng.uniform(0, 2 * math.pi)
  steps = np.linspace(-0.5, 0.5, size, dtype=np.float32)
  along = math.cos(angle) * steps + math.sin(angle) * steps[:, None]
  kind = int(rng.random() * 5)
  if kind == 0:  # light from one side
    field = 1.4 * along
  elif kind == 1:  # stripes
    field = np.sin(rng.uniform(15, 60) * along + rng.uniform(0, 6))
  elif kind == 2:  # tiles
    waves = np.sin(rng.uniform(12, 40) * steps + rng.uniform(0, 6))
    field = np.sign(waves * waves[:, None])
  elif kind == 3:  # patches
    coarse = int(rng.uniform(4, 11))
    values = np.frombuffer(rng.randbytes(coarse * coarse), np.uint8)
    patches = Image.fromarray(values.reshape(coarse, coarse))
    field = np.asarray(patches.resize((size, size), Image.Resampling.BILINEAR))
    field = field / np.float32(100) - np.float32(1.3)
  else:
    field = np.zeros((size, size), np.float32)
  pixels = base + strength * field[..., None]
  return np.clip(pixels, 0, 255).astype(np.uint8)


def _draw_group(
  image: Image.Image, group: Group, left: float, top: float, rng: Random
) -> None:
  """Draws one group within the quarter whose corner is (left, top), in widths."""
  size = image.width
  diameter = _DIAMETER[group.size] * rng.uniform(0.95, 1.05)
  colour = tuple(
    min(255, max(0, round(channel + rng.uniform(-_TINT, _TINT))))
    for channel in COLOUR_RGB[group.colour]
  )
  across = down = 0.0  # from the first shape's centre to the last one's
  if group.count == 2:
    apart = diameter + rng.uniform(0.02, 0.035)
    other = rng.uniform(-0.5, 0.5) * diameter
    across, down = (apart, other) if rng.random() < 0.5 else (other, apart)
  x = left + _fit(diameter, across, rng)
  y = top + _fit(diameter, down, rng)
  for k in range(group.count):
    centre = ((x + k * across) * size, (y + k * down) * size)
    _draw_shape(image, group.shape, centre, diameter * size, colour, rng)


def _fit(diameter: float, offset: float, rng: Random) -> float:
  """A centre such that it, and centre + offset, keep a shape inside [0, 0.5]."""
  margin = diameter / 2 + 0.01
  return rng.uniform(margin + max(0.0, -offset), 0.5 - margin - max(0.0, offset))


def _draw_shape(image, shape, centre, diameter, colour, rng: Random) -> None:
  side = math.ceil(1.2 * diameter) + 2
  x, y = math.floor(centre[0] - side / 2), math.floor(centre[1] - side / 2)
  scale = _SUPERSAMPLING
  tilt = rng.uniform(-0.16, 0.16)
  cos, sin = math.cos(tilt) * diameter * scale, math.sin(tilt) * diameter * scale
  # ImageDraw counts pixel centres, hence the half.
  dx, dy = (centre[0] - x) * scale - 0.5, (centre[1] - y) * scale - 0.5

  def place(outline):
    return [(cos * u - sin * v + dx, sin * u + cos * v + dy) for u, v in outline]

  mask = Image.new("L", (side * scale, side * scale))
  canvas = ImageDraw.Draw(mask)
  for outline in _OUTLINES[shape]:
    canvas.polygon(place(outline), fill=255)
  if shape == "ring":
    canvas.polygon(place(_HOLE), fill=0)
  image.paste(colour, (x, y), mask.reduce(scale))
