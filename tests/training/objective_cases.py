"""A model of two products in the place of CLIP, and the real objective around it.

It compiles in a fraction of the towers' time, and what it embeds depends on every row's
pixels, tokens and kept patches.
"""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gcl_jax.fusion import score_fusion
from gcl_jax.processing import ImageProcessor
from gcl_jax.sharding import make_mesh
from gcl_jax.training.objective import make_objective

GRID, PATCH, WIDTH = 4, 2, 6
_SIZE = GRID * PATCH
_IMAGES = {
  "size": {"shortest_edge": _SIZE},
  "crop_size": {"height": _SIZE, "width": _SIZE},
}


class Towers:
  """What the objective asks of a bound model."""

  def __init__(self, params: Any):
    self.params = params

  def embed_pair(self, pixels, tokens, *, has_image, has_text, kept_patches=None):
    """The mean of tanh'd patches, and of word vectors."""
    rows = pixels.reshape(-1, GRID, PATCH, GRID, PATCH * 3).transpose(0, 1, 3, 2, 4)
    rows = rows.reshape(-1, GRID**2, 3 * PATCH**2)
    if kept_patches is not None:
      rows = jnp.take_along_axis(rows, kept_patches[:, :, None], axis=1)
    image = jnp.tanh(rows @ self.params["vision"]["patch_embedding"]["kernel"]).mean(
      axis=1
    )
    text = self.params["text"]["token_embedding"]["embedding"][tokens].mean(axis=1)
    return score_fusion(image, text, has_image=has_image, has_text=has_text)


class Model:
  """What the objective asks of a model."""

  config = types.SimpleNamespace(vision=types.SimpleNamespace(grid=GRID))

  def bind(self, params: Any) -> Towers:
    return Towers(params)


def params() -> dict[str, Any]:
  """First parameters."""
  rng = np.random.default_rng(1)
  patches = rng.standard_normal((3 * PATCH**2, WIDTH), np.float32)
  words = rng.standard_normal((50, WIDTH), np.float32)
  return {
    "vision": {"patch_embedding": {"kernel": patches}},
    "text": {"token_embedding": {"embedding": words}},
    "logit_scale": np.float32(2.0),
  }


def batch(rows: int) -> dict[str, np.ndarray]:
  """What the step is given of a batch; some rows lack an image, some a text."""
  rng = np.random.default_rng(0)
  return {
    "pixels": rng.integers(0, 256, (rows, _SIZE, _SIZE, 3)).astype(np.uint8),
    "tokens": rng.integers(0, 50, (rows, 8)).astype(np.int32),
    "has_image": np.arange(rows) % 9 != 5,
    "has_text": np.arange(rows) % 7 != 3,
    "pair_ids": np.stack([np.arange(rows), np.arange(rows) // 2], 1).astype(np.int32),
    "place": np.arange(rows, dtype=np.int32),
  }


def objective(config: Any, devices: int) -> tuple[Any, Any]:
  """The objective and its mesh of so many devices."""
  mesh = make_mesh(devices=jax.devices()[:devices])
  images = ImageProcessor.from_dict(_IMAGES)
  return make_objective(Model(), images, config, mesh), mesh


def assert_near(got: Any, want: Any) -> None:
  """Every gradient within 1e-5 of its largest number."""
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    gap = np.abs(np.asarray(ours) - np.asarray(theirs)).max()
    assert gap <= 1e-5 * np.abs(theirs).max()
