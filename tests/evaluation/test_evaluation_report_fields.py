"""What the evaluation stores for a report: counts by k, a sketch, examples."""

import base64
import io
import json

import numpy as np
import pytest
from evaluation_fakes import embedder, perfect, picture, records, segregated, units
from PIL import Image

from gcl_jax.evaluation import build_items, evaluate_nine
from gcl_jax.evaluation.metrics import ladder
from gcl_jax.evaluation.nine import CELLS, cell_name
from gcl_jax.evaluation.sketch import sketch
from gcl_jax.processing.thumbnail import thumbnail


@pytest.mark.parametrize(
  ("pool", "ks"),
  [(1, [1]), (2, [1, 2]), (3, [1, 2, 5]), (50, [1, 2, 5, 10, 20, 50])],
)
def test_the_ladder_ends_at_the_pool(pool, ks):
  assert ladder(pool) == ks
  assert ladder(51)[-2:] == [50, 100]


def test_counts_agree_with_the_recalls():
  base = units(60, 8)
  noise = np.random.default_rng(1).normal(size=(3, 60, 8))
  embed = embedder(lambda k, m: base[k] + 0.3 * noise[m, k], 8)
  result = evaluate_nine(build_items(records(60)), embed, center="plain")
  for pool in ("local", "global"):
    part = result["plain"][pool]
    assert part["ladder"] == [1, 2, 5, 10, 20, 50, 100]
    for q, c in CELLS:
      cell = part["cells"][cell_name(q, c)]
      found = dict(zip(part["ladder"], cell["found"], strict=True))
      assert found[100] == cell["queries"] == 60
      for k in (1, 5, 10, 50):
        assert cell[f"R@{k}"] == pytest.approx(100 * found[k] / 60)
  assert 0 < result["plain"]["local"]["other"]["R@5"] < 100  # it could have failed


def test_the_sketch_shows_the_gap():
  items = build_items(records(60))
  result = evaluate_nine(items, segregated(60)[0], points=20)
  plain, centered = result["plain"]["sketch"], result["centered"]["sketch"]
  means = {m: np.array(plain[m]["mean"]) for m in ("image", "text", "fused")}
  delta = result["plain"]["gap"]["delta"]["i-t"]
  assert np.linalg.norm(means["image"] - means["text"]) == pytest.approx(
    delta, abs=2e-3
  )
  assert np.linalg.norm(means["image"] - means["fused"]) == pytest.approx(
    delta, abs=2e-3
  )
  for m in means:
    points = np.stack([plain[m]["x"], plain[m]["y"]], axis=1)
    assert points.shape == (20, 2)
    assert np.linalg.norm(points - means[m], axis=1).max() < 0.2  # a tight cone
    assert np.linalg.norm(centered[m]["mean"]) < 2e-3
  assert plain["explained"][0] >= plain["explained"][1] > 30
  assert json.loads(json.dumps(plain)) == plain
  assert "sketch" not in evaluate_nine(items, segregated(60)[0])["plain"]


def test_a_sketch_without_pictures():
  rows = np.concatenate([np.zeros((1, 9, 4)), units(18, 4).reshape(2, 9, 4)])
  has = np.array([[False] * 9, [True] * 9, [True] * 9])
  drawn = sketch(rows.astype(np.float32), has, 5)
  assert drawn["image"] == {"x": [], "y": [], "mean": None}
  assert len(drawn["text"]["x"]) == 5


def pixel(uri):
  head, code = uri.split(",")
  assert head == "data:image/jpeg;base64"
  return Image.open(io.BytesIO(base64.b64decode(code)))


def test_examples_of_a_perfect_and_of_a_segregated_model():
  items = build_items(records(40))
  good = evaluate_nine(items, perfect(40), examples=7)["examples"]
  bad = evaluate_nine(items, segregated(40)[0], examples=7)["examples"]
  queries = [(e["query"], e["answer"], e["item"], e["text"]) for e in good]
  assert queries == [(e["query"], e["answer"], e["item"], e["text"]) for e in bad]
  assert len({e["item"] for e in good}) == 7
  assert [e["query"] + ">" + e["answer"] for e in good][:3] == [
    "text>image",
    "image>text",
    "text>fused",
  ]
  for e in good:
    assert e["query"] != e["answer"]
    assert e["rank"] == 1
    assert [f["right"] for f in e["found"]] == [True, False, False, False, False]
    assert e["found"][0]["item"] == e["item"]
    assert e["found"][0]["modality"] == e["answer"]
    assert [f["score"] for f in e["found"]] == sorted(
      (f["score"] for f in e["found"]), reverse=True
    )
    for shown in (*e["found"], {**e, "modality": e["query"]}):
      assert (shown["text"] is None) == (shown["modality"] == "image")
      assert (shown["image"] is None) == (shown["modality"] == "text")
      if shown["image"]:
        k = int(shown["item"].split()[1])
        red = np.asarray(pixel(shown["image"]).convert("RGB"))[0, 0, 0]
        assert abs(int(red) - k) < 4
  for e in bad:
    assert {f["modality"] for f in e["found"]} == {e["query"]}
    assert not any(f["right"] for f in e["found"])
    assert e["rank"] > 5


def test_examples_leave_out_crops_that_find_themselves():
  items = build_items(records(30, views=1))
  examples = evaluate_nine(items, perfect(30), examples=99)["examples"]
  assert 0 < len(examples) <= 30
  asked = {(e["query"], e["answer"]) for e in examples}
  assert asked == {
    ("text", "image"),
    ("image", "text"),
    ("text", "fused"),
    ("fused", "text"),
  }


def test_a_thumbnail_keeps_nothing_but_pixels():
  out = io.BytesIO()
  exif = Image.Exif()
  exif[0x010E] = "where I live"
  Image.new("RGB", (400, 100)).save(out, "JPEG", exif=exif, comment=b"secret")
  small = thumbnail(out.getvalue(), side=64)
  opened = Image.open(io.BytesIO(small))
  assert opened.size == (64, 16)
  assert b"secret" not in small
  assert b"where I live" not in small
  tiny = Image.open(io.BytesIO(thumbnail(picture(3), side=64)))
  assert tiny.size == (8, 6)
