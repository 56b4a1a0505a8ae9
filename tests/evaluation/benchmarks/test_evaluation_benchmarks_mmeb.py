"""MMEB: its files, both modes, and scores that constant embeddings cannot win."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_cases import Embedder, evaluated, paint, vector

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks import Options, mmeb, open_benchmark, table_of
from gcl_jax.evaluation.benchmarks.mmeb import KINDS

MARK = "<|image_1|> "


def write_task(root, name, rows=None, count=5, width=4):
  """Query n is answered by target n; the others of its list are the next ones."""
  (asks, answers), instruction = KINDS[name]
  if rows is None:
    rows = []
    for n in range(count):
      order = [(n + j) % count for j in range(width)]
      ask = f"{MARK if 'image' in asks else ''}{instruction} question {n}"
      rows.append(
        {
          "qry_text": ask,
          "qry_img_path": f"{name}/q{n}.jpg" if "image" in asks else "",
          "tgt_text": [
            f"{name} target {k}" if "text" in answers else "" for k in order
          ],
          "tgt_img_path": [
            f"{name}/t{k}.jpg" if "image" in answers else "" for k in order
          ],
        }
      )
  path = root / name / "test-00000-of-00001.parquet"
  path.parent.mkdir(exist_ok=True)
  pq.write_table(pa.Table.from_pylist(rows), path)
  for n in range(count):
    for side, modality in (("q", asks), ("t", answers)):
      if "image" in modality:
        paint(root / "images" / name / f"{side}{n}.jpg")


def opened(root, *tasks, **choices):
  return open_benchmark("mmeb", str(root), Options(tasks=tasks, **choices))


def test_all_twelve_and_their_mean(tmp_path, monkeypatch):
  monkeypatch.setattr(mmeb, "_QUERIES", 5)
  for name in KINDS:
    write_task(tmp_path, name)
  result = evaluated(opened(tmp_path), names=False, embedder=Embedder())
  rows = [t["scores"]["own list"]["recall"]["1"] for t in result["tasks"].values()]
  assert len(rows) == 12
  assert result["summary"]["mean of 12, hit@1"] == pytest.approx(np.mean(rows))
  assert result["protocol"]["mode"] == "multimodal"


def test_no_mean_of_fewer_queries(tmp_path):
  for name in KINDS:
    write_task(tmp_path, name)
  result = evaluated(opened(tmp_path))
  assert set(result["summary"].values()) == {None}
  assert "VisDial: 5 queries (official: 1,000): of another size" in table_of(result)


def test_scores_by_hand(tmp_path):
  """Every query looks like its answer but the last, which looks like the next target."""
  write_task(tmp_path, "VisDial", count=5)

  def text(words):
    n = int(words[-1])
    return vector(f"target {n if n < 4 else 0}")

  def image(path):
    return vector(f"target {path[-5]}")

  result = evaluated(opened(tmp_path, "VisDial"), Embedder(image, text), fusion="unit")
  block = result["tasks"]["VisDial"]["scores"]["own list"]
  assert block["recall"]["1"] == 80
  assert block["ties"]["1"] == [80, 80]
  assert (block["queries"], block["candidates"]) == (5, 4)


def test_constant_embeddings_win_officially_and_lose_by_ties(tmp_path, monkeypatch):
  monkeypatch.setattr(mmeb, "_QUERIES", 5)
  for name in KINDS:
    write_task(tmp_path, name)
  same = Embedder(lambda path: np.ones(8), lambda words: np.ones(8))
  result = evaluated(opened(tmp_path), same)
  assert result["summary"]["mean of 12, hit@1"] == 100
  assert result["summary"]["mean of 12, hit@1, ties lost"] == 0
  with pytest.raises(UserError, match="is not finite"):
    evaluated(
      opened(tmp_path), Embedder(lambda path: np.full(8, np.nan), lambda w: np.ones(8))
    )


def test_a_duplicate_of_the_answer_is_the_answer(tmp_path):
  row = {
    "qry_text": "q",
    "qry_img_path": "",
    "tgt_text": ["", "", ""],
    "tgt_img_path": ["VisDial/t0.jpg", "VisDial/t1.jpg", "VisDial/t0.jpg"],
  }
  write_task(tmp_path, "VisDial", [row])
  paint(tmp_path / "images/VisDial/t0.jpg")
  embedder = Embedder(lambda path: vector(path), lambda words: vector("VisDial/t0.jpg"))
  result = evaluated(opened(tmp_path, "VisDial"), embedder)
  block = result["tasks"]["VisDial"]["scores"]["own list"]
  assert block["ties"]["1"] == [100, 100]
  assert block["candidates"] == 2


def documents_asked(root, name, **choices):
  embedder = Embedder()
  evaluated(opened(root, name, **choices), embedder, fusion="checkpoint")
  return embedder.asked


def test_modes_and_instructions(tmp_path):
  write_task(tmp_path, "MSCOCO_i2t", count=1, width=1)
  asked = dict(documents_asked(tmp_path, "MSCOCO_i2t"))
  instruction = KINDS["MSCOCO_i2t"].instruction
  image = "MSCOCO_i2t/q0.jpg"
  assert asked[image] == f"{MARK}{instruction} question 0"
  asked = dict(documents_asked(tmp_path, "MSCOCO_i2t", mode="unimodal"))
  assert asked == {image: None, None: "MSCOCO_i2t target 0"}
  asked = dict(documents_asked(tmp_path, "MSCOCO_i2t", instructions="none"))
  assert asked[image] == "question 0"


def test_a_lone_string_stands_for_no_texts(tmp_path):
  rows = [
    {
      "qry_text": "q",
      "qry_img_path": "",
      "tgt_text": "",
      "tgt_img_path": ["VisDial/t0.jpg", "VisDial/t1.jpg"],
    }
  ]
  write_task(tmp_path, "VisDial", rows)
  paint(tmp_path / "images/VisDial/t0.jpg")
  assert len(opened(tmp_path, "VisDial").tasks[0].scorings[0].pool[0]) == 2


@pytest.mark.parametrize(
  ("targets", "images"), [(["a"], ["x", "y"]), ([], []), ("", "x.jpg")]
)
def test_lists_that_do_not_fit(tmp_path, targets, images):
  row = {
    "qry_text": "q",
    "qry_img_path": "",
    "tgt_text": targets,
    "tgt_img_path": images,
  }
  write_task(tmp_path, "VisDial", [row])
  with pytest.raises(UserError, match="row 0: tgt_text and tgt_img_path must be lists"):
    opened(tmp_path, "VisDial")


def test_files_that_are_missing_or_damaged(tmp_path):
  with pytest.raises(UserError, match=r"(?s)lacks VisDial/test-00000.*folder of MMEB"):
    opened(tmp_path)
  write_task(tmp_path, "VisDial")
  with pytest.raises(UserError, match=r"lacks CIRR.*--tasks=VisDial"):
    opened(tmp_path)
  path = tmp_path / "VisDial/test-00000-of-00001.parquet"
  pq.write_table(pa.table({"qry_text": ["a"]}), path)
  with pytest.raises(UserError, match=r"cannot be read|lacks the column"):
    opened(tmp_path, "VisDial")
  path.write_bytes(b"nothing")
  with pytest.raises(UserError, match="cannot be read"):
    opened(tmp_path, "VisDial")
  with pytest.raises(UserError, match="--mode=both: MMEB has multimodal"):
    opened(tmp_path, "VisDial", mode="both")
