"""Exact search behind one call: FAISS on a CPU alone, JAX on everything else."""

from __future__ import annotations

from importlib.util import find_spec

import jax
import numpy as np
from jax.sharding import Mesh

from gcl_jax.errors import UserError
from gcl_jax.retrieval.exact import top_k
from gcl_jax.retrieval.neighbours import (
  Neighbours,
  Vectors,
  best_of,
  check_finite,
  checked,
  nobody,
  padded,
  without,
)

ENGINES = ("auto", "jax", "faiss")
_COPIED = 32_768  # candidates of a block that is copied: converted, filtered, or both
_VIEWED = 262_144  # of one that FAISS reads where it lies


def nearest(
  queries: np.ndarray,
  candidates: Vectors,
  k: int,
  *,
  engine: str = "auto",
  mesh: Mesh | None = None,
  block_size: int | None = None,
  excluded: np.ndarray | None = None,
  allowed: np.ndarray | None = None,
  check: bool = True,
) -> Neighbours:
  """The k candidates of highest inner product for every query, exactly.

  Best first, equal scores by row. With FAISS the order within the k is the same, but
  which of several candidates with the score of the k-th are among them is FAISS's to
  choose; `engine="jax"` always takes the lower rows.

  Args:
    queries: (Q, D).
    candidates: (N, D), float32 or float16; an array, a memory map, or anything that is
      read by slices. No more than a block of it is copied.
    k: neighbours of each query; more than N is row -1 with score -inf.
    engine: "faiss", "jax", or "auto": FAISS where all devices are CPUs and no mesh is
      given.
    mesh: of "jax": the devices that share the work; by default all local ones.
    block_size: candidates at a time.
    excluded: (Q, m) rows that a query does not find, such as its own; -1 for none.
    allowed: (N,) bool: which candidates are searched at all.
    check: whether candidates are looked through for NaN and infinity; once is enough.

  Raises:
    UserError: shapes that do not fit, vectors that are not finite, FAISS not installed.
  """
  if engine not in ENGINES:
    raise UserError(f"engine={engine!r} is none of {', '.join(ENGINES)}.")
  if engine == "auto":
    alone = mesh is None and jax.default_backend() == "cpu"
    engine = "faiss" if alone and find_spec("faiss") else "jax"
  if engine == "jax":
    return top_k(
      queries,
      candidates,
      k,
      mesh=mesh,
      block_size=block_size,
      excluded=excluded,
      allowed=allowed,
    )
  faiss = import_faiss()
  queries, excluded, allowed = checked(queries, candidates, k, excluded, allowed)
  fetch = min(k + (0 if excluded is None else excluded.shape[1]), len(candidates))
  best = nobody(len(queries), fetch)
  in_place = isinstance(candidates, np.ndarray) and candidates.dtype == np.float32
  size = block_size or (_VIEWED if in_place and allowed is None else _COPIED)
  for first in range(0, len(candidates), size):
    block = np.ascontiguousarray(candidates[first : first + size], np.float32)
    if check:
      check_finite(block, "candidate", first)
    rows = np.arange(first, first + len(block))
    if allowed is not None:
      keep = allowed[first : first + size]
      block, rows = block[keep], rows[keep]
    if len(rows) and len(queries):
      scores, at = faiss.knn(queries, block, fetch, metric=faiss.METRIC_INNER_PRODUCT)
      there = at >= 0
      found = Neighbours(
        np.where(there, scores, np.float32(-np.inf)), np.where(there, rows[at], -1)
      )
      both = zip(best, found, strict=True)
      best = best_of(Neighbours(*(np.concatenate(x, axis=1) for x in both)), fetch)
  return padded(without(best, excluded, k), k)


def import_faiss():
  """The library. Raises UserError where it is not installed."""
  try:
    import faiss
  except ImportError as error:
    raise UserError(
      "this search needs FAISS, which is not installed: pip install faiss-cpu"
    ) from error
  return faiss
