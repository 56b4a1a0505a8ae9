"""The search benchmark: all sides answer alike, and what its rows say."""

import json

import numpy as np
import pytest

from benchmarks import search
from gcl_jax.errors import UserError


def test_rows(tmp_path):
  vectors = search.corpus(tmp_path, 3000, 16, "float16")
  queries = search.unit(np.random.default_rng(1), 20, 16)
  rows = search.measure(vectors, queries, 5, sides=search.SIDES, turns=1)
  assert [row["side"] for row in rows] == list(search.SIDES)
  for row in json.loads(json.dumps(rows)):
    assert row["same"] == 1 and row["queries_per_s"] > 0 and row["ratio_to"] == "faiss"
    assert row["anonymous_GB"] > 0.01 and row["candidates"] == 3000
  assert rows[0]["ratio"] == 1
  assert len(search.table(rows).splitlines()) == 2 + len(rows)


def test_it_is_seen_where_answers_differ(tmp_path, monkeypatch):
  side = search._side

  def lossy(name, *given):
    call = side(name, *given)
    if name == "faiss":
      return call

    def half(queries):
      found = call(queries)
      found.rows[::2] += 1
      return found

    return half

  monkeypatch.setattr(search, "_side", lossy)
  vectors = search.corpus(tmp_path, 500, 16, "float32")
  queries = search.unit(np.random.default_rng(1), 20, 16)
  rows = search.measure(vectors, queries, 1, sides=("faiss", "nearest"), turns=1)
  assert rows[1]["same"] == 0.5


def test_the_corpus_is_made_once_and_of_unit_rows(tmp_path, monkeypatch):
  monkeypatch.setattr(search, "_BLOCK", 64)
  made = np.array(search.corpus(tmp_path, 150, 8, "float32"))
  np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, rtol=1e-6)
  assert len(np.unique(made, axis=0)) == 150
  monkeypatch.setattr(search, "unit", None)
  np.testing.assert_array_equal(search.corpus(tmp_path, 150, 8, "float32"), made)


def test_anonymous_memory():
  with search.Anonymous() as memory:
    held = np.ones(30 << 20, np.uint8)
    memory._done.wait(0.1)
  assert 30e6 < memory.peak - memory.before < 60e6
  del held


def test_sides_that_are_not_known(tmp_path):
  with pytest.raises(UserError, match="'annoy' is none of faiss, nearest, jax, torch"):
    search.measure(np.zeros((2, 2)), np.zeros((1, 2)), 1, sides=["annoy"], turns=1)
