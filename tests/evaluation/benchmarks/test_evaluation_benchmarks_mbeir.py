"""M-BEIR: its folder, its texts, both pools, and its protocol against plain NumPy."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from benchmark_cases import Embedder, evaluated, paint, vector, write_lines

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks import Options, open_benchmark, table_of
from gcl_jax.evaluation.benchmarks.mbeir import SETS
from gcl_jax.evaluation.benchmarks.mbeir_text import clean

QUERIES, CANDIDATES = 12, 30
INSTRUCTIONS = "instructions/query_instructions.tsv"


def write_set(root, name, *, queries=QUERIES, candidates=CANDIDATES, foreign=()):
  """A test set whose query n is answered by candidates n and n + 1, and by `foreign`."""
  dataset, (asks, answers), *_ = SETS[name]
  offset = 1000 * list(SETS).index(name)
  image = f"mbeir_images/{name}"
  did = [f"{dataset}:{offset + n}" for n in range(1, candidates + 1)]
  pool = [
    {
      "txt": f"candidate {n} of {name}" if "text" in answers else None,
      "img_path": f"{image}/c{n}.jpg" if "image" in answers else "",
      "modality": answers,
      "did": did[n],
      "src_content": None,
    }
    for n in range(candidates)
  ]
  asked = [
    {
      "qid": f"{dataset}:{offset + n + 1}",
      "query_txt": f"query {n} of {name}" if "text" in asks else None,
      "query_img_path": f"{image}/q{n}.jpg" if "image" in asks else None,
      "query_modality": asks,
      "query_src_content": "{}",
      "pos_cand_list": [did[n], did[n + 1], *foreign],
      "neg_cand_list": [],
      "task_id": int(name[-1]),
    }
    for n in range(queries)
  ]
  split = "_test" if "mscoco" in name else ""
  write_lines(root / f"cand_pool/local/mbeir_{name}{split}_cand_pool.jsonl", pool)
  write_lines(root / f"query/test/mbeir_{name}_test.jsonl", asked)
  qrels = root / f"qrels/test/mbeir_{name}_test_qrels.txt"
  qrels.parent.mkdir(parents=True, exist_ok=True)
  qrels.write_text(
    "".join(
      f"{row['qid']} 0 {did} 1 {row['task_id']}\n"
      for row in asked
      for did in row["pos_cand_list"]
    )
  )
  paint(root / image / ("c0.jpg" if "image" in answers else "q0.jpg"))
  return pool, asked


@pytest.fixture
def root(tmp_path, real_data):
  target = tmp_path / INSTRUCTIONS
  target.parent.mkdir()
  target.write_bytes((real_data / "annotations/mbeir" / INSTRUCTIONS).read_bytes())
  return tmp_path


def opened(root, *tasks, **choices):
  return open_benchmark("mbeir", str(root), Options(tasks=tasks, **choices))


@pytest.mark.parametrize(
  ("raw", "want"),
  [
    ("  a dog\r\n", "A dog."),
    ('"quoted"', "Quoted."),
    ("Is it?", "Is it?"),
    ("stop!", "Stop!"),
    ("", ""),
    (None, ""),
    (' "" ', ""),
    ("éclair", "Éclair."),
    ("one\rtwo\r\nthree", "Onetwo\nthree."),
    ('\r"quoted"', "Quoted."),
  ],
)
def test_texts_are_cleaned(raw, want):
  assert clean(raw) == want


def test_the_fused_protocol_equals_a_plain_float32_count(root):
  pool, asked = write_set(root, "infoseek_task8", queries=25, candidates=60)
  result = evaluated(opened(root, "infoseek_task8"))
  prompt = "Retrieve a Wikipedia image-description pair that provides evidence for the"

  def rows(entries, text, image, before=""):
    totals = [
      np.float32(vector(f"image {entry[image]}"))
      + np.float32(3 * vector(f"text {clean(before + clean(entry[text]))}"))
      for entry in entries
    ]
    kept = np.array(totals).astype(np.float16).astype(np.float32)
    return kept / np.linalg.norm(kept, axis=1, keepdims=True)

  table = (root / INSTRUCTIONS).read_text().splitlines()
  line = next(x for x in table if x.startswith("image,text\timage,text\tINFOSEEK"))
  first = line.split("\t")[4]
  assert first.startswith(prompt)
  scores = (
    rows(asked, "query_txt", "query_img_path", f"{first} ")
    @ rows(pool, "txt", "img_path").T
  )
  order = np.argsort(-scores, axis=1, kind="stable")
  got = result["tasks"]["infoseek_task8"]
  for k in (1, 5, 10, 20, 50):
    hits = [n in row[:k] or n + 1 in row[:k] for n, row in enumerate(order)]
    assert got["scores"]["local"]["recall"][str(k)] == pytest.approx(
      100 * np.mean(hits)
    )
  assert got["direction"] == "image,text -> image,text"
  assert got["official_size"] is False
  assert result["protocol"]["fusion"] == "raw"
  assert result["protocol"]["stored"] == "float16"
  assert result["protocol"]["official_embedding"] is True


def texts_asked(root, name, **choices):
  embedder = Embedder()
  evaluated(opened(root, name, **choices), embedder)
  return [text for _, text in embedder.asked if text is not None]


def test_instructions_first_random_and_none(root):
  write_set(root, "nights_task4")
  assert texts_asked(root, "nights_task4", instructions="none") == []
  first = "Find a day-to-day image that looks similar to the provided image."
  assert set(texts_asked(root, "nights_task4")) == {first}
  drawn = texts_asked(root, "nights_task4", instructions="random")
  assert 2 <= len(set(drawn)) <= 4
  again = texts_asked(root, "nights_task4", instructions="random")
  other = texts_asked(root, "nights_task4", instructions="random", prompt_seed=1)
  assert drawn == again
  assert other != drawn
  write_set(root, "webqa_task1")
  asked = texts_asked(root, "webqa_task1")
  assert "Candidate 3 of webqa_task1." in asked  # candidates never get one
  prompt = (
    "Retrieve passages from Wikipedia that provide answers to the following question."
  )
  assert f"{prompt} Query 3 of webqa_task1." in asked


@pytest.fixture
def small(monkeypatch):
  """As if the official sets were as small as these."""
  for name, kind in SETS.items():
    size = kind._replace(queries=QUERIES, candidates=CANDIDATES)
    monkeypatch.setitem(SETS, name, size)


@pytest.mark.usefixtures("small")
def test_the_union_is_all_pools_and_foreign_answers_count_only_there(root):
  for name in SETS:
    write_set(root, name)
  offset = 1000 * list(SETS).index("infoseek_task8")
  write_set(root, "oven_task8", foreign=[f"6:{offset + 5}"])

  answer = "candidate 4 of infoseek_task8"

  def text(words):
    is_it = "of oven_task8" in words and words.lower().find("query") >= 0
    return vector("same", 8) * 50 if is_it or answer in words.lower() else vector(words)

  result = evaluated(opened(root, pool="both"), Embedder(text=text))
  assert list(result["tasks"]) == list(SETS)
  oven = result["tasks"]["oven_task8"]["scores"]
  assert oven["local"]["answers_not_in_pool"] == QUERIES
  assert oven["union"]["answers_not_in_pool"] == 0
  assert oven["union"]["candidates"] == 16 * CANDIDATES
  assert oven["union"]["recall"]["1"] == 100
  assert oven["local"]["recall"]["1"] < 100
  rows = [
    result["tasks"][name]["scores"]["local"]["recall"][str(SETS[name].k)]
    for name in SETS
  ]
  summary = result["summary"]
  assert summary["mean of 16, local, official K"] == pytest.approx(np.mean(rows))
  rows = [result["tasks"][name]["scores"]["union"]["recall"]["50"] for name in SETS]
  assert summary["mean of 16, union, R@50 (GCL paper)"] == pytest.approx(np.mean(rows))
  assert result["directions"]["text -> image"]["union"]["tasks"] == [
    "visualnews_task0",
    "mscoco_task0",
    "fashion200k_task0",
  ]
  assert "of another size" not in table_of(result)
  assert not result["partial"]
  only = evaluated(opened(root, "cirr_task7", pool="local"))
  assert only["summary"] == {"mean of 16, local, official K": None}


def test_no_mean_of_data_of_another_size(root):
  for name in SETS:
    write_set(root, name)
  result = evaluated(opened(root))
  assert result["summary"]["mean of 16, local, official K"] is None
  assert result["tasks"]["cirr_task7"]["sizes"] == {
    "queries": [QUERIES, 4170],
    "candidates": [CANDIDATES, 21551],
  }
  table = " ".join(table_of(result).split())
  assert table.count("of another size, and in no mean") == 16
  assert "cirr_task7: 12 queries (official: 4,170), 30 candidates" in table


def test_an_id_in_two_pools_of_the_union_is_told(root):
  for name in SETS:
    write_set(root, name)
  change(root, POOL, '"did": "8:13007"', '"did": "9:1001"')
  change(root, QRELS, "8:13007 1 7", "9:1001 1 7")
  opened(root)
  with pytest.raises(UserError, match=r"union of the pools: 1 ids .* first is 9:1001"):
    opened(root, pool="both")


@pytest.mark.usefixtures("small")
def test_missing_pictures_are_told_and_no_mean_includes_them(root):
  for name in SETS:
    write_set(root, name)
  result = evaluated(
    opened(root), names=False, embedder=Embedder(image=lambda p: vector("i"))
  )
  assert result["partial"]
  block = result["tasks"]["nights_task4"]["scores"]["local"]
  assert block["partial"]["queries_left_out"] == QUERIES  # q0.jpg was never painted
  assert block["partial"]["candidates_left_out"] == CANDIDATES - 1
  assert result["tasks"]["webqa_task1"]["scores"]["local"]["partial"] is None
  assert result["summary"]["mean of 16, local, official K"] is None
  assert "image -> image" not in result["directions"]


def change(root, file, old, new):
  path = root / file
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new, 1))


QUERY = "query/test/mbeir_cirr_task7_test.jsonl"
QRELS = "qrels/test/mbeir_cirr_task7_test_qrels.txt"
POOL = "cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl"


@pytest.mark.parametrize(
  ("file", "old", "new", "message"),
  [
    (QRELS, "8:13002 0", "8:99 0", r"have no line in .*first is 8:13002"),
    (
      QRELS,
      "8:13001 0 8:13001 1 7",
      "8:13001 8:13001",
      r"line 1: .* is not 'qid 0 did",
    ),
    (POOL, '"did": "8:13007"', '"did": "8:13006"', "1 ids are there more than once"),
    (POOL, '"did": "8:13007"', '"id": "8:13007"', "1 rows have no id"),
    (QUERY, '"qid": "8:13007"', '"qid": "8:13006"', "1 ids are there more than once"),
    (POOL, '{"txt"', '{"txt', "cannot be read"),
    (INSTRUCTIONS, "\t8\t", "\t88\t", "no prompt for dataset 8"),
    (INSTRUCTIONS, "dataset_id", "dataset", "lacks 'dataset_id'"),
  ],
)
def test_what_is_wrong_in_a_file_is_told_before_anything_is_embedded(
  root, file, old, new, message
):
  write_set(root, "cirr_task7")
  opened(root, "cirr_task7")
  change(root, file, old, new)
  if file == QRELS and "99" in new:  # both answers of that query
    change(root, file, old, new)
  with pytest.raises(UserError, match=message):
    opened(root, "cirr_task7")


def test_judgements_of_zero_are_none(root):
  write_set(root, "cirr_task7")
  change(root, QRELS, "8:13001 0 8:13001 1 7", "8:13001 0 8:13001 0 7")
  (task,) = opened(root, "cirr_task7").tasks
  assert task.scorings[0].relevant.counts.tolist() == [1] + [2] * (QUERIES - 1)
  change(root, QRELS, "8:13001 0 8:13002 1 7", "8:13001 0 8:13002 -1 7")
  with pytest.raises(UserError, match=r"have no line in .*first is 8:13001"):
    opened(root, "cirr_task7")


def test_files_that_are_missing(root, tmp_path):
  with pytest.raises(UserError, match=r"(?s)--root=<folder>.*cand_pool/local"):
    opened("")
  with pytest.raises(UserError, match="is not a folder"):
    opened(root / "nowhere")
  with pytest.raises(UserError, match=r"(?s)lacks cand_pool/local.*a folder of M-BEIR"):
    opened(root)
  write_set(root, "cirr_task7")
  with pytest.raises(
    UserError, match=r"lacks files of visualnews.*--tasks=cirr_task7\."
  ):
    opened(root)
  with pytest.raises(
    UserError, match=r"union pool is all sixteen .* lacks those of vis"
  ):
    opened(root, "cirr_task7", pool="union")
  (root / INSTRUCTIONS).unlink()
  with pytest.raises(UserError, match=r"lacks instructions/query_instructions\.tsv"):
    opened(root, "cirr_task7")
  opened(root, "cirr_task7", instructions="none")
  (root / "mbeir_images/cirr_task7/c0.jpg").unlink()
  with pytest.raises(UserError, match=r"no picture of this benchmark .* --images="):
    opened(root, "cirr_task7", instructions="none")


@pytest.mark.parametrize(
  ("choices", "message"),
  [
    ({"tasks": ("cirr",)}, "--tasks=cirr: there is no such task"),
    ({"pool": "global"}, "--pool=global: there are local, union, both"),
    ({"instructions": "all"}, "--instructions=all: there are first"),
    ({"mode": "unimodal"}, "--mode does nothing for --benchmark=mbeir"),
  ],
)
def test_choices_that_there_are_not(root, choices, message):
  write_set(root, "cirr_task7")
  with pytest.raises(UserError, match=message):
    open_benchmark("mbeir", str(root), Options(**choices))


def test_no_such_benchmark_fusion_or_type(root):
  with pytest.raises(UserError, match="--benchmark=beir: there are mbeir, mmeb"):
    open_benchmark("beir", str(root), Options())
  write_set(root, "cirr_task7")
  benchmark = opened(root, "cirr_task7")
  with pytest.raises(UserError, match="--fusion=sum: there are raw"):
    evaluated(benchmark, fusion="sum")
  with pytest.raises(UserError, match="--stored=bfloat16: there are float16"):
    evaluated(benchmark, stored="bfloat16")


def test_the_data_hash_is_of_contents(root, tmp_path):
  write_set(root, "cirr_task7")
  before = opened(root, "cirr_task7").data_hash
  assert opened(root, "cirr_task7").data_hash == before
  change(root, QUERY, "query 3", "query three")
  assert opened(root, "cirr_task7").data_hash != before


def test_rebuilt_sets_have_the_official_sizes_and_open(root, real_data):
  """4,170 over 21,551 and 6,003 over 74,381, from the public annotations."""
  annotations = real_data / "annotations"
  command = [
    sys.executable,
    "-m",
    "gcl_jax.evaluation.benchmarks.rebuild_mbeir",
    f"--output={root}",
    f"--cirr={annotations / 'cirr'}",
    f"--fashioniq={annotations / 'fashion-iq'}",
    f"--instructions={annotations / 'mbeir' / INSTRUCTIONS}",
  ]
  done = subprocess.run(command, capture_output=True, text=True, timeout=100)
  assert done.returncode == 0, done.stderr
  assert "cirr_task7: 4,170 queries, 4,216 answers, 21,551 candidates" in done.stdout
  assert "fashioniq_task7: 6,003 queries, 6,014 answers, 74,381" in done.stdout
  paint(root / "mbeir_images/cirr_images/dev/dev-244-0-img0.png")
  benchmark = opened(root, "cirr_task7", "fashioniq_task7")
  for task in benchmark.tasks:
    assert task.notes["official_size"]
    assert task.scorings[0].relevant.elsewhere == ()
  fashion, cirr = benchmark.tasks
  counts = cirr.scorings[0].relevant.counts
  assert (counts.min(), counts.max()) == (1, 3)
  assert np.sum(fashion.scorings[0].relevant.counts > 1) == 9
  query = json.loads((root / QUERY).read_text().splitlines()[0])
  assert list(query)[:4] == ["qid", "query_txt", "query_img_path", "query_modality"]
  assert query["query_txt"] == "Show three bottles of soft drink."
  assert query["query_img_path"] == "mbeir_images/cirr_images/dev/dev-244-0-img0.png"


def test_annotations_of_another_size_are_refused(root, real_data, tmp_path):
  from gcl_jax.evaluation.benchmarks.mbeir_build import build_cirr, copy_instructions

  cirr = tmp_path / "cirr"
  cirr.mkdir()
  (cirr / "image_splits").symlink_to(real_data / "annotations/cirr/image_splits")
  captions = cirr / "captions/cap.rc2.val.json"
  captions.parent.mkdir()
  entries = json.loads(
    (real_data / "annotations/cirr/captions/cap.rc2.val.json").read_text()
  )
  captions.write_text(json.dumps(entries[:-20]))
  with pytest.raises(UserError, match="where cirr_task7 has 4,170 over 21,551"):
    build_cirr(str(cirr), tmp_path / "out")
  assert not (tmp_path / "out").exists()
  with pytest.raises(UserError, match=r"query_instructions\.tsv of 5,288 bytes"):
    copy_instructions(str(captions), tmp_path / "out")


def test_a_rebuilt_set_replaces_no_other(tmp_path, monkeypatch):
  from gcl_jax.evaluation.benchmarks import mbeir_build as build

  files = {"a/x": b"one", "b/y": b"two"}
  build._write_all(tmp_path, files)
  build._write_all(tmp_path, files)  # the same again
  with pytest.raises(UserError, match=r"b/y exists and is another"):
    build._write_all(tmp_path, {"a/z": b"new", "b/y": b"other"})
  with pytest.raises(UserError, match=r"x exists and is another"):
    build._write_all(tmp_path, {"a/x": b"other"})

  def fail(*_):
    raise OSError("no room")

  monkeypatch.setattr(build.os, "replace", fail)
  with pytest.raises(UserError, match="cannot be written: no room"):
    build._write_all(tmp_path, {"c": b"new"})
  left = {
    p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()
  }
  assert left == set(files)
  official = tmp_path / "query_instructions.tsv"
  official.write_bytes(b"x" * build.INSTRUCTION_BYTES)
  (tmp_path / "instructions").mkdir()
  (tmp_path / INSTRUCTIONS).write_text("mine")
  with pytest.raises(UserError, match="exists and is another"):
    build.copy_instructions(str(official), tmp_path)
  assert (tmp_path / INSTRUCTIONS).read_text() == "mine"


def test_results_are_plain_json(root):
  write_set(root, "cirr_task7")
  result = evaluated(opened(root, "cirr_task7"))
  json.dumps(result)
  assert dataclasses.asdict(Options())["prompt_seed"] == 2023
