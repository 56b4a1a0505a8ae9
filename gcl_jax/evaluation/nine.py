"""The nine-direction evaluation: every modality asked for every modality.

Local pool (q -> c): every item's document in modality c. Global pools r = 0, 1, 2:
every item once, in modality (hash + r) mod 3 among those it has; their queries are
pooled, so that each (q, c) is asked of every item once. A model whose modalities keep
to themselves does well in local pools and fails where a global pool's answer is of
another modality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gcl_jax.evaluation import metrics
from gcl_jax.evaluation.banks import CHUNK, MODALITIES, Banks, EmbedFn, embed_items
from gcl_jax.evaluation.examples import make_examples
from gcl_jax.evaluation.items import Items
from gcl_jax.evaluation.sketch import sketch

LETTERS = ("i", "t", "it")
VIEWS = ("plain", "centered")
POOLS = ("local", "global")
CELLS = tuple((q, c) for q in range(3) for c in range(3))
SAME = tuple((q, c) for q, c in CELLS if q == c)
OTHER = tuple((q, c) for q, c in CELLS if q != c)
# A crop of the document picture finds that picture by its pixels.
DAGGER = tuple((q, c) for q, c in CELLS if q != 1 and c != 1)


def cell_name(q: int, c: int) -> str:
  """The name of a direction, as "i->it"."""
  return f"{LETTERS[q]}->{LETTERS[c]}"


def direction_names() -> list[str]:
  """All nine, query by query."""
  return [cell_name(q, c) for q, c in CELLS]


def evaluate_nine(
  items: Items,
  embed: EmbedFn,
  *,
  center: str | bool | Sequence[str] = VIEWS,
  seed: int = 0,
  chunk: int = CHUNK,
  progress: Callable[[int, int], None] | None = None,
  points: int = 0,
  examples: int = 0,
) -> dict:
  """Asks every item in nine directions of local and global pools.

  Args:
    items: of `build_items`.
    embed: (images, texts) -> (N, D) float32 unit rows.
    center: "plain" (False), "centered" (True), or both. Centring subtracts the mean of
      a modality's unit document bank and renormalises.
    seed: of the bootstrap over items.
    chunk: items per call of `embed`.
    progress: called with (items done, items to do).
    points: adds a "sketch" of the document banks to each view: so many items of each,
      projected on a plane; see `sketch`.
    examples: adds so many "examples", queries with what they retrieved, with pictures;
      see `make_examples`.

  Returns: a JSON-able dict {"items": counts, "plain": view, "centered": view}. A view
    has "local" and "global" ("cells" by direction, the means "same" and "other", and a
    "ladder" of ks: a cell's "found" counts the queries whose rank is at most k, for
    each k), "own_share", "top10_share" (of each candidate modality among a global top
    10, by direction) and "gap". Recalls, intervals, standard errors and shares are
    percent; what has no queries is None.

  Raises UserError where an embedding is not finite, ValueError for another `center`.
  """
  if isinstance(center, bool):
    center = VIEWS[center]
  views = (center,) if isinstance(center, str) else tuple(center)
  if not views or set(views) - set(VIEWS):
    raise ValueError(f"center {center!r}: expected of {VIEWS}")
  banks = embed_items(items, embed, chunk=chunk, progress=progress)
  asked, marked = questions(items, banks)
  codes = np.array([item.code % 3 for item in items])
  counts = {**items.counts, "bad_images": banks.bad_images}
  result: dict = {"items": counts}
  for view in views:
    centered = view == "centered"
    used = _centered(banks) if centered else banks
    answers = answer(used, asked, codes)
    result[view] = {
      "view": view,
      "items": counts,
      **_recalls(answers, asked, marked, banks, codes, seed),
      "gap": metrics.modality_gap(
        used.documents, used.has_document, LETTERS, centered=centered
      ),
    }
    if points:
      result[view]["sketch"] = sketch(used.documents, used.has_document, points)
  if examples:
    pools = list(_pool_columns(banks.has_document, codes))
    result["examples"] = make_examples(
      items, banks, asked & ~marked[..., None], codes, pools, examples
    )
  return result


def questions(items: Items, banks: Banks) -> tuple[np.ndarray, np.ndarray]:
  """Which items are asked in which direction, and which directions are marked †.

  A lone caption is asked only where the candidate holds no text. Crops as query views
  spoil the four directions from a picture to a picture: these are marked; but where at
  least half of the items with a picture have a second one, only those are asked there
  and nothing is marked.

  Returns: asked (3, 3, N) bool, [query modality, candidate modality, item]; marked
    (3, 3) bool.
  """
  asked = banks.has_query[:, None, :] & banks.has_document[None, :, :]
  lone = np.array([item.one_caption for item in items])
  asked[1, 1:, lone] = False
  cropped = np.array([item.is_cropped for item in items]) & banks.has_query[0]
  marked = np.zeros((3, 3), bool)
  if 2 * cropped.sum() <= banks.has_query[0].sum():
    for q, c in DAGGER:
      asked[q, c] &= ~cropped
  else:
    for q, c in DAGGER:
      marked[q, c] = (asked[q, c] & cropped).any()
  return asked, marked


def pool_modalities(has_document: np.ndarray, codes: np.ndarray, r: int) -> np.ndarray:
  """The modality of each item in global pool r: (hash + r) mod 3 among those it has.

  has_document: (3, N) bool. codes: int (N,). Returns: int (N,), -1 without a document.
  """
  # An item has all three modalities or one of them.
  modality = (codes + r) % 3
  has = has_document[modality, np.arange(len(codes))]
  only = np.where(has_document.any(axis=0), has_document.argmax(axis=0), -1)
  return np.where(has, modality, only)


@dataclass(frozen=True)
class Answers:
  """What the pools answered. All indexed [..., item].

  Attributes:
    ranks: by pool ("local", "global") int64 (3, 3, N), 0 where nothing was asked.
    share: (3, 3, N) float64, [query modality, candidate modality, item]: the share of
      the candidate modality among the top 10, summed over global pools.
    share_even: (3, N), of the query's own modality if the top 10 were drawn blindly.
    share_queries: (3, N) int64, how many global queries were summed.
  """

  ranks: dict[str, np.ndarray]
  share: np.ndarray
  share_even: np.ndarray
  share_queries: np.ndarray


def answer(banks: Banks, asked: np.ndarray, codes: np.ndarray) -> Answers:
  """Ranks of all questions in local and global pools.

  An item of one modality stands in all three global pools alike; it is asked in the one
  where its hash calls for that modality, so that it counts once like the others.

  Args:
    banks: unit rows.
    asked: (3, 3, N) bool.
    codes: int (N,), the hash of each item.
  """
  n = len(codes)
  ranks = {pool: np.zeros((3, 3, n), np.int64) for pool in POOLS}
  share, even = np.zeros((3, 3, n)), np.zeros((3, n))
  queries = np.zeros((3, n), np.int64)
  candidates = banks.documents.reshape(3 * n, -1)
  columns = list(_pool_columns(banks.has_document, codes))
  for q, rows in _query_blocks(asked, n):
    scores = banks.queries[q][rows] @ candidates.T  # (B, 3N)
    if not banks.has_document.all():
      scores[:, ~banks.has_document.ravel()] = -np.inf
    for c in range(3):
      here = np.flatnonzero(asked[q, c, rows])
      local = _take(scores[:, c * n : (c + 1) * n], here)
      ranks["local"][q, c, rows[here]] = metrics.ranks_of_scores(local, rows[here])
    for r, (members, position) in enumerate(columns):
      cell = (codes[rows] + r) % 3
      here = np.flatnonzero(asked[q, cell, rows])
      if not len(here):
        continue
      pool = np.take(_take(scores, here), members, axis=1)
      items = rows[here]
      ranks["global"][q, cell[here], items] = metrics.ranks_of_scores(
        pool, position[items]
      )
      is_modality = (members // n)[:, None] == np.arange(3)
      share[q][:, items] += metrics.shares_of_top(pool, is_modality).T
      even[q, items] += is_modality[:, q].mean()
      queries[q, items] += 1
  return Answers(ranks, share, even, queries)


def _take(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """scores[rows], without a copy where that is all rows."""
  return scores if len(rows) == len(scores) else scores[rows]


def _pool_columns(
  has_document: np.ndarray, codes: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """For each global pool: its columns among the 3N documents, and each item's place."""
  n = len(codes)
  for r in range(3):
    modality = pool_modalities(has_document, codes, r)
    present = np.flatnonzero(modality >= 0)
    position = np.full(n, -1)
    position[present] = np.arange(len(present))
    yield modality[present] * n + present, position


def _query_blocks(asked: np.ndarray, n: int) -> Iterator[tuple[int, np.ndarray]]:
  """(query modality, items that ask in it), a block of items at a time."""
  step = metrics.block_rows(3 * n)
  for q in range(3):
    items = np.flatnonzero(asked[q].any(axis=0))
    for start in range(0, len(items), step):
      yield q, items[start : start + step]


def _centered(banks: Banks) -> Banks:
  documents, queries = banks.documents.copy(), banks.queries.copy()
  for m in range(3):
    d, q = banks.has_document[m], banks.has_query[m]
    documents[m][d], queries[m][q] = metrics.center(documents[m][d], queries[m][q])
  return Banks(
    documents, queries, banks.has_document, banks.has_query, banks.bad_images
  )


def _recalls(
  answers: Answers,
  asked: np.ndarray,
  marked: np.ndarray,
  banks: Banks,
  codes: np.ndarray,
  seed: int,
) -> dict:
  """The "local", "global", "own_share" and "top10_share" parts of a view."""
  n = len(codes)
  ks = len(metrics.KS)
  hits = [
    (answers.ranks[pool][q, c][:, None] <= metrics.KS) & asked[q, c][:, None]
    for pool in POOLS
    for q, c in CELLS
  ]  # (N, KS) each
  counts = [asked[q, c].repeat(ks).reshape(n, ks) for _ in POOLS for q, c in CELLS]
  own_share = answers.share[range(3), range(3)]  # (3, N)
  samples = 100 * metrics.bootstrap(
    np.concatenate([*hits, own_share.T], axis=1),
    np.concatenate([*counts, answers.share_queries.T], axis=1),
    seed=seed,
  )  # (resamples, 2 * 9 * KS + 3)
  recalls = samples[:, :-3].reshape(-1, 2, 3, 3, ks)
  out = {}
  for p, pool in enumerate(POOLS):
    size = [int(x) for x in banks.has_document.sum(axis=1)]
    if pool == "global":
      size = [int(banks.has_document.any(axis=0).sum())] * 3
    ladder = metrics.ladder(max(size))
    cells = {
      cell_name(q, c): _cell(
        answers.ranks[pool][q, c][asked[q, c]],
        ladder,
        size[c],
        bool(marked[q, c]),
        recalls[:, p, q, c],
      )
      for q, c in CELLS
    }
    out[pool] = {"ladder": ladder, "cells": cells}
    for name, group in (("same", SAME), ("other", OTHER)):
      out[pool][name] = _mean(cells, group, recalls[:, p])
  out["own_share"] = _own_share(answers, samples[:, -3:])
  out["top10_share"] = _top_share(answers)
  return out


def _cell(
  ranks: np.ndarray, ladder: list[int], pool: int, marked: bool, samples: np.ndarray
) -> dict:
  """One direction's numbers. samples: (resamples, KS)."""
  cell: dict = {f"R@{k}": metrics.recall_at(ranks, k) for k in metrics.KS}
  cell["median_rank"] = metrics.median_rank(ranks)
  cell["queries"] = len(ranks)
  cell["found"] = metrics.found_by(ranks, ladder)
  cell["pool"] = pool
  cell["marked"] = marked
  cell["chance"] = {
    f"R@{k}": 100 * min(k, pool) / pool if pool else None for k in metrics.KS
  }
  return {**cell, **_spread(samples)}


def _mean(cells: dict, group: tuple, recalls: np.ndarray) -> dict:
  """The mean over a group of directions, without the marked and the empty ones.

  recalls: (resamples, 3, 3, KS).
  """
  used = [
    (q, c)
    for q, c in group
    if cells[cell_name(q, c)]["queries"] and not cells[cell_name(q, c)]["marked"]
  ]
  names = [cell_name(q, c) for q, c in used]
  mean: dict = {
    f"R@{k}": float(np.mean([cells[name][f"R@{k}"] for name in names]))
    if names
    else None
    for k in metrics.KS
  }
  mean["cells"] = names
  mean["chance"] = {
    f"R@{k}": float(np.mean([cells[name]["chance"][f"R@{k}"] for name in names]))
    if names
    else None
    for k in metrics.KS
  }
  samples = [recalls[:, q, c] for q, c in used]
  empty = np.full((1, len(metrics.KS)), np.nan)
  return {**mean, **_spread(np.mean(samples, axis=0) if samples else empty)}


def _spread(samples: np.ndarray) -> dict:
  """The 95 % interval and the standard error of each R@k. samples: (resamples, KS)."""
  columns = list(zip(metrics.KS, samples.T, strict=True))
  return {
    "interval": {f"R@{k}": metrics.interval(x) for k, x in columns},
    "se": {f"R@{k}": metrics.standard_error(x) for k, x in columns},
  }


def _top_share(answers: Answers) -> dict[str, float | None]:
  """Who fills the global top 10: by direction, percent; 100 over a query modality."""
  counts = answers.share_queries.sum(axis=1)
  return {
    cell_name(q, c): float(100 * answers.share[q, c].sum() / counts[q])
    if counts[q]
    else None
    for q, c in CELLS
  }


def _own_share(answers: Answers, samples: np.ndarray) -> dict:
  """The query modality's share of the global top 10, per modality and their mean."""
  counts = answers.share_queries.sum(axis=1)
  used = [m for m in range(3) if counts[m]]
  out: dict = dict.fromkeys(MODALITIES)
  shares = _top_share(answers)
  out |= {MODALITIES[m]: shares[cell_name(m, m)] for m in used}
  out["mean"] = float(np.mean([out[MODALITIES[m]] for m in used])) if used else None
  out["no_bias"] = {
    name: float(100 * answers.share_even[m].sum() / counts[m]) if m in used else None
    for m, name in enumerate(MODALITIES)
  }
  out["queries"] = dict(zip(MODALITIES, map(int, counts), strict=True))
  mean = samples[:, used].mean(axis=1) if used else np.array([np.nan])
  out["interval"] = metrics.interval(mean)
  out["se"] = metrics.standard_error(mean)
  return out
