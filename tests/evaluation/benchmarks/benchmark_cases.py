"""Benchmark folders that are small enough to score by hand, and an embedder for them."""

import dataclasses
import hashlib
import json

import numpy as np
from PIL import Image

from gcl_jax.evaluation.benchmarks import evaluate_benchmark
from gcl_jax.evaluation.benchmarks.pictures import FolderPictures

WIDTH = 8


def vector(name, width=WIDTH):
  """(width,) the same numbers for the same name everywhere; not of length 1."""
  seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
  return np.random.default_rng(seed).normal(size=width)


class NamedPictures:
  """Every picture is there, and is its own name."""

  chunk = 1000

  def missing(self, references):
    return np.zeros(len(references), bool)

  def load(self, references):
    return list(references)


class Embedder:
  """Images and texts to `image(name)` and `text(words)`, by default pseudo-random.

  Keeps what it was asked, and refuses what `gcl_jax.retrieval.Embedder` refuses.
  """

  fuses_by_itself = False

  def __init__(self, image=None, text=None, width=WIDTH):
    self.image = image or (lambda name: vector(f"image {name}", width))
    self.text = text or (lambda words: 3 * vector(f"text {words}", width))
    self.asked = []

  def embed(self, images=None, texts=None, *, normalize=True, progress=None):
    images = [None] * len(texts) if images is None else images
    texts = [None] * len(images) if texts is None else texts
    rows = []
    for image, text in zip(images, texts, strict=True):
      assert image is not None or text is not None
      assert normalize or image is None or text is None
      self.asked.append((image, text))
      parts = [] if image is None else [np.asarray(self.image(image), float)]
      parts += [] if text is None else [np.asarray(self.text(text), float)]
      row = sum(parts)
      rows.append(row / max(np.linalg.norm(row), 1e-6) if normalize else row)
    return np.array(rows, np.float32)


def paint(path, colour=(200, 30, 30)):
  """A small picture; the folder is made."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (8, 8), colour).save(path)


def write_lines(path, entries):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def write_json(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def stem(path):
  """The name that an image path stands for."""
  return str(path).rpartition("/")[2].rpartition(".")[0] or str(path)


def evaluated(benchmark, embedder=None, *, names=True, **choices):
  """The result, with pictures that are their own names where `names`."""
  if names:
    benchmark = dataclasses.replace(benchmark, pictures=NamedPictures())
  return evaluate_benchmark(benchmark, embedder or Embedder(), **choices)


def folder_of(benchmark):
  assert isinstance(benchmark.pictures, FolderPictures)
  return benchmark.pictures._folder
