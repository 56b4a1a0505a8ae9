"""FAISS indexes beside the vectors: built, judged, saved, searched, and refused."""

import numpy as np
import pytest

from gcl_jax.errors import UserError
from gcl_jax.retrieval import approximate, read_index
from gcl_jax.retrieval.approximate import build
from gcl_jax.retrieval.store_format import Document
from gcl_jax.retrieval.store_writer import IndexWriter

N, WIDTH = 600, 16
SETTINGS = {
  "dtype": "float16",
  "dimension": WIDTH,
  "model": {},
  "data": {},
  "split": "",
}


@pytest.fixture
def index(tmp_path):
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(12, WIDTH))
  rows = centres[rng.integers(0, 12, N)] + rng.normal(size=(N, WIDTH)) / 3
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  writer = IndexWriter(tmp_path / "index", SETTINGS, 2)
  for k in range(2):
    documents = [Document(f"{k}.{i}", i % 3, "t", None, i, -1) for i in range(N // 2)]
    writer.write(k, rows[k * N // 2 :][: N // 2], documents, [])
  writer.finish()
  return read_index(tmp_path / "index")


@pytest.fixture
def queries():
  return np.random.default_rng(1).normal(size=(9, WIDTH)).astype(np.float32)


@pytest.mark.parametrize(
  ("factory", "search", "at_least"),
  [
    ("Flat", "", 1.0),
    ("HNSW16", "efSearch=64", 0.95),
    ("IVF8,Flat", "nprobe=4", 0.8),
    ("PQ8x4", "", 0.4),
  ],
)
def test_recall_is_measured_and_what_is_saved_is_searched(
  index, queries, factory, search, at_least
):
  about = build(index, factory, search=search, queries=50)
  assert at_least <= about["recall"]["10"] <= 1
  again = read_index(index.folder)
  assert again.manifest["faiss"]["factory"] == factory
  assert again.manifest["faiss"]["recall"] == about["recall"]
  exact, found = (again.search(queries, 10, exact=e) for e in (True, False))
  shared = (exact.rows[:, :, None] == found.rows[:, None, :]).any(axis=2)
  assert shared.mean() >= at_least - 0.15
  if factory == "Flat":
    np.testing.assert_array_equal(found.rows, exact.rows)
  scores = queries @ again.vectors[:].astype(np.float32).T
  wanted = np.take_along_axis(scores, found.rows, axis=1)
  np.testing.assert_allclose(found.scores, wanted, rtol=1e-5)  # not the index's own
  assert (np.diff(found.scores, axis=1) <= 0).all()


def test_recall_is_of_what_exact_search_finds(index, monkeypatch):
  """One of the two is made to lose half of what it finds."""
  honest = approximate.search

  def lossy(*given, **settings):
    found = honest(*given, **settings)
    found.rows[:, 5:] = -1
    return found

  monkeypatch.setattr(approximate, "search", lossy)
  about = build(index, "Flat", queries=20)
  assert about["recall"] == {"1": 1.0, "10": 0.5}


def test_filters(index, queries):
  build(index, "Flat", queries=5)
  best = index.search(queries, 1).rows
  for given in (
    {"modality": "text"},
    {"exclude": best},
    {"modality": ["image", "fused"], "exclude": best},
  ):
    exact, found = (index.search(queries, 30, exact=e, **given) for e in (True, False))
    np.testing.assert_array_equal(found.rows, exact.rows)
  found = index.search(queries, 500, modality="text", exact=False)
  assert (found.rows[:, :200] >= 0).all() and (found.rows[:, 200:] == -1).all()
  assert index.search(queries, 700, exact=False).rows.shape == (9, 700)


def test_a_sixteenth_of_the_cells_by_default(index):
  assert build(index, "IVF20,Flat", queries=5)["search"] == "nprobe=2"


@pytest.mark.parametrize(
  ("factory", "search", "message"),
  [
    ("Annoy", "", "--faiss=Annoy: FAISS refuses"),
    ("IVF1024,Flat", "", "--faiss=IVF1024,Flat: FAISS refuses .*training points"),
    ("PQ5x4", "", "--faiss=PQ5x4: FAISS refuses"),
    ("IVF4,Flat", "probes=3", "--faiss_search=probes=3: FAISS refuses"),
  ],
)
def test_what_faiss_refuses(index, factory, search, message):
  before = sorted(path.name for path in index.folder.iterdir())
  with pytest.raises(UserError, match=message) as caught:
    build(index, factory, search=search)
  assert "\n" not in str(caught.value) and ".cpp" not in str(caught.value)
  assert sorted(path.name for path in index.folder.iterdir()) == before


def test_damage_is_named(index, queries):
  with pytest.raises(UserError, match="has no approximate one: build it with --faiss"):
    index.search(queries, 1, exact=False)
  build(index, "Flat", queries=5)
  path = index.folder / "faiss.index"
  raw = path.read_bytes()
  path.write_bytes(raw[:-1] + b"?")
  with pytest.raises(UserError, match=r"is damaged .its checksum is another"):
    read_index(index.folder).search(queries, 1, exact=False)
  path.unlink()
  with pytest.raises(UserError, match="is missing: build it again"):
    read_index(index.folder).search(queries, 1, exact=False)
