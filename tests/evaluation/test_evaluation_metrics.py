"""Ranks, shares, intervals and gaps against numbers computed by hand."""

import numpy as np
import pytest

from gcl_jax.errors import UserError
from gcl_jax.evaluation import metrics


def row(*scores):
  return np.array([scores], np.float32)


@pytest.mark.parametrize(
  ("scores", "relevant", "rank"),
  [
    (row(0.9, 0.5, 0.1), [0], 1),
    (row(0.9, 0.5, 0.1), [1], 2),
    (row(0.9, 0.5, 0.1), [2], 3),
    (row(0.5, 0.5, 0.1), [1], 2),  # a tie counts against the model
    (row(0.5, 0.5 - 5e-7, 0.1), [0], 2),  # so does what is nearly one
    (row(0.5, 0.5 - 5e-6, 0.1), [0], 1),
    (row(0.2, 0.2, 0.2, 0.2), [3], 4),
    (row(0.9, 0.5, 0.7, 0.1), [[1, 2]], 2),  # the best relevant one is meant
    (row(0.9, 0.9, 0.9, 0.1), [[1, 2]], 2),  # relevant ones do not count against it
    (row(0.9, 0.5, 0.7, 0.1), [[3, -1]], 4),  # -1 is padding
    (row(-np.inf, 0.5, 0.7), [1], 2),
    (row(-0.3), [0], 1),
  ],
)
def test_rank_by_hand(scores, relevant, rank):
  assert metrics.ranks_of_scores(scores, np.array(relevant)).tolist() == [rank]


def test_rank_needs_a_relevant_candidate():
  with pytest.raises(ValueError, match="no relevant"):
    metrics.ranks_of_scores(row(0.1, 0.2), np.array([[-1, -1]]))


def test_ranks_in_blocks_equal_one_block(monkeypatch):
  rng = np.random.default_rng(0)
  queries, candidates = rng.normal(size=(2, 50, 8)).astype(np.float32)
  relevant = rng.integers(0, 50, 50)
  whole = metrics.ranks(queries, candidates, relevant)
  monkeypatch.setattr(metrics, "BLOCK_ENTRIES", 7 * 50)
  assert metrics.ranks(queries, candidates, relevant).tolist() == whole.tolist()
  scores = queries.astype(np.float64) @ candidates.T
  by_hand = [1 + sum(s > s[j]) for s, j in zip(scores, relevant, strict=True)]
  assert whole.tolist() == by_hand


def test_not_finite_names_how_many_and_which():
  bank = np.ones((5, 2), np.float32)
  bank[1, 0], bank[3] = np.nan, np.inf
  with pytest.raises(UserError, match=r"2 of 5 fused query embeddings are not finite"):
    metrics.check_finite(bank, "fused query")


def test_recall_and_median_by_hand():
  ranks = np.array([1, 1, 3, 6, 11, 60])
  recalls = [metrics.recall_at(ranks, k) for k in (1, 5, 10, 50)]
  assert recalls == pytest.approx([200 / 6, 50, 400 / 6, 500 / 6])
  assert metrics.median_rank(ranks) == 4.5
  assert metrics.recall_at(ranks[:0], 1) is None
  assert metrics.median_rank(ranks[:0]) is None


def share_of_top(scores, is_own, k):
  """Of one group; the other is the rest, so that both make one."""
  shares = metrics.shares_of_top(scores, np.stack([is_own, ~is_own], axis=1), k)
  np.testing.assert_allclose(shares.sum(axis=1), 1)
  return shares[:, 0]


def test_share_of_top_by_hand():
  own = np.array([True, True, False, False])
  share = share_of_top
  assert share(row(0.9, 0.8, 0.7, 0.6), own, 2).tolist() == [1]
  assert share(row(0.9, 0.6, 0.8, 0.5), own, 2).tolist() == [0.5]
  # One place is left and three tie for it, one of them own.
  assert share(row(0.9, 0.5, 0.5, 0.5), own, 2)[0] == pytest.approx((1 + 1 / 3) / 2)
  assert share(row(0.1, 0.1, 0.1, 0.1), own, 3)[0] == pytest.approx(0.5)
  assert share(row(0.9, 0.8, 0.7, 0.6), own, 10).tolist() == [0.5]  # a small pool


def test_share_of_top_equals_sorting():
  rng = np.random.default_rng(1)
  scores = rng.normal(size=(40, 1_003)).astype(np.float32)
  scores[3:9] = np.round(scores[3:9], 1)  # many ties
  own = rng.random(1_003) < 0.3
  got = share_of_top(scores, own, 10)
  untied = [*range(3), *range(9, 40)]
  top = np.argsort(-scores[untied], axis=1)[:, :10]
  np.testing.assert_allclose(got[untied], own[top].mean(axis=1))
  shuffle = rng.permutation(1_003)
  shuffled = share_of_top(scores[:, shuffle], own[shuffle], 10)
  np.testing.assert_allclose(got, shuffled)


def test_bootstrap_has_the_binomial_error():
  hits = (np.arange(400) < 100)[:, None]
  samples = metrics.bootstrap(hits, np.ones_like(hits))[:, 0]
  assert samples.mean() == pytest.approx(0.25, abs=3e-3)
  error = (0.25 * 0.75 / 400) ** 0.5
  assert metrics.standard_error(samples) == pytest.approx(error, rel=0.08)
  low, high = metrics.interval(samples)
  assert low == pytest.approx(0.25 - 1.96 * error, abs=0.008)
  assert high == pytest.approx(0.25 + 1.96 * error, abs=0.008)


def test_bootstrap_keeps_columns_of_one_item_together(monkeypatch):
  hits = np.random.default_rng(0).random((60, 1)) < 0.5
  both = np.concatenate([hits, ~hits], axis=1)
  samples = metrics.bootstrap(both, np.ones_like(both), seed=3)
  np.testing.assert_allclose(samples.sum(axis=1), 1, rtol=1e-6)
  monkeypatch.setattr(metrics, "BLOCK_ENTRIES", 60 * 7)
  again = metrics.bootstrap(both, np.ones_like(both), seed=3)
  assert again.shape == samples.shape
  assert metrics.standard_error(again[:, 0]) == pytest.approx(
    metrics.standard_error(samples[:, 0]), rel=0.1
  )


def test_bootstrap_without_queries_is_none():
  samples = metrics.bootstrap(np.zeros((5, 1)), np.zeros((5, 1)))
  assert metrics.interval(samples[:, 0]) is None
  assert metrics.standard_error(samples[:, 0]) is None


def test_center_by_hand():
  documents = np.array([[1, 0], [0, 1]], np.float32)
  queries = np.array([[1, 0], [0.5, 0.5]], np.float32)
  d, q = metrics.center(documents, queries)
  half = 0.5**0.5
  np.testing.assert_allclose(d, [[half, -half], [-half, half]], atol=1e-6)
  np.testing.assert_allclose(q, [[half, -half], [0, 0]], atol=1e-6)


def test_gap_by_hand():
  x, y = np.eye(2, dtype=np.float32)
  banks = [np.array([x, x]), np.array([x, y]), np.array([x, -x])]
  has = [np.array([True, True])] * 3
  gap = metrics.modality_gap(banks, has, ("i", "t", "it"))
  half = 0.5**0.5
  assert gap["norm"] == pytest.approx({"i": 1, "t": half, "it": 0})
  assert gap["delta"] == pytest.approx({"i-t": half, "i-it": 1, "t-it": half})
  assert gap["cosine"]["i-t"] == pytest.approx(half)
  assert gap["cosine"]["i-it"] is None  # the mean of it has no direction
  assert gap["pair_cosine"] == pytest.approx({"i-t": 0.5, "i-it": 0, "t-it": 0.5})
  centered = metrics.modality_gap(banks, has, ("i", "t", "it"), centered=True)
  assert centered["cosine"]["i-t"] is None


def test_gap_takes_only_rows_that_exist():
  banks = [np.array([[1, 0], [9, 9]], np.float32)] * 2
  has = [np.array([True, False]), np.array([True, True])]
  gap = metrics.modality_gap(banks, has, ("a", "b"))
  assert gap["norm"]["a"] == 1
  assert gap["pair_cosine"]["a-b"] == 1
  nothing = [np.array([False, False]), np.array([True, True])]
  gap = metrics.modality_gap(banks, nothing, ("a", "b"))
  assert gap["norm"]["a"] is None
  assert gap["delta"]["a-b"] is None
  assert gap["pair_cosine"]["a-b"] is None
