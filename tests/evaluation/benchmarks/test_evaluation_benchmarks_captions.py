"""COCO and Flickr30k, both ways; people's judgements of Flickr8k."""

import gzip

import numpy as np
import pytest
from benchmark_cases import Embedder, evaluated, paint, vector, write_json, write_lines
from scipy.stats import kendalltau

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks import Options, open_benchmark
from gcl_jax.evaluation.benchmarks import karpathy as karpathy_module


def karpathy(captions, *, cocoid=True):
  """Karpathy's form: five captions a picture and one too many, and another split."""
  images = [
    {
      "filename": f"{n:05d}.jpg",
      "imgid": n,
      "split": "test",
      "sentences": [{"raw": text} for text in [*found, "a sixth"]],
    }
    | ({"filepath": "val2014", "cocoid": n} if cocoid else {})
    for n, found in enumerate(captions)
  ]
  images.insert(3, {**images[0], "filename": "other.jpg", "split": "restval"})
  return {"dataset": "coco", "images": images}


def write_coco(root, real_data, pictures):
  """The real captions of so many pictures of the 5K split, with made-up file names."""
  packed = real_data / "annotations/coco_karpathy_precomp/testall_caps.txt.gz"
  lines = gzip.decompress(packed.read_bytes()).decode().splitlines()[: 5 * pictures]
  groups = [lines[k : k + 5] for k in range(0, len(lines), 5)]
  write_json(root / "dataset_coco.json", karpathy(groups))
  paint(root / "val2014/00000.jpg")
  return groups


def test_the_sizes_of_coco(tmp_path, real_data):
  write_coco(tmp_path, real_data, 5000)
  i2t, t2i = open_benchmark("coco", str(tmp_path), Options()).tasks
  assert (len(i2t.queries), len(t2i.queries)) == (5000, 25_000)
  for task in (i2t, t2i):
    assert [s.name for s in task.scorings] == [
      "5K",
      *(f"fold {k}" for k in range(1, 6)),
    ]
    assert task.notes["official_size"]
    folds = np.concatenate([s.asked for s in task.scorings[1:]])
    np.testing.assert_array_equal(folds, np.arange(len(task.queries)))
    assert sum(s.allowed.astype(int) for s in task.scorings[1:]).tolist() == [1] * len(
      task.scorings[0].pool[0]
    )


def test_coco_and_its_folds(tmp_path, real_data, monkeypatch):
  monkeypatch.setitem(karpathy_module._PICTURES, "coco", 2000)
  groups = write_coco(tmp_path, real_data, 2000)
  # Every picture lies where its first caption does.
  place = {f"val2014/{n:05d}.jpg": group[0] for n, group in enumerate(groups)}
  result = evaluated(
    open_benchmark("coco", str(tmp_path), Options()),
    Embedder(lambda name: vector(place[name], 16), lambda words: vector(words, 16), 16),
  )
  blocks = {name: task["scores"] for name, task in result["tasks"].items()}
  for name, queries, pool in (("i2t", 1000, 5000), ("t2i", 5000, 1000)):
    fold = blocks[name]["fold 2"]
    assert (fold["queries"], fold["candidates"]) == (queries, pool)
    folds = [blocks[name][f"fold {k}"]["recall"]["5"] for k in (1, 2)]
    mean = result["summary"][f"{name}, mean of 2 folds of 1,000, R@5"]
    assert mean == pytest.approx(np.mean(folds))
  # A caption that several pictures share is an answer of its own picture alone.
  captions = [text for group in groups for text in group]
  shared = [text for text in place.values() if captions.count(text) > 1]
  assert shared
  low, high = blocks["i2t"]["2K"]["ties"]["1"]
  assert low == pytest.approx(100 - 100 * len(shared) / 2000)
  assert high == 100
  assert blocks["t2i"]["2K"]["ties"]["1"][0] == pytest.approx(20, abs=0.2)


def test_lists_of_captions_and_lone_ones(tmp_path):
  entries = [
    {
      "image": f"flickr30k-images/{n}.jpg",
      "caption": [f"caption {k} of {n}" for k in range(5)],
    }
    for n in range(4)
  ]
  entries[3]["caption"] = "alone"
  write_json(tmp_path / "flickr30k_test.json", entries)
  paint(tmp_path / "flickr30k-images/2.jpg")
  benchmark = open_benchmark("flickr30k", str(tmp_path), Options(tasks=("t2i",)))
  (task,) = benchmark.tasks
  assert (len(task.queries), len(task.scorings)) == (16, 1)
  assert task.scorings[0].relevant.rows.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3]


def test_flickr_in_karpathys_form(tmp_path):
  data = karpathy([[f"{n} {k}" for k in range(5)] for n in range(6)], cocoid=False)
  write_json(tmp_path / "dataset_flickr30k.json", data)
  paint(tmp_path / "images/00001.jpg")
  benchmark = open_benchmark("flickr30k", str(tmp_path), Options())
  i2t, t2i = benchmark.tasks
  assert (len(i2t.queries), len(t2i.queries)) == (6, 30)
  assert i2t.notes == {
    "official_size": False,
    "sizes": {"queries": [6, 1000], "candidates": [30, 5000]},
  }
  assert i2t.scorings[0].relevant.rows.tolist() == list(range(30))
  assert benchmark.pictures.load(["00001.jpg"]) == [str(tmp_path / "images/00001.jpg")]


def test_caption_files_that_do_not_fit(tmp_path):
  with pytest.raises(
    UserError, match=r"(?s)lacks dataset_coco.json \(or coco_kar.*val2014"
  ):
    open_benchmark("coco", str(tmp_path), Options())
  write_json(tmp_path / "dataset_coco.json", {"images": []})
  with pytest.raises(UserError, match="has no test pictures"):
    open_benchmark("coco", str(tmp_path), Options())
  write_json(tmp_path / "dataset_coco.json", {"pictures": []})
  with pytest.raises(UserError, match="lacks 'images'"):
    open_benchmark("coco", str(tmp_path), Options())
  write_json(tmp_path / "dataset_coco.json", karpathy([["a"] * 5] * 4))
  with pytest.raises(
    UserError, match=r"val2014/00000\.jpg and others were looked for in"
  ):
    open_benchmark("coco", str(tmp_path), Options())


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (7, "holds no list of entries"),
    ({"images": 7}, "holds no list of entries"),
    ([7], "lacks 'image'"),
    ([{"image": 7, "caption": "a"}], "image is not a str"),
    ([{"image": "a.jpg", "caption": [7]}], "caption is not a list of strings"),
    (
      {"images": [{"split": "test", "filename": "a", "sentences": [{}]}]},
      "lacks 'raw'",
    ),
    ({"images": [{"split": "test", "filename": "a", "sentences": 7}]}, "is not a list"),
  ],
)
def test_captions_of_another_shape(tmp_path, data, message):
  write_json(tmp_path / "dataset_coco.json", data)
  with pytest.raises(UserError, match=message):
    open_benchmark("coco", str(tmp_path), Options())


def test_the_experts_of_flickr8k(real_data):
  benchmark = open_benchmark("flickr8k_expert", str(real_data / "flickr8k"), Options())
  (task,) = benchmark.tasks
  assert task.scores.shape == (5822, 3)
  assert task.own.sum() == 158
  assert task.scores[task.own].mean() == pytest.approx(3.96, abs=0.005)
  result = evaluated(benchmark)["tasks"]["expert"]
  assert result["all"]["pairs"] == 5822
  assert result["foreign_texts"]["pairs"] == 5822 - 158
  assert (result["images"], result["partial"]) == (1000, None)
  assert abs(result["all"]["tau_c"]) < 0.05  # a model that knows nothing
  cosines = {}
  for side, column in (("image", 0), ("text", 1)):
    docs = task.images if side == "image" else task.texts
    names = (docs.images if side == "image" else docs.texts).to_pylist()
    rows = np.array([vector(f"{side} {name}") for name in names])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines[side] = rows[task.pairs[:, column]]
  cosine = np.sum(cosines["image"] * cosines["text"], axis=1)
  want = kendalltau(np.repeat(cosine, 3), task.scores.ravel(), variant="c").statistic
  assert result["all"]["tau_c"] == pytest.approx(want, abs=1e-6)


def write_judged(root, scores="1\t2\t3"):
  entries = [{"image": f"images/p{n}.jpg", "captions": [f"c{n}"]} for n in range(3)]
  write_lines(root / "captions.jsonl", entries)
  head = "image\tcaption_of\tcaption_index\tscore_1\tscore_2\tscore_3\n"
  rows = [f"p{n}.jpg\tp{m}.jpg\t0\t{scores}\n" for n in range(3) for m in range(3)]
  (root / "expert_scores.tsv").write_text(head + "".join(rows))
  for n in range(3):
    paint(root / f"images/p{n}.jpg")


def test_judged_pairs_without_their_picture_are_left_out_and_said(tmp_path):
  write_judged(tmp_path)
  (tmp_path / "images/p1.jpg").unlink()
  benchmark = open_benchmark("flickr8k_expert", str(tmp_path), Options())
  result = evaluated(benchmark, Embedder(lambda path: vector(str(path))), names=False)
  assert result["partial"]
  assert result["tasks"]["expert"]["partial"] == {"pairs_left_out": 3}
  assert result["tasks"]["expert"]["all"]["pairs"] == 6


@pytest.mark.parametrize("scores", ["1\t2", "1\t2\tgood"])
def test_judgements_that_are_none(tmp_path, scores):
  write_judged(tmp_path, scores)
  with pytest.raises(UserError, match=r"expert_scores\.tsv, line 2: "):
    open_benchmark("flickr8k_expert", str(tmp_path), Options())


def test_tables_of_judged_pictures_that_are_none(tmp_path):
  with pytest.raises(UserError, match=r"(?s)lacks captions\.jsonl.*expert_scores\.tsv"):
    open_benchmark("flickr8k_expert", str(tmp_path), Options())
  write_judged(tmp_path)
  table = tmp_path / "captions.jsonl"
  good = table.read_text()
  for line, message in (
    ('{"image": "p.jpg"}', "lacks 'captions'"),
    ('{"image": "p.jpg", "captions": "c"}', "line 4: captions is not a list"),
    ('{"image": "p.jpg", "captions": [5]}', "captions is not a list of strings"),
    ("[", "line 4: "),
  ):
    table.write_text(good + line)
    with pytest.raises(UserError, match=message):
      open_benchmark("flickr8k_expert", str(tmp_path), Options())
