"""Exact top-k: against a sort of all scores, with ties, on one and on eight devices."""

import contextlib

import jax
import numpy as np
import pytest

from gcl_jax.errors import UserError
from gcl_jax.retrieval import exact, flat, nearest, top_k
from gcl_jax.sharding import make_mesh

N, WIDTH = 3001, 8


@pytest.fixture(scope="module")
def whole():
  """Small whole numbers: products are exact, and ties everywhere."""
  rng = np.random.default_rng(0)
  queries = rng.integers(-2, 3, (37, WIDTH)).astype(np.float32)
  return queries, rng.integers(-2, 3, (N, WIDTH)).astype(np.float32)


def sorted_scores(queries, candidates, k, excluded=None, allowed=None):
  """The same by the plainest means; k at most N."""
  scores = queries.astype(np.float32) @ candidates.astype(np.float32).T
  if allowed is not None:
    scores[:, ~allowed] = -np.inf
  if excluded is not None:
    for row, out in zip(scores, excluded, strict=True):
      row[out[out >= 0]] = -np.inf
  rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  scores = np.take_along_axis(scores, rows, axis=1)
  return scores, np.where(np.isneginf(scores), -1, rows)


def same(found, wanted):
  np.testing.assert_array_equal(found.rows, wanted[1])
  np.testing.assert_array_equal(found.scores, wanted[0])
  assert found.rows.dtype == np.int64 and found.scores.dtype == np.float32


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("k", [1, 5, 100])
def test_ties_go_to_the_lower_row(whole, devices, k):
  mesh = make_mesh(devices=jax.devices()[:devices])
  found = top_k(*whole, k, mesh=mesh, block_size=1600)
  same(found, sorted_scores(*whole, k))


def test_a_cut_through_many_equal_groups():
  queries = np.ones((2, 4), np.float32)
  candidates = np.ones((1000, 4), np.float32)
  candidates[990] = 2
  found = top_k(queries, candidates, 6, block_size=4096)
  assert found.rows.tolist() == [[990, 0, 1, 2, 3, 4]] * 2


def test_no_more_is_looked_for_than_there_is(monkeypatch):
  """A large k costs the width of the answer, not of every block's."""
  fetched = []
  best_of = flat.best_of
  monkeypatch.setattr(
    flat, "best_of", lambda found, k: fetched.append(k) or best_of(found, k)
  )
  queries, candidates = np.ones((1, 4)), np.eye(5, 4, dtype=np.float32)
  for engine in ("faiss", "jax"):
    found = nearest(queries, candidates, 1000, engine=engine, excluded=np.array([[3]]))
    assert found.rows.shape == found.scores.shape == (1, 1000)
    assert found.rows[0, :4].tolist() == [0, 1, 2, 4]
    assert (found.rows[0, 4:] == -1).all() and np.isneginf(found.scores[0, 4:]).all()
  assert fetched == [5]


@pytest.mark.parametrize("n", [32, 256])
def test_zero_and_minus_zero_are_one_score(n):
  """To `lax.top_k` they are not."""
  scores = np.full((1, n), -1, np.float32)
  scores[0, [0, 3]], scores[0, [1, 2]] = -0.0, 0.0
  _, places = exact._best_of_block(scores, None, 3)
  assert places.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("engine", ["jax", "faiss"])
def test_filters_and_excluded_rows(whole, engine):
  queries, candidates = whole
  rng = np.random.default_rng(1)
  candidates = candidates + rng.random((N, WIDTH), np.float32) / 64  # no ties
  candidates = candidates.astype(np.float16)
  allowed = rng.random(N) < 0.3
  best = sorted_scores(queries, candidates, 3, allowed=allowed)[1]
  excluded = np.stack([best[:, 0], best[:, 2], np.full(37, -1)], axis=1)
  for filters in (
    {"excluded": excluded},
    {"allowed": allowed},
    {"excluded": excluded, "allowed": allowed},
  ):
    found = nearest(queries, candidates, 5, engine=engine, block_size=512, **filters)
    scores, rows = sorted_scores(queries, candidates, 5, **filters)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)
  own = nearest(queries, candidates, 1, engine=engine, excluded=best[:, 0]).rows
  assert (own[:, 0] != best[:, 0]).all()


@pytest.mark.parametrize("engine", ["jax", "faiss"])
def test_more_neighbours_than_candidates(whole, engine):
  queries, candidates = whole
  allowed = np.arange(5) != 2
  found = nearest(queries, candidates[:5], 7, engine=engine, allowed=allowed)
  assert (np.sort(found.rows, axis=1) == [-1, -1, -1, 0, 1, 3, 4]).all()
  assert np.isneginf(found.scores[:, 4:]).all() and (found.rows[:, 4:] == -1).all()
  assert np.isfinite(found.scores[:, :4]).all()
  empty = nearest(queries, candidates[:0], 2, engine=engine)
  assert (empty.rows == -1).all() and empty.rows.shape == (37, 2)
  assert nearest(queries[:0], candidates, 2, engine=engine).rows.shape == (0, 2)


def test_one_device_and_eight_answer_alike():
  rng = np.random.default_rng(2)
  queries = rng.normal(size=(70, 32)).astype(np.float32)
  candidates = rng.normal(size=(4000, 32)).astype(np.float32)
  one = make_mesh(devices=jax.devices()[:1])
  eight = make_mesh(data=2, fsdp=2, tensor=2)
  found = [
    top_k(queries, candidates, 10, mesh=mesh, block_size=1024) for mesh in (one, eight)
  ]
  np.testing.assert_array_equal(found[0].rows, found[1].rows)
  np.testing.assert_allclose(found[0].scores, found[1].scores, rtol=1e-6)


class Watched:
  """A corpus that notes how much of it is asked for at once."""

  def __init__(self, array):
    self.array, self.asked = array, []
    self.shape, self.dtype = array.shape, array.dtype

  def __len__(self):
    return len(self.array)

  def __getitem__(self, rows):
    part = self.array[rows]
    self.asked.append(len(part))
    return part


@pytest.mark.parametrize("engine", ["jax", "faiss"])
def test_a_memory_map_is_read_by_blocks(whole, engine, tmp_path):
  queries, candidates = whole
  candidates.astype(np.float16).tofile(tmp_path / "vectors")
  mapped = np.memmap(tmp_path / "vectors", np.float16, "r", shape=candidates.shape)
  watched = Watched(mapped)
  found = nearest(queries, watched, 5, engine=engine, block_size=512)
  assert watched.asked == [512] * 5 + [441]
  np.testing.assert_array_equal(found.scores, sorted_scores(queries, candidates, 5)[0])


def test_faiss_orders_equal_scores_by_row(whole):
  """What it fetched is sorted; which of the equals at the cut it fetched is its own."""
  found = nearest(*whole, 40, engine="faiss", block_size=700)
  scores, _ = sorted_scores(*whole, 40)
  np.testing.assert_array_equal(found.scores, scores)
  for scores, rows in zip(*found, strict=True):
    ties = scores[1:] == scores[:-1]
    assert ties.any() and (rows[1:] > rows[:-1])[ties].all()
  np.testing.assert_array_equal(
    np.take_along_axis(whole[0] @ whole[1].T, found.rows, axis=1), found.scores
  )


def test_which_engine(whole, monkeypatch):
  asked = []
  monkeypatch.setattr(flat, "top_k", lambda *_, **__: asked.append("jax"))
  monkeypatch.setattr(flat, "import_faiss", lambda: asked.append("faiss") or 1 / 0)

  def engine(**given):
    asked.clear()
    with contextlib.suppress(ZeroDivisionError):
      nearest(*whole, 1, **given)
    return asked[0]

  assert engine() == engine(engine="faiss") == "faiss"
  assert engine(engine="jax") == engine(mesh=make_mesh()) == "jax"
  monkeypatch.setattr(flat.jax, "default_backend", lambda: "gpu")
  assert engine() == "jax"
  monkeypatch.setattr(flat.jax, "default_backend", lambda: "cpu")
  monkeypatch.setattr(flat, "find_spec", lambda name: None)
  assert engine() == "jax"


@pytest.mark.parametrize("engine", ["jax", "faiss"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_vectors_that_are_not_finite(whole, engine, dtype, value):
  queries, candidates = whole
  broken = candidates.astype(dtype)
  broken[2999, 3] = value
  with pytest.raises(UserError, match="candidate 2999 is not finite"):
    nearest(queries, broken, 3, engine=engine, block_size=1600)


def test_finite_numbers_whose_squares_are_not(whole):
  queries, candidates = whole
  large = candidates * np.float32(1e25)
  found = nearest(queries, large, 1, engine="faiss")
  assert (found.rows >= 0).all()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"queries": np.full((2, WIDTH), np.nan)}, "query 0 is not finite"),
    ({"queries": np.zeros((2, 7))}, "queries are 7 wide, candidates 8"),
    ({"queries": np.zeros(WIDTH)}, r"queries \(8,\)"),
    ({"k": 0}, "k=0"),
    ({"excluded": np.zeros((3, 1), int)}, "for 3 of 37 queries"),
    ({"allowed": np.ones(4, bool)}, r"shape \(4,\) for 3001"),
    ({"engine": "annoy"}, "none of auto, jax, faiss"),
  ],
)
@pytest.mark.parametrize("engine", ["jax", "faiss"])
def test_mistakes_are_named(whole, engine, change, message):
  given = {"queries": whole[0], "candidates": whole[1], "k": 3, "engine": engine}
  with pytest.raises(UserError, match=message):
    nearest(**{**given, **change})


def test_more_candidates_than_can_be_counted():
  corpus = np.broadcast_to(np.float32(0), (2**31, 2))
  with pytest.raises(UserError, match="2147483648 candidates"):
    top_k(np.zeros((1, 2)), corpus, 1)


def test_without_faiss(whole, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "faiss", None)
  with pytest.raises(UserError, match="pip install faiss-cpu"):
    nearest(*whole, 1, engine="faiss")
