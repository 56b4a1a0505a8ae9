"""A small index with pictures on disk, and an embedder that knows them."""

import numpy as np
from PIL import Image

from gcl_jax.retrieval import read_index
from gcl_jax.retrieval.searcher import Searcher
from gcl_jax.retrieval.store_format import Document
from gcl_jax.retrieval.store_writer import IndexWriter

THINGS = 4
WIDTH = 8
STRANGE = "<img src=x onerror=alert(1)> [red]it[/red]\x1b[31m\x07"


def picture(k):
  return Image.new("RGB", (40, 30), (60 * k, 255 - 60 * k, 0))


class Embedder:
  """Thing k points to axis k, and a little to its modality's."""

  def embed(self, images, texts):
    rows = np.zeros((len(images), WIDTH), np.float32)
    for row, image, text in zip(rows, images, texts, strict=True):
      if image is not None:
        row[round(image.convert("RGB").getpixel((0, 0))[0] / 60)] += 1
        row[THINGS] += 0.5
      if text is not None:
        for k in range(THINGS):
          row[k] += f"thing {k}" in text
        row[THINGS + 1] += 0.5
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_index(folder, *, strange=False, modalities=(0, 1, 2), about=None, model=None):
  """Thing by thing as image, text and fused document: row 3 k + modality."""
  pictures = folder.parent / "pictures"
  pictures.mkdir(exist_ok=True)
  documents, rows = [], []
  for k in range(THINGS):
    file = pictures / f"{k}.png"
    picture(k).save(file)
    text = f"thing {k}" + (STRANGE if strange else "")
    for m in modalities:
      documents.append(
        Document(
          f"id {k}" + (STRANGE if strange else ""),
          m,
          None if m == 0 else text,
          None if m == 1 else str(file),
          k,
          -1 if m == 1 else 0,
        )
      )
      given = ([None if m == 1 else picture(k)], [None if m == 0 else text])
      rows.append(Embedder().embed(*given)[0])
  if model is not None:
    rows = np.random.default_rng(0).normal(size=(len(documents), model["dimension"]))
  settings = {
    "dtype": "float32",
    "dimension": len(rows[0]),
    "model": model or {},
    "data": {},
    "split": "all",
  }
  writer = IndexWriter(folder, settings, 1, about=about or {"checkpoint": "runs/fake"})
  writer.write(0, np.asarray(rows, np.float32), documents, [])
  writer.finish()
  return folder


def searcher(folder, **more):
  return Searcher(read_index(write_index(folder, **more)), Embedder())
