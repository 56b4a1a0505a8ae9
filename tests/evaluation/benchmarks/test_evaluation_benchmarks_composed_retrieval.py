"""CIRR and FashionIQ on their real annotations; one's own composed queries; FashionIQ's
and CIRR's rules: galleries, masks, subsets, the server's files."""

import gzip
import json
import re

import numpy as np
import pytest
from benchmark_cases import Embedder, evaluated, paint, vector, write_json, write_lines

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks import Options, open_benchmark
from gcl_jax.evaluation.benchmarks.fashioniq import clean_caption, mbeir_text


def linked(target, source):
  for folder in ("captions", "image_splits"):
    (target / folder).symlink_to(source / folder)
  return target


@pytest.fixture
def cirr(tmp_path, real_data):
  paint(tmp_path / "dev/dev-244-0-img0.png")
  return linked(tmp_path, real_data / "annotations/cirr")


@pytest.fixture
def fashioniq(tmp_path, real_data):
  paint(tmp_path / "images/B005X4PL1G.png")
  return linked(tmp_path, real_data / "annotations/fashion-iq")


class Oracle(Embedder):
  """Fused queries lie at `answer(image, text)`, `tilt` of the way to their reference."""

  def __init__(self, answer, tilt=0.0):
    super().__init__(width=128)
    self.answer, self.tilt = answer, tilt

  def embed(self, images=None, texts=None, *, normalize=True, progress=None):
    if texts is None or None in texts or images is None:
      return super().embed(images, texts, normalize=normalize)
    rows = [
      self.tilt * self.image(i) + (1 - self.tilt) * self.image(self.answer(i, t))
      for i, t in zip(images, texts, strict=True)
    ]
    return np.float32(rows)


def test_cirr_sizes_masks_and_subsets_on_the_real_annotations(cirr, tmp_path):
  benchmark = open_benchmark("cirr", str(cirr), Options())
  entries = json.loads((cirr / "captions/cap.rc2.val.json").read_text())
  paths = json.loads((cirr / "image_splits/split.rc2.val.json").read_text())
  targets = {
    (paths[e["reference"]][2:], e["caption"]): paths[e["target_hard"]][2:]
    for e in entries
  }
  # The reference lies nearer to each query than its target, and is never found.
  oracle = Oracle(lambda image, text: targets[image, text], tilt=0.6)
  run = tmp_path / "run"
  result = evaluated(benchmark, oracle, export_run=str(run))
  blocks = result["tasks"]["val"]["scores"]
  recall, subset = blocks["recall"], blocks["subset"]
  assert (recall["queries"], recall["candidates"]) == (4181, 2297)
  assert (subset["queries"], subset["candidates"]) == (4181, 5)
  assert list(recall["recall"]) == ["1", "5", "10", "50"]
  assert list(subset["recall"]) == ["1", "2", "3"]
  assert recall["recall"]["1"] > 95  # six pairs are asked for two targets each
  assert subset["recall"]["1"] > 95
  mean = result["summary"]["mean of R@5 and subset R@1"]
  assert mean == pytest.approx((recall["recall"]["5"] + subset["recall"]["1"]) / 2)
  reference = {str(e["pairid"]): e["reference"] for e in entries}
  members = {str(e["pairid"]): set(e["img_set"]["members"]) for e in entries}
  for name, depth in (("recall", 50), ("subset", 3)):
    lines = (run / "val" / name / "run.trec").read_text().splitlines()
    found = [line.split()[0:3:2] for line in lines]
    assert len(found) >= 4181 * depth
    assert not any(reference[q] == c for q, c in found)
    if name == "subset":
      assert all(c in members[q] for q, c in found)
  masked = (run / "val/recall/excluded.txt").read_text().splitlines()
  assert dict(line.split() for line in masked) == reference


def test_cirr_test1_gives_the_files_that_its_server_takes(tmp_path, real_data):
  paint(tmp_path / "test1/test1-147-1-img1.png")
  cirr = linked(tmp_path, real_data / "annotations/cirr")
  benchmark = open_benchmark("cirr", str(cirr), Options(tasks=("test1",)))
  run = tmp_path / "run"
  result = evaluated(benchmark, export_run=str(run))
  assert "recall" not in result["tasks"]["test1"]["scores"]["recall"]
  example = real_data / "annotations/cirr/submission_example"
  packed = (example / "test1_pred_ranks_recall_subset.json.gz").read_bytes()
  accepted = json.loads(gzip.decompress(packed))
  for name, metric, depth in (("recall", "recall", 50), ("subset", "recall_subset", 3)):
    file = run / "test1" / name / "server.json"
    assert file.stat().st_size <= 5e6
    ours = json.loads(file.read_text())
    assert ours.keys() == accepted.keys()
    assert len(ours) == 4148 + 2
    assert (ours.pop("version"), ours.pop("metric")) == ("rc2", metric)
    assert {len(names) for names in ours.values()} == {depth}
    assert all(len(set(names)) == depth for names in ours.values())
    assert not (run / "test1" / name / "qrels.txt").exists()


def test_cirr_files_that_do_not_fit(cirr, tmp_path):
  (cirr / "image_splits").unlink()
  with pytest.raises(
    UserError, match=r"(?s)lacks image_splits/split.*a folder of CIRR"
  ):
    open_benchmark("cirr", str(cirr), Options())
  split = cirr / "image_splits/split.rc2.val.json"
  write_json(split, {"dev-244-0-img0": "./dev/dev-244-0-img0.png"})
  with pytest.raises(UserError, match=r"names dev-63-0-img1, which image_splits"):
    open_benchmark("cirr", str(cirr), Options())
  split.write_text("[]")
  with pytest.raises(UserError, match="is no object of names"):
    open_benchmark("cirr", str(cirr), Options())
  split.write_text("{")
  with pytest.raises(UserError, match="cannot be read"):
    open_benchmark("cirr", str(cirr), Options())


GOOD_ENTRY = {
  "pairid": 1,
  "reference": "dev-63-0-img1",
  "caption": "a",
  "target_hard": "dev-63-0-img1",
  "img_set": {"members": ["dev-63-0-img1"]},
}


@pytest.mark.parametrize(
  ("entries", "message"),
  [
    ([], "holds no entries"),
    (5, "holds no list of entries"),
    ([5], "lacks 'pairid'"),
    ([GOOD_ENTRY | {"caption": None}], "lacks 'caption'"),
    ([GOOD_ENTRY | {"reference": ["a"]}], "reference is not a str"),
    ([GOOD_ENTRY | {"img_set": {"members": 5}}], "members is not a list"),
    ([GOOD_ENTRY | {"img_set": {"members": [5]}}], "members is not a list of strings"),
    ([GOOD_ENTRY | {"target_hard": 5}], "target_hard is not a str"),
  ],
)
def test_cirr_captions_of_another_shape(tmp_path, entries, message):
  write_json(
    tmp_path / "image_splits/split.rc2.val.json", {"dev-63-0-img1": "./dev/a.png"}
  )
  paint(tmp_path / "dev/a.png")
  captions = tmp_path / "captions/cap.rc2.val.json"
  write_json(captions, [GOOD_ENTRY])
  (task,) = open_benchmark("cirr", str(tmp_path), Options()).tasks
  assert task.notes["sizes"] == {"queries": [1, 4181], "candidates": [1, 2297]}
  write_json(captions, entries)
  with pytest.raises(UserError, match=rf"rc2\.val\.json:? .*{message}"):
    open_benchmark("cirr", str(tmp_path), Options())


@pytest.mark.parametrize("entries", [5, [], [{"candidate": "a", "target": "b"}]])
def test_fashioniq_captions_of_another_shape(tmp_path, entries):
  write_json(tmp_path / "captions/cap.dress.val.json", entries)
  with pytest.raises(UserError, match=r"cap\.dress\.val\.json"):
    open_benchmark("fashioniq", str(tmp_path), Options(tasks=("dress",)))


def test_fashioniq_sizes_and_rules_on_the_real_annotations(fashioniq):
  names = ("dress", "shirt", "toptee", "mbeir")
  benchmark = open_benchmark("fashioniq", str(fashioniq), Options(tasks=names))
  sizes = [(len(t.queries), len(t.scorings[0].pool[0])) for t in benchmark.tasks]
  assert sizes == [(2017, 3817), (2038, 6346), (1961, 5373), (6003, 74381)]
  for task in benchmark.tasks:
    assert task.notes["official_size"]
    plain, masked = task.scorings
    assert (plain.name, masked.name) == ("unmasked", "masked")
    assert plain.excluded is None
    rows = masked.excluded[:, 0]
    names = task.scorings[0].pool[0].ids.to_pylist()
    references = task.queries.images.to_pylist()
    held = [
      name if row < 0 else names[row]
      for name, row in zip(references, rows, strict=True)
    ]
    assert held == references
  assert benchmark.tasks[3].scorings[0].cutoffs == (10, 20, 50)


def test_fashioniq_means_of_three_categories_masked_and_not(fashioniq, tmp_path):
  benchmark = open_benchmark("fashioniq", str(fashioniq), Options())
  targets = {}
  for category in ("dress", "shirt", "toptee"):
    entries = json.loads((fashioniq / f"captions/cap.{category}.val.json").read_text())
    for entry in entries:
      text = clean_caption(" and ".join(entry["captions"]))
      targets[entry["candidate"], text] = entry["target"]
  oracle = Oracle(lambda image, text: targets[image, text], tilt=0.6)
  result = evaluated(benchmark, oracle)
  assert list(result["tasks"]) == ["dress", "shirt", "toptee"]
  for scoring in ("unmasked", "masked"):
    rows = [t["scores"][scoring]["recall"]["10"] for t in result["tasks"].values()]
    assert min(rows) > 99
    mean = result["summary"][f"mean of 3 categories, {scoring}, R@10"]
    assert mean == pytest.approx(np.mean(rows))
  one = open_benchmark("fashioniq", str(fashioniq), Options(tasks=("dress",)))
  run = tmp_path / "run"
  assert set(evaluated(one, oracle, export_run=str(run))["summary"].values()) == {None}
  first = {}
  for scoring in ("unmasked", "masked"):
    lines = (run / "dress" / scoring / "run.trec").read_text().splitlines()
    best = [line.split() for line in lines if line.split()[3] == "1"]
    first[scoring] = [fields[2] for fields in best]
  references = benchmark.tasks[0].queries.images.to_pylist()
  assert first["unmasked"] == references
  masked = zip(first["masked"], references, strict=True)
  assert not any(found == reference for found, reference in masked)


def test_texts_of_fashioniq():
  pair = ["Is shiny and silver.", "fit, and (flare)!"]
  assert mbeir_text(pair) == "Is shiny and silver and fit, and (flare)!"
  assert clean_caption(" and ".join(pair)) == "is shiny and silver and fit, and flare"
  assert len(clean_caption("word " * 50).split()) == 30


def test_fashioniq_files_that_do_not_fit(fashioniq, tmp_path):
  (fashioniq / "captions").unlink()
  with pytest.raises(
    UserError, match=r"(?s)lacks captions/cap.dress.val.json.*images/"
  ):
    open_benchmark("fashioniq", str(fashioniq), Options())
  entry = {"candidate": "B005X4PL1G", "target": "nobody", "captions": ["a", "b"]}
  path = fashioniq / "captions/cap.dress.val.json"
  write_json(path, [entry])
  with pytest.raises(UserError, match="the target nobody of dress is in none"):
    open_benchmark("fashioniq", str(fashioniq), Options(tasks=("dress",)))
  lists = fashioniq / "image_splits"
  lists.unlink()
  write_json(lists / "split.dress.val.json", {"B005X4PL1G": "train"})
  with pytest.raises(UserError, match="is no list of names"):
    open_benchmark("fashioniq", str(fashioniq), Options(tasks=("dress",)))
  del entry["target"]
  write_json(path, [entry])
  with pytest.raises(UserError, match=r"val\.json: an entry lacks 'target'"):
    open_benchmark("fashioniq", str(fashioniq), Options(tasks=("dress",)))


def write_composed(root):
  lines = [
    {"reference": f"i{k}.png", "text": f"to {k + 1}", "target": f"i{k + 1}.png"}
    | {"kind": "odd" if k % 2 else "even", "split": "train" if k == 5 else "test"}
    for k in range(6)
  ]
  write_lines(root / "composed.jsonl", lines)
  write_lines(root / "captions.jsonl", [{"image": f"i{k}.png"} for k in range(20)])
  for k in range(20):
    paint(root / f"i{k}.png")


def test_composed_queries_of_ones_own(tmp_path):
  write_composed(tmp_path)
  benchmark = open_benchmark("composed", str(tmp_path), Options())

  def answer(image, text):
    return f"i{re.search('[0-9]+', text)[0]}.png"

  result = evaluated(benchmark, Oracle(answer, tilt=0.6))
  blocks = result["tasks"]["composed"]["scores"]
  assert {name: b["queries"] for name, b in blocks.items()} == {
    "all": 5,
    "even": 3,
    "odd": 2,
  }
  assert all(b["recall"]["1"] == 100 for b in blocks.values())
  assert blocks["all"]["candidates"] == 20
  assert not result["partial"]


def test_a_missing_picture_makes_composed_queries_partial(tmp_path):
  write_composed(tmp_path)
  (tmp_path / "i1.png").unlink()  # a target, and another query's reference
  benchmark = open_benchmark("composed", str(tmp_path), Options())
  result = evaluated(benchmark, Embedder(lambda path: vector(str(path))), names=False)
  assert result["partial"]
  block = result["tasks"]["composed"]["scores"]["all"]
  assert block["queries"] == 3
  assert block["partial"]["queries_left_out"] == 2
  assert block["partial"]["candidates_left_out"] == 1


@pytest.mark.parametrize(
  "kind", ["../../../evil", "", "all", ".", "..", "a/b", "a b", "x" * 61]
)
def test_kinds_that_cannot_name_a_folder(tmp_path, kind):
  write_composed(tmp_path)
  path = tmp_path / "composed.jsonl"
  path.write_text(path.read_text().replace('"odd"', json.dumps(kind)))
  with pytest.raises(UserError, match=r"composed\.jsonl: .* cannot be a kind: name"):
    open_benchmark("composed", str(tmp_path), Options())


def test_emoji_in_their_zip(real_data):
  benchmark = open_benchmark("composed", str(real_data / "emoji"), Options())
  (task,) = benchmark.tasks
  assert [(s.name, len(s.asked)) for s in task.scorings] == [
    ("all", 556),
    ("style", 278),
    ("content", 278),
  ]
  assert len(task.scorings[0].pool[0]) == 5484
  names = task.queries.images.to_pylist()[:3]
  assert not benchmark.pictures.missing(names).any()
  assert all(data[:4] == b"RIFF" for data in benchmark.pictures.load(names))
  assert benchmark.pictures.load(["nobody.webp"]) == [None]


def test_composed_lines_that_are_not(tmp_path):
  with pytest.raises(UserError, match=r"(?s)lacks composed.jsonl.*\"target\": picture"):
    open_benchmark("composed", str(tmp_path), Options())
  write_composed(tmp_path)
  path = tmp_path / "composed.jsonl"
  good = path.read_text()
  for line, message in (
    ("{", r"line 7: "),
    ('{"reference": "i0.png", "text": "a"}', r"lacks 'target'"),
    ('{"reference": 1, "text": "a", "target": "b"}', r"line 7: reference is not a str"),
  ):
    path.write_text(good + line + "\n")
    with pytest.raises(UserError, match=message):
      open_benchmark("composed", str(tmp_path), Options())
  path.write_text(good.replace('"test"', '"train"'))
  with pytest.raises(UserError, match="no query of the split test"):
    open_benchmark("composed", str(tmp_path), Options())
