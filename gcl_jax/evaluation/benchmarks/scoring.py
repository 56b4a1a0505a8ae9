"""From embeddings to hits: recalls as the benchmarks define them, and what ties leave
open.

Every recall here is hit-or-miss: 1 if any answer is among the first K, else 0 (trec's
`success_K`). Scores are float32 inner products of unit rows. Equal scores: the lower
row of the pool first, within lists the earlier entry. Beside every recall stands the
interval from all ties lost to all ties won, where scores within 2e-6 are ties.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gcl_jax.evaluation.benchmarks.documents import Judgements, judgements
from gcl_jax.evaluation.benchmarks.embedding import Bank, Pool
from gcl_jax.evaluation.benchmarks.task import Scoring
from gcl_jax.retrieval import Neighbours, nearest

TIE = np.float32(2e-6)
WIDE = 0.05  # percentage points: a recall with a wider interval is flagged
_BLOCK = 1 << 22  # numbers gathered at once


@dataclass(frozen=True)
class Scored:
  """One scoring, done.

  Attributes:
    result: for the result file.
    asked: (Q,) rows of the task's queries that were asked.
    queries: (Q, D) unit float32.
    found: the first candidates of each.
    excluded: (Q, m) rows that they may not find; None: nothing.
    relevant: their judgements, without candidates that are not there; None: not public.
  """

  result: dict[str, Any]
  asked: np.ndarray
  queries: np.ndarray
  found: Neighbours
  excluded: np.ndarray | None
  relevant: Judgements | None


def score(scoring: Scoring, queries: Bank, pool: Pool) -> Scored:
  """Searches, judges, and counts what could not be asked because pictures are absent."""
  asked = np.arange(len(queries.there)) if scoring.asked is None else scoring.asked
  answers = scoring.relevant
  can = queries.there[asked]
  if answers is not None:  # an answer that is not there makes a question void
    answers = _kept(answers, pool.there)
    can = can & ((answers.counts > 0) | (scoring.relevant.counts == 0))
  asked, rows = asked[can], np.flatnonzero(can)
  excluded = None if scoring.excluded is None else scoring.excluded[rows]
  if answers is not None:
    answers = _of_queries(answers, rows)
    if excluded is not None:
      answers = _without(answers, excluded)
  vectors = queries.unit(asked)
  # With one more for every answer, K irrelevant ones show wherever there are K.
  answered = 0 if answers is None else int(answers.counts.max(initial=0))
  depth = max(scoring.cutoffs) + max(1, answered)
  allowed = scoring.allowed
  if not pool.there.all():
    allowed = pool.there if allowed is None else allowed & pool.there
  if scoring.lists is not None:
    lists = _usable(scoring.lists[rows], excluded, allowed)
    found = _search_lists(vectors, pool, lists, min(depth, lists.shape[1]))
    candidates = (lists >= 0).sum(axis=1)
  else:
    found = _search(
      vectors, pool, min(depth, len(pool)), max(scoring.cutoffs), excluded, allowed
    )
    candidates = np.full(len(asked), len(pool) if allowed is None else allowed.sum())
  result: dict[str, Any] = {"queries": len(asked)}
  result["candidates"] = _one_or_range(candidates)
  if answers is not None:
    best = _best(vectors, pool, answers)
    result |= _recalls(found, answers, best, scoring.cutoffs)
    result["answers_not_in_pool"] = len(answers.elsewhere)
  result["partial"] = _partial(len(can), len(asked), pool, scoring)
  return Scored(result, asked, vectors, found, excluded, answers)


def _recalls(
  found: Neighbours, answers: Judgements, best: np.ndarray, cutoffs: tuple[int, ...]
) -> dict[str, Any]:
  """Recalls in percent by K, the interval of each, and which intervals are wide.

  best: (Q,) the highest score of an answer, -inf where there is none.
  """
  is_answer = _answers_among(found.rows, answers)
  there = found.rows >= 0
  answered, best = np.isfinite(best), best[:, None]
  over = (there & ~is_answer & (found.scores > best + TIE)).sum(axis=1)
  level = there & (found.scores >= best - TIE)
  not_under = (level & ~is_answer).sum(axis=1)
  recall, ties = {}, {}
  for k in cutoffs:
    hit = is_answer[:, :k].any(axis=1)
    won, lost = answered & (over < k), answered & (not_under < k)
    recall[str(k)] = _percent(hit)
    ties[str(k)] = [_percent(lost), _percent(won)]
  wide = [
    int(k) for k, (low, high) in ties.items() if low is not None and high - low > WIDE
  ]
  return {"recall": recall, "ties": ties, "wide_ties": wide}


def _percent(hits: np.ndarray) -> float | None:
  return 100 * float(hits.mean()) if len(hits) else None


def _answers_among(rows: np.ndarray, answers: Judgements) -> np.ndarray:
  """(Q, k) bool: which of the rows found are answers."""
  width = int(max(rows.max(initial=0), answers.rows.max(initial=0))) + 1
  keys = answers.queries * width + answers.rows  # sorted
  asked = np.arange(len(rows))[:, None] * width + rows
  if not len(keys):
    return np.zeros(rows.shape, bool)
  at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
  return (keys[at] == asked) & (rows >= 0)


def _best(queries: np.ndarray, pool: Pool, answers: Judgements) -> np.ndarray:
  """(Q,) float32: the highest score of an answer, -inf without any."""
  best = np.full(len(queries), -np.inf, np.float32)
  of_query = answers.queries
  for block in _blocks(len(answers.rows), pool.shape[1]):
    candidates = pool.take(answers.rows[block])
    scores = np.einsum("nd,nd->n", queries[of_query[block]], candidates)
    np.maximum.at(best, of_query[block], scores)
  return best


def _search(
  queries: np.ndarray,
  pool: Pool,
  depth: int,
  cutoff: int,
  excluded: np.ndarray | None,
  allowed: np.ndarray | None,
) -> Neighbours:
  """The first `depth` candidates, the lower rows of all that tie with the cutoff-th."""
  found = nearest(queries, pool, depth, excluded=excluded, allowed=allowed, check=False)
  # FAISS chooses among equals at the end of its list. Where they reach up to the cutoff
  # the question is asked again, of the engine that takes the lower rows.
  at_cutoff = found.scores[:, min(cutoff, depth) - 1]
  again = np.flatnonzero(np.isfinite(at_cutoff) & (at_cutoff == found.scores[:, -1]))
  if depth < len(pool) and len(again):
    more = nearest(
      queries[again],
      pool,
      depth,
      engine="jax",
      excluded=None if excluded is None else excluded[again],
      allowed=allowed,
    )
    found.scores[again], found.rows[again] = more
  return found


def _search_lists(
  queries: np.ndarray, pool: Pool, lists: np.ndarray, k: int
) -> Neighbours:
  """The first k of each query's own candidates; (Q, L) rows, -1 for none."""
  scores = np.full(lists.shape, -np.inf, np.float32)
  for block in _blocks(len(lists), lists.shape[1] * pool.shape[1]):
    rows = lists[block]
    distinct, at = np.unique(rows, return_inverse=True)
    vectors = pool.take(np.maximum(distinct, 0))
    products = np.einsum("qd,qld->ql", queries[block], vectors[at.reshape(rows.shape)])
    scores[block] = np.where(rows >= 0, products, -np.inf)
  order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  return Neighbours(
    np.take_along_axis(scores, order, 1), np.take_along_axis(lists, order, 1)
  )


def _usable(
  lists: np.ndarray, excluded: np.ndarray | None, allowed: np.ndarray | None
) -> np.ndarray:
  """The lists without what is excluded or absent, and each candidate once."""
  lists = lists.copy()
  if excluded is not None:
    lists[(lists[:, :, None] == excluded[:, None, :]).any(axis=2)] = -1
  if allowed is not None:
    lists[~allowed[lists]] = -1
  order = np.argsort(lists, axis=1, kind="stable")
  ordered = np.take_along_axis(lists, order, 1)
  again = np.zeros(lists.shape, bool)
  np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
  lists[again] = -1
  return lists


def _kept(answers: Judgements, there: np.ndarray) -> Judgements:
  keep = there[answers.rows]
  return judgements(
    answers.queries[keep], answers.rows[keep], len(answers), answers.elsewhere
  )


def _of_queries(answers: Judgements, asked: np.ndarray) -> Judgements:
  """Of these queries only, which become 0, 1, ..."""
  place = np.full(len(answers), -1)
  place[asked] = np.arange(len(asked))
  queries = place[answers.queries]
  elsewhere = [(int(place[q]), name) for q, name in answers.elsewhere if place[q] >= 0]
  keep = queries >= 0
  return judgements(queries[keep], answers.rows[keep], len(asked), elsewhere)


def _without(answers: Judgements, excluded: np.ndarray) -> Judgements:
  queries = answers.queries
  keep = ~(excluded[queries] == answers.rows[:, None]).any(axis=1)
  return judgements(queries[keep], answers.rows[keep], len(answers), answers.elsewhere)


def _partial(
  all_queries: int, asked: int, pool: Pool, scoring: Scoring
) -> dict[str, int] | None:
  """What was left out because pictures are absent; None where nothing was."""
  gone = ~pool.there if scoring.allowed is None else scoring.allowed & ~pool.there
  if asked == all_queries and not gone.any():
    return None
  return {
    "queries_left_out": all_queries - asked,
    "queries_in_all": all_queries,
    "candidates_left_out": int(gone.sum()),
    "candidates_in_all": int(
      len(gone) if scoring.allowed is None else scoring.allowed.sum()
    ),
  }


def _one_or_range(counts: np.ndarray) -> int | list[int]:
  if not len(counts):
    return 0
  low, high = int(counts.min()), int(counts.max())
  return low if low == high else [low, high]


def _blocks(rows: int, width: int) -> Iterator[slice]:
  step = max(1, _BLOCK // max(width, 1))
  for start in range(0, rows, step):
    yield slice(start, min(rows, start + step))
