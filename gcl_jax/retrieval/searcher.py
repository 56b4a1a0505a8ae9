"""A query of a text, a picture or both, to the documents that an index holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from gcl_jax.errors import UserError
from gcl_jax.retrieval.store import Index
from gcl_jax.retrieval.store_format import MODALITIES

MOST_ANSWERS = 10_000  # of one query


class Hit(NamedTuple):
  """One answer; `rank` counts from 1, `row` is its place in the index."""

  rank: int
  score: float
  row: int
  id: str
  modality: str
  text: str | None
  image: str | None  # a path, where the picture is a file


class Embeds(Protocol):
  """What `Searcher` needs of an `Embedder`."""

  def embed(self, images: Sequence[Any], texts: Sequence[str | None]) -> np.ndarray: ...


class Searcher:
  """An index with the model that asks it."""

  def __init__(self, index: Index, embedder: Embeds, *, exact: bool = True):
    """Args:
    index: of `read_index`.
    embedder: the model that made the index; `index.check_model` tells.
    exact: False asks the approximate index beside it.
    """
    self.index, self._embedder, self._exact = index, embedder, exact

  @property
  def modalities(self) -> list[str]:
    """Those that the index holds documents of."""
    return _modalities(self.index)

  def ask(
    self,
    text: str = "",
    image: Image.Image | None = None,
    *,
    k: int = 10,
    modality: str | None = None,
  ) -> list[Hit]:
    """The k nearest documents, best first; fewer where the index holds fewer.

    Args:
      text, image: the query; with both it is fused.
      modality: finds only documents of it.

    Raises:
      UserError: an empty query, k below 1 or above 10,000, no documents of that modality.
    """
    text = text.strip()
    if not text and image is None:
      raise UserError("ask with a text, a picture, or both.")
    check_query(self.index, k, modality)
    query = self._embedder.embed([image], [text or None])
    found = self.index.search(query, k, modality=modality, exact=self._exact)
    rows = [int(row) for row in found.rows[0] if row >= 0]
    return [
      Hit(
        rank,
        float(score),
        row,
        document["id"],
        document["modality"],
        document["text"],
        document["image"],
      )
      for rank, (score, row, document) in enumerate(
        zip(found.scores[0], rows, self.index.documents(rows), strict=False), start=1
      )
    ]

  def warm_up(self) -> None:
    """Compiles what queries of either kind and of both need."""
    picture = Image.new("RGB", (32, 32))
    for text, image in (("a", None), ("", picture), ("a", picture)):
      self._embedder.embed([image], [text or None])


def check_query(index: Index, k: int, modality: str | None) -> None:
  """Raises UserError for a k out of range, or a modality that the index lacks."""
  if k < 1:
    raise UserError(f"k={k}: ask for at least one answer.")
  if k > MOST_ANSWERS:
    raise UserError(f"k={k}: ask for no more than {MOST_ANSWERS:,} answers.")
  if modality is not None and modality not in _modalities(index):
    raise UserError(
      f"the index holds no {modality} documents: it holds"
      f" {' and '.join(_modalities(index)) or 'nothing'}."
    )


def _modalities(index: Index) -> list[str]:
  counts = index.manifest["modalities"]
  return [name for name in MODALITIES if counts.get(name)]
