"""The embedding stage: protocols, distinct documents once, what is absent."""

import errno
import os

import numpy as np
import pytest
from benchmark_cases import Embedder, NamedPictures, evaluated, paint, vector

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks import embedding as module
from gcl_jax.evaluation.benchmarks.documents import Parts, documents, judgements
from gcl_jax.evaluation.benchmarks.embedding import Embedding
from gcl_jax.evaluation.benchmarks.pictures import FolderPictures
from gcl_jax.evaluation.benchmarks.task import BOTH, IMAGE, Benchmark, Scoring, Task

IMAGES = ["a", "b", None, "a", "a", None]
TEXTS = ["x", None, "y", "x", None, None]


def embedded(docs, fusion, stored="float32", embedder=None, pictures=None):
  embedder = embedder or Embedder()
  stage = Embedding(embedder, pictures or NamedPictures(), fusion, stored)
  try:
    return stage.bank(docs)
  finally:
    stage.close()


def some():
  ids = [f"d{k}" for k in range(len(IMAGES))]
  return documents("documents", ids, images=IMAGES, texts=TEXTS)


def unit(row):
  return row / np.linalg.norm(row)


def by_hand(fusion, image, text):
  parts = [] if image is None else [vector(f"image {image}")]
  parts += [] if text is None else [3 * vector(f"text {text}")]
  if not parts:
    return np.zeros(8)
  if fusion == "unit":
    parts = [unit(part) for part in parts]
  return unit(sum(parts))


@pytest.mark.parametrize("fusion", ["raw", "unit", "checkpoint"])
@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_each_protocol_by_hand(fusion, stored):
  bank = embedded(some(), fusion, stored)
  assert bank.vectors.dtype == stored
  # The stand-in model fuses raw sums itself, as CLIP_SF does.
  want = [by_hand(fusion, i, t) for i, t in zip(IMAGES, TEXTS, strict=True)]
  atol = 1e-6 if stored == "float32" else 1e-3
  np.testing.assert_allclose(bank.unit(slice(None)), want, atol=atol)
  assert bank.there.all()
  assert bank.zeros == 1


@pytest.mark.parametrize("own", ["raw", "unit", "checkpoint"])
def test_a_model_that_fuses_by_itself_is_asked_to_by_every_benchmark(own):
  """Which all of them choose here: mbeir and mmeb "raw", covr "unit"."""
  queries = documents("queries", ["q"], images=["a"], texts=["x"])
  pool = documents("pool", ["c"], images=["b"])
  scoring = Scoring("all", (pool,), (1,), judgements([0], [0], 1))
  benchmark = Benchmark(
    name="some",
    tasks=[Task("task", (BOTH, IMAGE), queries, (scoring,))],
    pictures=NamedPictures(),
    fusion=own,
    stored="float32",
    protocol={},
    data_hash="",
    summarise=lambda tasks: {},
  )
  embedder = Embedder()
  assert evaluated(benchmark, embedder)["protocol"]["fusion"] == own
  assert (("a", "x") in embedder.asked) is (own == "checkpoint")
  embedder = Embedder()
  embedder.fuses_by_itself = True
  protocol = evaluated(benchmark, embedder)["protocol"]
  assert protocol["fusion"] == "checkpoint" and protocol["official_embedding"]
  assert sorted(embedder.asked, key=str) == [("a", "x"), ("b", None)]
  protocol = evaluated(benchmark, embedder, fusion="unit")["protocol"]
  assert protocol["fusion"] == "unit" and not protocol["official_embedding"]


def test_raw_sums_are_rounded_before_they_are_normalised():
  bank = embedded(some(), "raw", "float16")
  total = np.float32(vector("image a")) + np.float32(3 * vector("text x"))
  np.testing.assert_array_equal(bank.vectors[0], total.astype(np.float16))


@pytest.mark.parametrize("fusion", ["raw", "checkpoint"])
def test_equal_documents_are_embedded_once(fusion, monkeypatch):
  monkeypatch.setattr(module, "_CHUNK", 2)
  embedder = Embedder()
  bank = embedded(some(), fusion, embedder=embedder)
  assert len(embedder.asked) == len(set(embedder.asked))
  np.testing.assert_array_equal(bank.vectors[0], bank.vectors[3])
  if fusion == "raw":  # each image and each text by itself
    assert sorted(embedder.asked, key=str) == [
      ("a", None),
      ("b", None),
      (None, "x"),
      (None, "y"),
    ]


def test_chunks_and_what_is_kept_change_nothing(monkeypatch):
  names = [f"i{k % 7}" for k in range(40)]
  texts = [f"t{k % 5}" if k % 3 else None for k in range(40)]
  docs = documents("documents", [str(k) for k in range(40)], images=names, texts=texts)
  want = embedded(docs, "raw").vectors
  monkeypatch.setattr(module, "_CHUNK", 3)
  monkeypatch.setattr(module, "_KEPT", 2)
  monkeypatch.setattr(module, "_ON_DISK", 0)
  stage = Embedding(Embedder(), NamedPictures(), "raw", "float32")
  seen = []
  bank = stage.bank(docs, seen.append)
  assert isinstance(bank.vectors, np.memmap)
  np.testing.assert_array_equal(bank.vectors, want)
  assert sum(seen) == 40
  stage.close()


def test_a_full_disk_is_told_and_room_is_taken_at_once(tmp_path, monkeypatch):
  mapped = module.mapped(tmp_path / "x.npy", np.dtype(np.float16), (5000, 300))
  assert (mapped.shape, mapped.dtype) == ((5000, 300), np.float16)
  assert (tmp_path / "x.npy").stat().st_blocks * 512 >= mapped.nbytes
  mapped[4999] = 1
  mapped.flush()
  assert np.load(tmp_path / "x.npy").sum() == 300

  def refuse(number):
    def call(*_):
      raise OSError(number, os.strerror(number))

    return call

  monkeypatch.setattr(os, "posix_fallocate", refuse(errno.EOPNOTSUPP))
  assert module.mapped(tmp_path / "y.npy", np.dtype("f4"), (3, 2)).shape == (3, 2)
  monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
  monkeypatch.setattr(module, "_ON_DISK", 0)
  with pytest.raises(UserError, match=r"no room for 6 embeddings .*set TMPDIR"):
    embedded(some(), "raw")


def test_missing_and_unreadable_pictures_are_absent(tmp_path):
  paint(tmp_path / "good.png")
  (tmp_path / "bad.png").write_bytes(b"no picture")
  from gcl_jax.processing import decode_image

  def image(path):
    try:
      return np.asarray(decode_image(path).resize((1, 1)), float).ravel()
    except ValueError as error:
      raise UserError("images[0] cannot be read") from error

  docs = documents(
    "documents",
    ["g", "b", "m", "t"],
    images=["good.png", "bad.png", "missing.png", None],
    texts=["x", "x", "x", "x"],
  )
  embedder = Embedder(image=image, text=lambda words: [1.0, 2.0, 3.0])
  for fusion in ("raw", "checkpoint"):
    bank = embedded(docs, fusion, embedder=embedder, pictures=FolderPictures(tmp_path))
    assert bank.there.tolist() == [True, False, False, True]
    assert not bank.vectors[1:3].any()
    np.testing.assert_allclose(bank.unit(slice(0, 1))[0], unit([201.0, 32, 33]))
    assert bank.zeros == 0


def test_another_error_of_the_embedder_stays():
  def fail(name):
    raise UserError("the devices are gone")

  with pytest.raises(UserError, match="devices are gone"):
    embedded(documents("d", ["0"], texts=["x"]), "raw", embedder=Embedder(text=fail))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_by_name(value):
  text = lambda words: np.full(8, value if words == "y" else 1.0)  # noqa: E731
  with pytest.raises(UserError, match="documents: the embedding of d2 is not finite"):
    embedded(some(), "raw", embedder=Embedder(text=text))


def test_what_float16_cannot_hold_is_refused():
  docs = documents("documents", ["big"], texts=["x"])
  with pytest.raises(UserError, match=r"of big is not finite.*--stored=float32"):
    embedded(docs, "raw", "float16", Embedder(text=lambda words: np.full(8, 1e6)))


def test_documents_of_several_rows_are_weighted_sums_of_unit_rows():
  parts = Parts(np.array([0, 2, 3]), np.float32([0.25, 0.75, 1]))
  docs = documents("videos", ["v", "w"], images=["a", "b", "c"], parts=parts)
  bank = embedded(docs, "unit")
  a, b, c = (unit(vector(f"image {name}")) for name in "abc")
  want = [unit(0.25 * a + 0.75 * b), c]
  np.testing.assert_allclose(bank.unit(slice(None)), want, atol=1e-6)


def test_ids_twice_and_without():
  with pytest.raises(UserError, match=r"the pool: 2 ids .* the first is a"):
    documents("the pool", ["a", "b", "a", "c", "c", "a"])
  with pytest.raises(UserError, match="1 rows have no id"):
    documents("the pool", ["a", None])
