"""Small sources and embedders whose answers are known."""

import re

import numpy as np
from PIL import Image


def picture(k, view=0):
  """A picture of one colour that says whose and which view it is."""
  return Image.new("RGB", (8, 6), (k % 256, k // 256, 10 * view))


def record(k, views=2, captions=2, **more):
  return {
    "id": f"item {k}",
    "images": [picture(k, v) for v in range(views)],
    "texts": [f"caption {v} of {k}" for v in range(captions)],
    **more,
  }


def records(n, views=2, captions=2):
  return [record(k, views, captions) for k in range(n)]


def whose(image, text):
  """The item and the modality of a document."""
  if image is not None:
    red, green, _ = image.convert("RGB").getpixel((0, 0))
    return red + 256 * green, 0 if text is None else 2
  return int(re.search(r"(\d+)$", text)[1]), 1


def embedder(row, width):
  """An embedder of `row(item, modality) -> (width,)`; counts its documents."""

  def embed(images, texts):
    embed.documents += len(images)
    rows = [row(*whose(i, t)) for i, t in zip(images, texts, strict=True)]
    rows = np.array(rows, np.float32).reshape(-1, width)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)

  embed.documents = 0
  return embed


def units(n, width, seed=0):
  """(n, width) float64 random unit rows."""
  rows = np.random.default_rng(seed).normal(size=(n, width))
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def perfect(n, width=32):
  base = units(n, width)
  return embedder(lambda k, m: base[k], width)


def segregated(n, width=32, offset=0.9):
  """Every modality in its own cone: cosine of two items of one modality >= 0.6."""
  base = units(n, width)
  base = np.concatenate([base[: n // 2], -base[: n - n // 2]])  # means are zero
  content = (1 - offset**2) ** 0.5

  def row(k, m):
    return np.concatenate([content * base[k], offset * np.eye(3)[m]])

  return embedder(row, width + 3), base
