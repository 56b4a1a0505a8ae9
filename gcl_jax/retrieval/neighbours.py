"""What a search answers, and how answers over parts of a corpus become one."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from gcl_jax.errors import UserError


class Neighbours(NamedTuple):
  """The candidates with the highest inner products, best first.

  Equal scores: the lower row first. Where a query has fewer than k candidates the rest
  is row -1 with score -inf.
  """

  scores: np.ndarray  # (Q, k) float32
  rows: np.ndarray  # (Q, k) int64


class Vectors(Protocol):
  """Rows that are read a slice at a time: an array, a memory map, an index's shards."""

  @property
  def shape(self) -> tuple[int, ...]: ...
  @property
  def dtype(self) -> np.dtype: ...
  def __len__(self) -> int: ...
  def __getitem__(self, rows: slice, /) -> np.ndarray: ...


def nobody(queries: int, k: int) -> Neighbours:
  """An answer without candidates."""
  return Neighbours(
    np.full((queries, k), -np.inf, np.float32), np.full((queries, k), -1, np.int64)
  )


def best_of(found: Neighbours, k: int) -> Neighbours:
  """The first k of (Q, more) candidates, sorted by score, then row; rows are distinct
  but for -1."""
  order = np.lexsort((found.rows, -found.scores), axis=-1)[:, :k]
  return Neighbours(*(np.take_along_axis(part, order, axis=1) for part in found))


def padded(found: Neighbours, k: int) -> Neighbours:
  """As wide as k, with nobody behind those that there are."""
  missing = nobody(len(found.rows), k - found.rows.shape[1])
  return Neighbours(
    *(np.concatenate(pair, axis=1) for pair in zip(found, missing, strict=True))
  )


def without(found: Neighbours, excluded: np.ndarray | None, k: int) -> Neighbours:
  """Takes every query's excluded rows out of its sorted list, and cuts it at k.

  Args:
    found: (Q, k + m), best first.
    excluded: (Q, m) rows, -1 where there is none; None: only cuts.
  """
  if excluded is None:
    return Neighbours(found.scores[:, :k], found.rows[:, :k])
  out = (found.rows[:, :, None] == excluded[:, None, :]).any(axis=2)
  order = np.argsort(out, axis=1, kind="stable")[:, :k]
  scores = np.where(out, np.float32(-np.inf), found.scores)
  rows = np.where(out, -1, found.rows)
  return Neighbours(
    np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
  )


def checked(
  queries: np.ndarray,
  candidates: Vectors,
  k: int,
  excluded: np.ndarray | None,
  allowed: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
  """The queries in float32, the excluded rows as (Q, m), the filter as bool.

  Raises:
    UserError: shapes that do not fit, k below 1, queries that are not finite.
  """
  queries = np.ascontiguousarray(queries, np.float32)
  if queries.ndim != 2 or len(candidates.shape) != 2:
    raise UserError(
      f"queries {queries.shape} and candidates {tuple(candidates.shape)}: both are "
      "rows of vectors, (number, width)."
    )
  if queries.shape[1] != candidates.shape[1]:
    raise UserError(
      f"queries are {queries.shape[1]} wide, candidates {candidates.shape[1]}: embed "
      "both with one model."
    )
  if k < 1:
    raise UserError(f"k={k}: ask for at least one neighbour.")
  check_finite(queries, "query")
  if excluded is not None:
    excluded = np.asarray(excluded, np.int64)
    excluded = excluded[:, None] if excluded.ndim == 1 else excluded
    if excluded.shape[0] != len(queries):
      raise UserError(
        f"excluded rows are given for {excluded.shape[0]} of {len(queries)} queries."
      )
  if allowed is not None:
    allowed = np.asarray(allowed, bool)
    if allowed.shape != (len(candidates),):
      raise UserError(
        f"the filter has shape {allowed.shape} for {len(candidates)} candidates."
      )
  return queries, excluded, allowed


def check_finite(block: np.ndarray, what: str, first: int = 0) -> None:
  """Raises UserError that names the first row which holds NaN or infinity.

  Args:
    block: (n, D). what: "query" or "candidate". first: the number of its first row.
  """
  flat = block.reshape(-1)
  with np.errstate(over="ignore", invalid="ignore"):
    # One pass at the speed of memory; an overflow only leads to the next line.
    if block.dtype == np.float32 and np.isfinite(np.dot(flat, flat)):
      return
  bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
  if len(bad):
    raise UserError(
      f"{what} {first + bad[0]} is not finite (NaN or infinity): embed it again, or "
      "leave it out."
    )
