"""Recalls against trec's own code and against counting by hand: positives, duplicates,
ties, masks, lists, absent rows."""

import numpy as np
import pytest
import pytrec_eval

from gcl_jax.evaluation.benchmarks.documents import documents, judgements
from gcl_jax.evaluation.benchmarks.embedding import Bank, Pool
from gcl_jax.evaluation.benchmarks.scoring import score
from gcl_jax.evaluation.benchmarks.task import Scoring

CUTOFFS = (1, 2, 3, 5, 10, 20)
WIDTH = 12


def tied(n, seed):
  """(n, WIDTH) unit rows whose products are exact multiples of 1/4: ties abound."""
  rng = np.random.default_rng(seed)
  rows = np.zeros((n, WIDTH), np.float32)
  for row in rows:
    row[rng.choice(WIDTH, 4, replace=False)] = rng.choice([-0.5, 0.5], 4)
  return rows


def spread(n, seed):
  rows = np.random.default_rng(seed).normal(size=(n, WIDTH)).astype(np.float32)
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def bank(rows, there=None):
  there = np.ones(len(rows), bool) if there is None else there
  return Bank(np.where(there[:, None], rows, 0).astype(np.float32), there, 0)


def bundle(rows, queries, candidates, seed=0):
  """Judgements with one to six answers a query, some told twice; two without any."""
  rng = np.random.default_rng(seed)
  pairs = [
    (q, c)
    for q in range(2, queries)
    for c in rng.integers(0, candidates, rng.integers(1, 7))
  ]
  pairs += pairs[:5]
  return judgements(*zip(*pairs, strict=True), queries), {
    q: {c for a, c in pairs if a == q} for q in range(queries)
  }


def scoring(n, relevant, **more):
  pool = (documents("pool", [f"c{k}" for k in range(n)]),)
  return Scoring("all", pool, CUTOFFS, relevant, **more)


def by_trec(scores, answers):
  """success_K in percent. trec puts the largest name first among equal scores, so rows
  are named downwards."""
  name = lambda row: f"{9999 - row:04d}"  # noqa: E731
  run = {
    str(q): {name(c): float(x) for c, x in enumerate(row) if np.isfinite(x)}
    for q, row in enumerate(scores)
  }
  qrels = {str(q): {name(c): 1 for c in found} for q, found in answers.items()}
  measure = "success." + ",".join(map(str, CUTOFFS))
  got = pytrec_eval.RelevanceEvaluator(qrels, {measure}).evaluate(run)
  return {
    str(k): 100 * np.mean([got.get(q, {}).get(f"success_{k}", 0.0) for q in run])
    for k in CUTOFFS
  }


def by_counting(scores, answers):
  """[lost, won] in percent by K, from the definition."""
  out = {}
  for k in CUTOFFS:
    lost = won = 0
    for q, row in enumerate(scores):
      found = [c for c in answers[q] if np.isfinite(row[c])]
      if not found:
        continue
      best = max(row[c] for c in found)
      rest = np.array([x for c, x in enumerate(row) if c not in answers[q]])
      lost += np.sum(rest >= best - 2e-6) < k
      won += np.sum(rest > best + 2e-6) < k
    out[str(k)] = [100 * lost / len(scores), 100 * won / len(scores)]
  return out


@pytest.mark.parametrize("make", [tied, spread])
@pytest.mark.parametrize("candidates", [200, 9])
def test_many_answers_duplicates_and_ties_as_trec_and_as_counted(make, candidates):
  queries, pool = make(80, 1), make(candidates, 2)
  pool[candidates // 2 :] = pool[: candidates - candidates // 2]  # all are there twice
  relevant, answers = bundle(pool, 80, candidates)
  got = score(scoring(candidates, relevant), bank(queries), Pool([bank(pool)])).result
  scores = queries @ pool.T
  scores = np.round(scores * 4) / 4 if make is tied else scores
  if make is tied:
    assert got["recall"] == pytest.approx(by_trec(scores, answers), abs=1e-9)
    assert got["wide_ties"]
  want = by_counting(scores, answers)
  for k, (low, high) in got["ties"].items():
    assert [low, high] == pytest.approx(want[k], abs=1e-9)
    assert low - 1e-9 <= got["recall"][k] <= high + 1e-9
  assert got["partial"] is None
  assert (got["queries"], got["candidates"]) == (80, candidates)


def test_without_ties_as_trec_over_several_banks():
  queries, pool = spread(60, 3), spread(150, 4)
  relevant, answers = bundle(pool, 60, 150)
  parts = Pool([bank(pool[:40]), bank(pool[40:41]), bank(pool[41:])])
  got = score(scoring(150, relevant), bank(queries), parts).result
  assert got["recall"] == pytest.approx(by_trec(queries @ pool.T, answers), abs=1e-9)
  assert got["wide_ties"] == []


def test_constant_embeddings_win_nothing_when_ties_are_lost():
  rows = np.repeat(spread(1, 0), 40, axis=0)
  relevant = judgements(range(10), np.zeros(10, int), 10)
  got = score(scoring(40, relevant), bank(rows[:10]), Pool([bank(rows)])).result
  assert got["recall"]["1"] == 100
  assert got["ties"]["1"] == [0, 100]
  assert got["ties"]["20"] == [0, 100]
  assert got["wide_ties"] == list(CUTOFFS)


def test_excluded_rows_are_not_found_and_answers_among_them_do_not_count():
  pool = np.eye(4, dtype=np.float32)
  queries = np.array([[0.9, 0.4, 0.1, 0], [0.9, 0.4, 0.1, 0]], np.float32)
  excluded = np.array([[0, -1], [0, 1]])
  relevant = judgements([0, 1], [1, 1], 2)
  done = score(
    scoring(4, relevant, excluded=excluded), bank(queries), Pool([bank(pool)])
  )
  assert done.result["recall"]["1"] == 50
  assert done.result["recall"]["20"] == 50  # the second's answer may not be found
  assert done.result["ties"]["20"] == [50, 50]
  assert done.found.rows[0].tolist()[:3] == [1, 2, 3]
  assert done.found.rows[1].tolist()[:2] == [2, 3]


def test_lists_keep_their_order_among_equals_and_count_a_candidate_once():
  pool = np.eye(4, dtype=np.float32)
  queries = np.array([[1, 0, 0, 0], [0.6, 0.6, 0, 0], [0, 1, 0, 0]], np.float32)
  lists = np.array([[3, 0, 0, -1], [1, 0, 1, 2], [2, 1, 1, 3]])
  relevant = judgements([0, 1, 2], [3, 1, 2], 3)
  done = score(scoring(4, relevant, lists=lists), bank(queries), Pool([bank(pool)]))
  assert done.found.rows.tolist() == [
    [0, 3, -1, -1],
    [1, 0, 2, -1],
    [1, 2, 3, -1],
  ]
  got = done.result
  assert got["candidates"] == [2, 3]
  assert got["recall"]["1"] == pytest.approx(100 / 3)
  assert got["ties"]["1"] == pytest.approx([0, 100 / 3])
  assert got["recall"]["2"] == 100
  assert got["ties"]["2"] == pytest.approx([200 / 3, 100])  # the third ties with row 3


def test_some_queries_over_some_candidates():
  pool = np.eye(5, dtype=np.float32)
  asked, allowed = np.array([1, 3]), np.array([False, True, True, True, True])
  queries = np.zeros((4, 5), np.float32)
  queries[:, 0], queries[1, 1], queries[3, 4] = 0.9, 0.2, 0.1
  relevant = judgements([0, 1], [1, 2], 2)
  done = score(
    scoring(5, relevant, asked=asked, allowed=allowed),
    bank(queries),
    Pool([bank(pool)]),
  )
  assert done.found.rows[:, 0].tolist() == [1, 4]
  assert done.result["recall"]["1"] == 50
  assert (done.result["queries"], done.result["candidates"]) == (2, 4)
  assert done.result["partial"] is None


def test_what_is_absent_is_left_out_and_said():
  pool, queries = spread(6, 1), spread(4, 2)
  there = np.array([True, True, False, True, True, True])
  asks = np.array([True, False, True, True])
  # Query 0 loses its only answer, 1 its picture, 2 one of two answers, 3 never had any.
  relevant = judgements([0, 1, 2, 2], [2, 0, 2, 5], 4)
  done = score(scoring(6, relevant), bank(queries, asks), Pool([bank(pool, there)]))
  assert done.asked.tolist() == [2, 3]
  assert not (done.found.rows == 2).any()
  assert done.result["partial"] == {
    "queries_left_out": 2,
    "queries_in_all": 4,
    "candidates_left_out": 1,
    "candidates_in_all": 6,
  }
  assert done.result["recall"]["20"] == 50


def test_pools_are_read_by_slices_and_by_rows():
  rows = spread(10, 0)
  pool = Pool([bank(3 * rows[:4]), bank(rows[4:5]), bank(rows[5:])])
  assert len(pool) == 10
  for part in (slice(0, 10), slice(3, 6), slice(4, 5), slice(8, 99), slice(7, 7)):
    np.testing.assert_allclose(pool[part], rows[part], atol=1e-6)
  wanted = np.array([9, 0, 4, 4, 5])
  np.testing.assert_allclose(pool.take(wanted), rows[wanted], atol=1e-6)
