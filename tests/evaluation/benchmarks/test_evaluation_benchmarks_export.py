"""What is exported scores the same elsewhere, or is not there at all."""

import json

import numpy as np
import pytest
import pytrec_eval
from benchmark_cases import Embedder, evaluated, vector
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
