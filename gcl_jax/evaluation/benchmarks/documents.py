"""Queries and candidates in columns, and which answer which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gcl_jax.errors import UserError

Column = pa.Array | pa.ChunkedArray


@dataclass(frozen=True, eq=False)
class Parts:
  """Documents that are weighted sums of several rows, as a video is of its frames.

  Attributes:
    offsets: (N + 1,) int64; document n is rows offsets[n] to offsets[n + 1].
    weights: (M,) float32, of each row.
  """

  offsets: np.ndarray
  weights: np.ndarray


@dataclass(frozen=True, eq=False)
class Documents:
  """N queries or candidates. Pools have millions: columns, not an object a row.

  Attributes:
    name: what messages and progress call them.
    ids: (N,) strings, distinct.
    images: (M,) what the benchmark's `Pictures` can load; null where there is none.
    texts: (M,), null where there is none.
    parts: how M rows make N documents; None: M = N, a row is a document.
  """

  name: str
  ids: Column
  images: Column
  texts: Column
  parts: Parts | None = None

  def __len__(self) -> int:
    return len(self.ids)


def documents(
  name: str,
  ids: Sequence[str] | Column,
  *,
  images: Sequence[str | None] | Column | None = None,
  texts: Sequence[str | None] | Column | None = None,
  parts: Parts | None = None,
) -> Documents:
  """Columns from lists; an empty string is no image and no text.

  Raises:
    UserError: an id is missing or there twice; the message names it.
  """
  ids = _column(ids)
  rows = len(ids) if parts is None else len(parts.weights)
  images, texts = (
    pa.nulls(rows, pa.large_string()) if x is None else _not_empty(_column(x))
    for x in (images, texts)
  )
  if len(images) != rows or len(texts) != rows:
    raise ValueError(f"{name}: {len(images)} images, {len(texts)} texts, {rows} rows")
  if ids.null_count:
    raise UserError(f"{name}: {ids.null_count} rows have no id: repair that file.")
  check_distinct(name, ids)
  return Documents(name, ids, images, texts, parts)


def check_distinct(name: str, ids: Column) -> None:
  """Raises UserError, naming the first, where ids are there more than once."""
  counted = pc.value_counts(ids)
  if len(counted) < len(ids):
    twice = counted.filter(pc.greater(counted.field("counts"), 1)).field("values")
    raise UserError(
      f"{name}: {len(twice)} ids are there more than once, the first is {twice[0]}; "
      "the official files have each once: repair or download that file again."
    )


def _column(values: Iterable | Column) -> Column:
  if isinstance(values, pa.Array | pa.ChunkedArray):
    return values.cast(pa.large_string())
  return pa.array(values, pa.large_string())


def _not_empty(column: Column) -> Column:
  return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.large_string()), column)


def places(ids: Column, wanted: Sequence[str] | Column) -> np.ndarray:
  """(len(wanted),) int64: where each wanted id is among `ids`, -1 where it is not."""
  found = pc.index_in(_column(wanted), value_set=_column(ids))
  return pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Judgements:
  """Which candidates answer each of Q queries.

  Attributes:
    offsets: (Q + 1,) int64; query q's are rows[offsets[q]:offsets[q + 1]].
    rows: int64, rows of the pool, distinct within a query.
    elsewhere: (query, id) of answers that this pool does not hold: never found.
  """

  offsets: np.ndarray
  rows: np.ndarray
  elsewhere: tuple[tuple[int, str], ...] = ()

  def __len__(self) -> int:
    return len(self.offsets) - 1

  @property
  def counts(self) -> np.ndarray:
    return np.diff(self.offsets)

  @property
  def queries(self) -> np.ndarray:
    """(len(rows),) the query of each row."""
    return np.repeat(np.arange(len(self)), self.counts)


def judgements(
  queries: Sequence[int] | np.ndarray,
  rows: Sequence[int] | np.ndarray,
  count: int,
  elsewhere: Iterable[tuple[int, str]] = (),
) -> Judgements:
  """From pairs (query, row of the pool) in any order; pairs told twice count once."""
  pairs = np.stack([np.asarray(queries, np.int64), np.asarray(rows, np.int64)])
  pairs = np.unique(pairs, axis=1) if pairs.size else pairs
  offsets = np.searchsorted(pairs[0], np.arange(count + 1))
  return Judgements(offsets, pairs[1], tuple(elsewhere))
