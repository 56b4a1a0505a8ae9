"""The six banks of an evaluation: documents and queries, as image, text and fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.evaluation.items import Items, Reference
from gcl_jax.evaluation.metrics import check_finite

MODALITIES = ("image", "text", "fused")  # index 0, 1, 2
CHUNK = 256  # items embedded in one call: their crops are in memory together

# images (bytes, path, PIL or None), texts (or None) -> (N, D) float32 unit rows
EmbedFn = Callable[[Sequence[Any], Sequence[str | None]], np.ndarray]


@dataclass(frozen=True)
class Banks:
  """Unit embeddings of N items by modality; rows that do not exist are zero.

  Attributes:
    documents, queries: (3, N, D) float32.
    has_document, has_query: (3, N) bool.
    bad_images: pictures that could not be read; what needs them does not exist.
  """

  documents: np.ndarray
  queries: np.ndarray
  has_document: np.ndarray
  has_query: np.ndarray
  bad_images: int


def embed_items(
  items: Items,
  embed: EmbedFn,
  *,
  chunk: int = CHUNK,
  progress: Callable[[int, int], None] | None = None,
) -> Banks:
  """Embeds every item's document and query once in each modality that it has.

  Args:
    embed: the retriever; see `EmbedFn`.
    chunk: items per call of `embed`.
    progress: called with (items done, items to do); an item counts as document and as
      query.

  Raises UserError where an embedding is not finite, ValueError where `embed` returns
  another shape than (N, D).
  """
  n = len(items)
  sides = (
    _Side(items, embed, "document"),
    _Side(items, embed, "query"),
  )
  for place, side in enumerate(sides):
    for start in range(0, n, chunk):
      side.embed_rows(range(start, min(n, start + chunk)))
      if progress is not None:
        progress(place * n + min(n, start + chunk), 2 * n)
  documents, queries = sides
  if documents.rows.shape[2] == 0:
    raise UserError(
      "nothing to evaluate: no picture can be read and no item has a text"
    )
  if queries.rows.shape[2] == 0:
    queries.rows = np.zeros_like(documents.rows)
  for side in sides:
    for m, modality in enumerate(MODALITIES):
      check_finite(side.rows[m][side.has[m]], f"{modality} {side.name}")
  return Banks(
    documents=documents.rows,
    queries=queries.rows,
    has_document=documents.has,
    has_query=queries.has,
    bad_images=len(documents.bad | queries.bad),
  )


class _Side:
  """The documents or the queries of all items, filled chunk by chunk.

  Attributes:
    rows: (3, N, D) float32, D = 0 until something was embedded.
    has: (3, N) bool.
    bad: the pictures that could not be read.
  """

  def __init__(self, items: Items, embed: EmbedFn, name: str):
    self.items, self.embed, self.name = items, embed, name
    self.rows = np.zeros((3, len(items), 0), np.float32)
    self.has = np.zeros((3, len(items)), bool)
    self.bad: set[Reference] = set()

  def embed_rows(self, chunk: Sequence[int]) -> None:
    """Embeds the items of one chunk as image, text and fused."""
    texts = {k: self._text(k) for k in chunk if self._text(k) is not None}
    pictures = self._load(chunk)
    try:
      self._embed(0, list(pictures), pictures, {})
    except (ValueError, OSError, UserError):
      readable = {k: p for k, p in pictures.items() if _is_readable(p)}
      if len(readable) == len(pictures):
        raise
      self.bad |= {self._reference(k) for k in pictures.keys() - readable.keys()}
      pictures = readable
      self._embed(0, list(pictures), pictures, {})
    self._embed(1, list(texts), {}, texts)
    self._embed(2, [k for k in pictures if self._is_fused(k)], pictures, texts)

  def _text(self, k: int) -> str | None:
    return getattr(self.items[k], f"{self.name}_caption")

  def _is_fused(self, k: int) -> bool:
    """Whether item k, which has a picture, is one of both. A lone caption is not asked
    with: it is the document's."""
    lone = self.name == "query" and self.items[k].one_caption
    return self._text(k) is not None and not lone

  def _reference(self, k: int) -> Reference:
    item = self.items[k]
    is_query = self.name == "query" and not item.is_cropped
    return item.query_picture if is_query else item.document_picture

  def _load(self, chunk: Sequence[int]) -> dict[int, Any]:
    load = getattr(self.items, f"{self.name}_picture")
    pictures = {}
    for k in chunk:
      if self.items[k].document_picture is None:
        continue
      try:
        pictures[k] = load(k)
      except (ValueError, OSError):
        self.bad.add(self._reference(k))
    return pictures

  def _embed(self, modality: int, chunk: list[int], pictures: dict, texts: dict):
    if not chunk:
      return
    rows = self.embed([pictures.get(k) for k in chunk], [texts.get(k) for k in chunk])
    rows = np.asarray(rows, np.float32)
    if not self.rows.shape[2] and rows.ndim == 2:
      self.rows = np.zeros((3, len(self.items), rows.shape[1]), np.float32)
    if rows.shape != (len(chunk), self.rows.shape[2]):
      raise ValueError(
        f"embed returned {rows.shape} for {len(chunk)} documents of width"
        f" {self.rows.shape[2]}"
      )
    self.rows[modality, chunk] = rows
    self.has[modality, chunk] = True


def _is_readable(picture: Any) -> bool:
  from gcl_jax.processing import decode_image

  try:
    decode_image(picture)
  except (ValueError, OSError):
    return False
  return True
