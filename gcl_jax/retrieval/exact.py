"""Exact top-k by inner product, in JAX: a block of the corpus at a time, over the mesh.

Every device scores its rows of a block against a chunk of the queries and keeps its own
running top k; the devices' lists are merged once, at the end. No more scores than those
of a chunk against a block exist at any time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gcl_jax.errors import UserError
from gcl_jax.retrieval.neighbours import (
  Neighbours,
  Vectors,
  check_finite,
  checked,
  nobody,
  padded,
  without,
)
from gcl_jax.sharding import make_mesh, put, replicated

_BLOCK = 16_384  # candidates of one device at a time
_CHUNK = 1_024  # queries at a time: 64 MiB of scores
# Neighbouring candidates of which only the best is looked at first. A top k of all the
# scores of a block takes XLA on a CPU four times as long as this way round.
_GROUP = 32
_MOST = 2**31 - 1 - 2**24  # rows are int32 on the devices, those of a last block too


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
  """The k candidates of highest inner product for every query.

  Best first; of equal scores the lower row first, at the cut at k too. Products are
  float32 at the highest precision of the device. The score of a pair may differ in its
  last bits between block sizes and devices, which sum in another order.

  Args:
    queries: (Q, D) float32.
    candidates: (N, D) float32 or float16: an array, a memory map, or anything that is
      read by slices; a block of it at a time is read and sent to the devices.
    k: neighbours of each query; more than N is row -1 with score -inf.
    mesh: the devices that share the candidates; by default one of all local devices. If
      it spans processes, each of them calls with the same arguments and gets the answer.
    block_size: candidates at a time, over all devices.
    excluded: (Q, m) rows that a query does not find; -1 for none.
    allowed: (N,) bool: which candidates are searched at all.

  Raises:
    UserError: shapes that do not fit, vectors that are not finite, 2**31 candidates.
  """
  queries, excluded, allowed = checked(queries, candidates, k, excluded, allowed)
  if len(candidates) > _MOST:
    raise UserError(
      f"{len(candidates)} candidates: rows are counted to {_MOST}; search parts of them."
    )
  fetch = min(k + (0 if excluded is None else excluded.shape[1]), len(candidates))
  if not fetch or not len(queries):
    return nobody(len(queries), k)
  mesh = make_mesh(devices=jax.local_devices()) if mesh is None else mesh
  chunk = min(_CHUNK, 1 << (len(queries) - 1).bit_length())
  search = _Search(mesh, fetch, chunk, _rows_of_a_device(mesh, candidates, block_size))
  found = search(queries, candidates, allowed)
  return padded(without(found, excluded, k), k)


def _rows_of_a_device(mesh: Mesh, candidates: Vectors, block_size: int | None) -> int:
  """How many candidates of a block: whole groups, no more than there are."""
  wanted = _BLOCK if block_size is None else -(-block_size // mesh.size)
  wanted = min(wanted, -(-len(candidates) // mesh.size))
  return -(-wanted // _GROUP) * _GROUP


class _Best(NamedTuple):
  """The running lists of every device, best first: (devices, queries, k) each."""

  scores: jax.Array  # float32, -inf where there is none
  rows: jax.Array  # int32


class _Search:
  """One corpus, walked once: all chunks of the queries against each block in turn."""

  def __init__(self, mesh: Mesh, k: int, chunk: int, rows: int):
    self._mesh, self._k, self._chunk, self._rows = mesh, k, chunk, rows
    self._split = NamedSharding(mesh, P(mesh.axis_names))
    self._block = rows * mesh.size

  def __call__(
    self, queries: np.ndarray, candidates: Vectors, allowed: np.ndarray | None
  ) -> Neighbours:
    chunks = self._chunks(queries)
    best = [self._empty() for _ in chunks]
    suspects: list[tuple[int, jax.Array]] = []
    for first in range(0, len(candidates), self._block):
      block, keep = self._read(candidates, first, allowed)
      suspects.append((first, _is_finite(block)))
      best = [
        _advance(self._mesh, chunk, block, keep, np.int32(first), lists)
        for chunk, lists in zip(chunks, best, strict=True)
      ]
      # One block is read while another is scored, and no more than these are held.
      self._check(candidates, suspects, left=1)
    self._check(candidates, suspects, left=0)
    merged = [_merge(self._mesh, lists) for lists in best]
    scores, rows = (
      np.concatenate([np.asarray(part) for part in parts])[: len(queries)]
      for parts in zip(*merged, strict=True)
    )
    rows = np.where(np.isneginf(scores), -1, rows.astype(np.int64))
    return Neighbours(scores, rows)

  def _chunks(self, queries: np.ndarray) -> list[jax.Array]:
    starts = range(0, len(queries), self._chunk)
    parts = [_filled(queries[k : k + self._chunk], self._chunk) for k in starts]
    return [put(part, replicated(self._mesh)) for part in parts]

  def _empty(self) -> _Best:
    shape = (self._mesh.size, self._chunk, self._k)
    scores, rows = np.float32(-np.inf), np.int32(-1)
    return put(
      _Best(np.broadcast_to(scores, shape), np.broadcast_to(rows, shape)),
      _Best(self._split, self._split),
    )

  def _read(
    self, candidates: Vectors, first: int, allowed: np.ndarray | None
  ) -> tuple[jax.Array, jax.Array | None]:
    """The block on the devices, and which of its rows count; None: all of them."""
    block = candidates[first : first + self._block]
    keep = None
    if allowed is not None or len(block) < self._block:
      keep = np.ones(len(block), bool)
      if allowed is not None:
        keep = allowed[first : first + self._block]
      keep = put(_filled(keep, self._block), self._split)
    return put(_filled(block, self._block), self._split), keep

  def _check(
    self, candidates: Vectors, suspects: list[tuple[int, jax.Array]], left: int
  ) -> None:
    while len(suspects) > left:
      first, fine = suspects.pop(0)
      if not bool(fine):
        block = np.asarray(candidates[first : first + self._block], np.float32)
        check_finite(block, "candidate", first)


@jax.jit
def _is_finite(block: jax.Array) -> jax.Array:
  return jnp.isfinite(block).all()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _advance(
  mesh: Mesh,
  queries: jax.Array,
  block: jax.Array,
  keep: jax.Array | None,
  first: jax.Array,
  best: _Best,
) -> _Best:
  """The running lists after one more block, whose first row is `first`."""
  axes = mesh.axis_names

  def on_a_device(queries, block, keep, first, best):
    scores = lax.dot_general(
      queries,
      block.astype(jnp.float32),
      (((1,), (1,)), ((), ())),
      precision=lax.Precision.HIGHEST,
      preferred_element_type=jnp.float32,
    )
    found, places = _best_of_block(scores, keep, best.scores.shape[-1])
    rows = places + first + lax.axis_index(axes) * block.shape[0]
    # What is known already has the lower rows: it stands before its equals.
    scores = jnp.concatenate([best.scores[0], found], axis=1)
    rows = jnp.concatenate([best.rows[0], rows], axis=1)
    scores, chosen = lax.top_k(scores, best.scores.shape[-1])
    return _Best(scores[None], jnp.take_along_axis(rows, chosen, axis=1)[None])

  split = P(axes)
  return jax.shard_map(
    on_a_device,
    mesh=mesh,
    in_specs=(P(), split, None if keep is None else split, P(), _Best(split, split)),
    out_specs=_Best(split, split),
  )(queries, block, keep, first, best)


def _best_of_block(
  scores: jax.Array, keep: jax.Array | None, k: int
) -> tuple[jax.Array, jax.Array]:
  """The top k of (Q, n) scores, at most n: scores and places, lower places first.

  The k groups with the highest maxima hold the k highest scores: whatever lies in
  another group has k scores before it, one in each of these. This is so at ties too,
  since groups are neighbours: of equal maxima the earlier group is taken.
  """
  queries, n = scores.shape
  k = min(k, n)
  grouped = scores.reshape(queries, n // _GROUP, _GROUP)
  kept = None if keep is None else keep.reshape(n // _GROUP, _GROUP)
  if n // _GROUP <= k:
    return lax.top_k(_comparable(scores, keep), k)
  _, groups = lax.top_k(_comparable(grouped, kept).max(axis=-1), k)
  groups = jnp.sort(groups, axis=1)
  few = jnp.take_along_axis(grouped, groups[:, :, None], axis=1)
  few = _comparable(few, None if kept is None else kept[groups])
  found, at = lax.top_k(few.reshape(queries, k * _GROUP), k)
  groups = jnp.take_along_axis(groups, at // _GROUP, axis=1)
  return found, groups * _GROUP + at % _GROUP


def _comparable(scores: jax.Array, keep: jax.Array | None) -> jax.Array:
  """Scores as `lax.top_k` must see them: to it -0 is less than 0."""
  scores = jnp.where(scores == 0, 0.0, scores)
  return scores if keep is None else jnp.where(keep, scores, -jnp.inf)


@functools.partial(jax.jit, static_argnums=0)
def _merge(mesh: Mesh, best: _Best) -> _Best:
  """The lists of all devices as one, on all of them: (queries, k)."""
  k = best.scores.shape[-1]
  scores, rows = (jnp.concatenate(list(part), axis=1) for part in best)
  scores, rows = lax.sort((-scores, rows), num_keys=2)
  return lax.with_sharding_constraint(
    _Best(-scores[:, :k], rows[:, :k]), replicated(mesh)
  )


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
  """(n, ...) to (size, ...) with zeros below; itself where it is full."""
  if len(rows) == size:
    return rows
  out = np.zeros((size, *rows.shape[1:]), rows.dtype)
  out[: len(rows)] = rows
  return out
