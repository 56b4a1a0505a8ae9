"""Exact top-k by inner product, in JAX: a block of the corpus at a time, over the mesh."""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh

from gcl_jax.retrieval.neighbours import Neighbours, Vectors, best_of, checked, nobody


def top_k(
  queries: np.ndarray,
  candidates: Vectors,
  k: int,
  *,
  mesh: Mesh | None = None,
  block_size: int | None = None,
  excluded: np.ndarray | None = None,
  allowed: np.ndarray | None = None,
) -> Neighbours:
  """The k candidates of highest inner product for every query. STUB: NumPy for now."""
  from gcl_jax.retrieval.neighbours import check_finite, without

  queries, excluded, allowed = checked(queries, candidates, k, excluded, allowed)
  fetch = k + (0 if excluded is None else excluded.shape[1])
  best = nobody(len(queries), fetch)
  size = block_size or 8192
  for first in range(0, len(candidates), size):
    block = np.asarray(candidates[first : first + size], np.float32)
    check_finite(block, "candidate", first)
    scores = queries @ block.T
    rows = np.broadcast_to(np.arange(first, first + len(block)), scores.shape)
    if allowed is not None:
      keep = allowed[first : first + size]
      scores, rows = scores[:, keep], rows[:, keep]
    both = zip(best, (scores, rows), strict=True)
    best = best_of(Neighbours(*(np.concatenate(x, axis=1) for x in both)), fetch)
  return without(best, excluded, k)
