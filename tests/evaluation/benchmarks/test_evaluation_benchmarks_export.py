"""What is exported scores the same elsewhere, or is not there at all."""

import dataclasses
import errno
import json
import os
from urllib.parse import unquote

import numpy as np
import pytest
import pytrec_eval
from benchmark_cases import Embedder, evaluated, paint, vector, write_lines
from test_evaluation_benchmarks_composed_retrieval import write_composed
from test_evaluation_benchmarks_mbeir import root, write_set  # noqa: F401

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks import Options, open_benchmark, table_of


def trec(folder, cutoffs):
  """success_K in percent by trec's code, from the files alone."""
  with (folder / "qrels.txt").open() as qrels, (folder / "run.trec").open() as run:
    judged, found = pytrec_eval.parse_qrel(qrels), pytrec_eval.parse_run(run)
  measure = "success." + ",".join(map(str, cutoffs))
  got = pytrec_eval.RelevanceEvaluator(judged, {measure}).evaluate(found)
  assert len(got) == len((folder / "query_ids.txt").read_text().split())
  return {
    str(k): 100 * np.mean([row[f"success_{k}"] for row in got.values()])
    for k in cutoffs
  }


def test_other_tools_find_the_same_recalls(root, tmp_path):  # noqa: F811
  write_set(root, "cirr_task7", queries=20, candidates=40, foreign=["8:999999"])
  benchmark = open_benchmark("mbeir", str(root), Options(tasks=("cirr_task7",)))
  result = evaluated(benchmark, export_run=str(tmp_path / "run"))
  block = result["tasks"]["cirr_task7"]["scores"]["local"]
  folder = tmp_path / "run/cirr_task7/local"
  assert trec(folder, (1, 5, 10, 20)) == pytest.approx(
    {k: v for k, v in block["recall"].items() if k != "50"}
  )
  assert block["wide_ties"] == []
  queries, pool = (np.load(folder / f"{n}_embed.npy") for n in ("query", "cand"))
  assert (queries.dtype, pool.shape) == (np.float32, (40, 8))
  for line in (folder / "run.trec").read_text().splitlines()[:60]:
    qid, _, did, rank, score, _ = line.split()
    q = (folder / "query_ids.txt").read_text().split().index(qid)
    c = (folder / "cand_ids.txt").read_text().split().index(did)
    products = pool @ queries[q]
    assert np.float32(score) == pytest.approx(products[c], abs=2e-7)
    assert np.sum(products > products[c]) == int(rank) - 1
  assert "8:999999" in (folder / "qrels.txt").read_text()


def test_a_pool_that_two_scorings_share_is_written_once(tmp_path):
  write_composed(tmp_path)
  benchmark = open_benchmark("composed", str(tmp_path), Options())
  evaluated(benchmark, export_run=str(tmp_path / "run"))
  files = [tmp_path / f"run/composed/{n}/cand_embed.npy" for n in ("all", "odd")]
  assert files[0].stat().st_ino == files[1].stat().st_ino


def test_absent_candidates_are_not_exported(tmp_path):
  write_composed(tmp_path)
  (tmp_path / "i1.png").unlink()
  benchmark = open_benchmark("composed", str(tmp_path), Options())
  embedder = Embedder(lambda path: vector(str(path)))
  evaluated(benchmark, embedder, names=False, export_run=str(tmp_path / "run"))
  folder = tmp_path / "run/composed/all"
  assert len(np.load(folder / "cand_embed.npy")) == 19
  assert len((folder / "cand_ids.txt").read_text().split()) == 19
  assert len(np.load(folder / "query_embed.npy")) == 3


@pytest.mark.parametrize("name", ["../evil", "..", ".", "", "a/b", "/tmp/evil"])
def test_nothing_is_exported_outside_of_the_folder(tmp_path, name):
  write_composed(tmp_path)
  benchmark = open_benchmark("composed", str(tmp_path), Options())
  (task,) = benchmark.tasks
  bad = dataclasses.replace(task.scorings[0], name=name)
  bad = dataclasses.replace(task, scorings=(bad,))
  before = sorted(tmp_path.iterdir())
  with pytest.raises(UserError, match="are no names for folders"):
    evaluated(
      dataclasses.replace(benchmark, tasks=[bad]),
      export_run=str(tmp_path / "run"),
    )
  assert sorted(tmp_path.iterdir()) == before


def test_scorings_of_one_name_are_refused(tmp_path):
  write_composed(tmp_path)
  (task,) = open_benchmark("composed", str(tmp_path), Options()).tasks
  with pytest.raises(ValueError, match="two scorings have one name"):
    dataclasses.replace(task, scorings=task.scorings[:1] * 2)


def test_ids_with_blanks_keep_their_fields(tmp_path):
  lines = [
    {"reference": f"a {k}%20.png", "text": f"t{k}", "target": f"b\u00a0{k}.png"}
    for k in range(3)
  ]
  write_lines(tmp_path / "composed.jsonl", lines)
  paint(tmp_path / "a 0%20.png")
  benchmark = open_benchmark("composed", str(tmp_path), Options())
  result = evaluated(benchmark, export_run=str(tmp_path / "run"))
  folder = tmp_path / "run/composed/all"
  ids = (folder / "cand_ids.txt").read_text().split()
  assert ids[0] == "a%200%2520.png"
  names = benchmark.tasks[0].scorings[0].pool[0].ids.to_pylist()
  assert [unquote(name) for name in ids] == names
  for file, width in (("run.trec", 6), ("qrels.txt", 4), ("excluded.txt", 2)):
    rows = [line.split() for line in (folder / file).read_text().splitlines()]
    assert {len(row) for row in rows} == {width}
    assert all(row[2 if width > 2 else 1] in ids for row in rows)
  recall = result["tasks"]["composed"]["scores"]["all"]["recall"]
  assert trec(folder, (1, 5)) == pytest.approx({k: recall[k] for k in ("1", "5")})


def test_a_full_disk_is_told_before_rows_are_written(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  write_composed(tmp_path)
  benchmark = open_benchmark("composed", str(tmp_path), Options())
  monkeypatch.setattr(os, "posix_fallocate", full)
  with pytest.raises(UserError, match=r"cannot be written: .*No space left"):
    evaluated(benchmark, export_run=str(tmp_path / "run"))
  assert not list(tmp_path.glob("run*"))


def test_nothing_half_written_is_left(tmp_path):
  write_composed(tmp_path)
  benchmark = open_benchmark("composed", str(tmp_path), Options())
  before = sorted(tmp_path.iterdir())
  with pytest.raises(UserError, match="is not finite"):
    evaluated(
      benchmark,
      Embedder(lambda path: np.full(8, np.nan)),
      export_run=str(tmp_path / "run"),
    )
  assert sorted(tmp_path.iterdir()) == before
  (tmp_path / "run").mkdir()
  with pytest.raises(UserError, match=r"--export_run=.*run exists: name a new folder"):
    evaluated(benchmark, export_run=str(tmp_path / "run"))
  with pytest.raises(UserError, match="cannot be written"):
    evaluated(benchmark, export_run=str(tmp_path / "composed.jsonl/run"))


def test_the_table_marks_what_to_beware_of(tmp_path):
  write_composed(tmp_path)
  benchmark = open_benchmark("composed", str(tmp_path), Options())
  same = Embedder(lambda path: np.ones(8), lambda words: np.ones(8))
  result = evaluated(benchmark, same)
  table = table_of(result)
  assert "composed" in table
  assert "~ ties alone could move it" in table
  assert "PARTIAL" not in table
  assert max(map(len, table.splitlines())) <= 100
  (tmp_path / "i1.png").unlink()
  result = evaluated(benchmark, Embedder(lambda path: vector(str(path))), names=False)
  assert "* PARTIAL: pictures are missing in composed" in table_of(result)
  assert "composed*" in table_of(result)
  json.dumps(result)
  zero = evaluated(benchmark, Embedder(lambda p: np.zeros(8), lambda w: np.zeros(8)))
  assert zero["tasks"]["composed"]["zero_vectors"] == {"queries": 5, "candidates": 20}
  assert "25 embeddings are zero vectors" in table_of(zero)
