"""Crops and flips before the processor."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from gcl_jax.data.augment import make_augment


def gradient(width=60, height=40):
  """Red grows to the right, green downwards: a crop shows where it was."""
  x, y = np.meshgrid(np.arange(width) * 4, np.arange(height) * 4)
  return Image.fromarray(np.stack([x, y, x * 0], -1).astype(np.uint8))


def test_none_hands_on_what_it_gets():
  augment = make_augment("none", size=8, scale=(0.5, 1.0))
  assert augment(b"bytes", np.random.default_rng(0)) == b"bytes"


def test_the_generator_alone_decides():
  augment = make_augment("crop_flip", size=8, scale=(0.3, 0.9))
  picture = gradient()
  one, two, three = (
    np.asarray(augment(picture, np.random.default_rng(seed))) for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, two)
  assert (one != three).any()


def test_a_crop_keeps_the_part_of_the_area_it_should():
  augment = make_augment("crop", size=32, scale=(0.2, 0.6))
  parts, ratios = [], []
  for seed in range(300):
    cropped = np.asarray(augment(gradient(), np.random.default_rng(seed)), float) / 4
    assert cropped.shape == (32, 32, 3)
    # Between the centres of the outermost of 32 cells lie 31 of them.
    wide = (cropped[16, -1, 0] - cropped[16, 0, 0]) * 32 / 31
    high = (cropped[-1, 16, 1] - cropped[0, 16, 1]) * 32 / 31
    parts.append(wide * high / 2400)
    ratios.append(wide / high)
  assert 0.15 < min(parts) < 0.25 and 0.52 < max(parts) < 0.65
  assert 0.7 < min(ratios) < 0.85 and 1.2 < max(ratios) < 1.45


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (2000, 20)])
def test_extreme_shapes(size):
  augment = make_augment("crop_flip", size=8, scale=(0.1, 1.0))
  for seed in range(20):
    picture = augment(Image.new("RGB", size, "red"), np.random.default_rng(seed))
    assert picture.size == (8, 8)


def test_a_flip_mirrors_half_of_the_pictures():
  augment = make_augment("flip", size=8, scale=(1.0, 1.0))
  file = io.BytesIO()
  gradient().save(file, "PNG")
  plain = np.asarray(gradient())
  mirrored = 0
  for seed in range(200):
    out = np.asarray(augment(file.getvalue(), np.random.default_rng(seed)))
    flipped = bool((out != plain).any())
    np.testing.assert_array_equal(out, plain[:, ::-1] if flipped else plain)
    mirrored += flipped
  assert 70 < mirrored < 130
