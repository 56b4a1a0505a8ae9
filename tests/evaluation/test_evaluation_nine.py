"""Nine directions: known embedders, and a plain loop over the definition."""

import json
from dataclasses import replace

import numpy as np
import pytest
from evaluation_fakes import (
  embedder,
  perfect,
  record,
  records,
  segregated,
  units,
  whose,
)

from gcl_jax.errors import UserError
from gcl_jax.evaluation import build_items, evaluate_nine
from gcl_jax.evaluation.banks import Banks, embed_items
from gcl_jax.evaluation.nine import CELLS, answer, cell_name, pool_modalities, questions

NAMES = [cell_name(q, c) for q, c in CELLS]
LETTERS = ("i", "t", "it")


def cells(result, pool, view="plain"):
  return result[view][pool]["cells"]


def noisy(n, width=16, noise=1.0):
  """Embeddings that differ by item, modality, view and side."""
  base = units(n, width)

  def embed(images, texts):
    rows = []
    for image, text in zip(images, texts, strict=True):
      k, m = whose(image, text)
      colours = () if image is None else image.convert("RGB").getpixel((0, 0))
      seed = [k, m, *colours, *(text or "").encode()]
      draw = np.random.default_rng(seed).normal(size=width)
      rows.append(base[k] + noise * draw + 0.5 * base[m])  # base[m]: a modality's cone
    rows = np.array(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

  return embed


def test_perfect_model_finds_everything():
  result = evaluate_nine(build_items(records(40)), perfect(40))
  for view in ("plain", "centered"):
    for pool in ("local", "global"):
      for name in NAMES:
        cell = cells(result, pool, view)[name]
        assert cell["R@1"] == 100
        assert cell["median_rank"] == 1
        assert cell["queries"] == 40
        assert cell["pool"] == 40
        assert not cell["marked"]
      assert result[view][pool]["same"]["cells"] == ["i->i", "t->t", "it->it"]
      assert len(result[view][pool]["other"]["cells"]) == 6


def test_constant_model_finds_nothing():
  result = evaluate_nine(build_items(records(60)), embedder(lambda k, m: np.ones(4), 4))
  for view in ("plain", "centered"):  # centred: all rows are zero
    for pool in ("local", "global"):
      for name in NAMES:
        cell = cells(result, pool, view)[name]
        assert cell["R@50"] == 0
        assert cell["median_rank"] == 60
    share = result[view]["own_share"]
    for modality in ("image", "text", "fused"):
      assert share[modality] == pytest.approx(share["no_bias"][modality])
    assert share["mean"] == pytest.approx(100 / 3)


def test_blind_model_is_at_chance():
  n = 400
  result = evaluate_nine(build_items(records(n)), noisy(n, noise=1e6), center="plain")
  for pool in ("local", "global"):
    for group in ("same", "other"):
      mean = result["plain"][pool][group]
      for k in (10, 50):
        error = 4 * mean["se"][f"R@{k}"]
        assert mean["chance"][f"R@{k}"] == pytest.approx(100 * k / n)
        assert abs(mean[f"R@{k}"] - mean["chance"][f"R@{k}"]) < error
  assert cells(result, "local")["t->i"]["median_rank"] == pytest.approx(n / 2, rel=0.2)
  share = result["plain"]["own_share"]
  assert share["mean"] == pytest.approx(100 / 3, abs=4 * share["se"])


def test_segregated_model_is_unmasked_by_the_global_pool():
  embed, base = segregated(60)
  items = build_items(records(60))
  result = evaluate_nine(items, embed)
  plain, centered = result["plain"], result["centered"]
  assert plain["local"]["other"]["R@1"] == 100
  assert plain["global"]["same"]["R@1"] == 100
  assert plain["global"]["other"]["R@1"] == 0
  assert plain["own_share"]["mean"] == 100
  even = dict.fromkeys(("image", "text", "fused"), 100 / 3)
  assert plain["own_share"]["no_bias"] == pytest.approx(even)
  assert plain["gap"]["norm"] == pytest.approx(dict.fromkeys(LETTERS, 0.9))
  delta = dict.fromkeys(("i-t", "i-it", "t-it"), 0.9 * 2**0.5)
  assert plain["gap"]["delta"] == pytest.approx(delta)
  assert plain["gap"]["cosine"] == pytest.approx(dict.fromkeys(delta, 0), abs=1e-6)
  assert plain["gap"]["pair_cosine"] == pytest.approx(dict.fromkeys(delta, 0.19))
  # Centring mends a pure offset: what is left is the content alone.
  assert centered["global"]["other"]["R@1"] == 100
  assert centered["gap"]["delta"] == pytest.approx(dict.fromkeys(delta, 0), abs=1e-6)
  assert centered["gap"]["pair_cosine"] == pytest.approx(dict.fromkeys(delta, 1))
  assert centered["gap"]["cosine"] == dict.fromkeys(delta)
  content = embedder(lambda k, m: np.concatenate([base[k], np.zeros(3)]), 35)
  same = evaluate_nine(items, content, center=False)["plain"]
  assert centered["local"] == same["local"]
  assert centered["global"] == same["global"]
  assert centered["own_share"] == same["own_share"]


def test_top10_share_by_hand():
  # Pools of four pictures, four texts, four fused. Only the modality decides, by its
  # angle: a top 10 holds the four of the nearest, the four of the next, two of the last.
  angle = np.radians([0, 30, 70])
  embed = embedder(lambda k, m: np.array([np.cos(angle[m]), np.sin(angle[m])]), 2)
  items = build_items(records(12))
  placed = tuple(replace(item, code=k) for k, item in enumerate(items))
  plain = evaluate_nine(replace(items, items=placed), embed, center=False)["plain"]
  expected = {"i->i": 40, "i->t": 40, "i->it": 20}
  expected |= {"t->i": 40, "t->t": 40, "t->it": 20}
  expected |= {"it->i": 20, "it->t": 40, "it->it": 40}
  assert plain["top10_share"] == pytest.approx(expected)
  assert plain["own_share"]["image"] == pytest.approx(40)


def odd_records():
  """Two pictures and captions, one caption, no text, no picture; in all pools."""
  source = [record(k) for k in range(12)]
  source += [record(k, captions=1) for k in range(12, 18)]
  source += [record(k, captions=0) for k in range(18, 22)]
  source += [record(k, views=0) for k in range(22, 27)]
  source += [record(k, views=0, captions=1) for k in range(27, 29)]
  return source + [record(k, views=1) for k in range(29, 32)]


def by_definition(items, embed, center):
  """Ranks (pool, q, c) -> {item: rank} from the definition, one query at a time."""

  def vector(image, text):
    return embed([image], [text])[0].astype(np.float64)

  def document(k, m):
    item = items[k]
    if (m != 1 and item.document_picture is None) or (
      m != 0 and item.document_caption is None
    ):
      return None
    image = items.document_picture(k) if m != 1 else None
    return vector(image, item.document_caption if m != 0 else None)

  def centered(row, m):
    row = row - means[m]
    return row / np.linalg.norm(row)

  def query(k, m, c):
    item = items[k]
    if m != 0 and (
      item.query_caption is None or (item.one_caption and (m, c) != (1, 0))
    ):
      return None
    if m != 1 and item.document_picture is None:
      return None
    if m != 1 and c != 1 and item.is_cropped:
      return None  # most items have a second picture
    image = items.query_picture(k) if m != 1 else None
    return vector(image, item.query_caption if m != 0 else None)

  n = len(items)
  documents = {(k, m): document(k, m) for k in range(n) for m in range(3)}
  means = [
    np.mean([documents[k, m] for k in range(n) if documents[k, m] is not None], axis=0)
    for m in range(3)
  ]
  if center:
    documents = {
      (k, m): None if row is None else centered(row, m)
      for (k, m), row in documents.items()
    }
  ranks = {}
  for q, c in CELLS:
    for k in range(n):
      asked = query(k, q, c)
      if asked is None or documents[k, c] is None:
        continue
      asked = centered(asked, q) if center else asked
      local = [documents[j, c] for j in range(n) if documents[j, c] is not None]
      mine = asked @ documents[k, c]
      rank = sum(asked @ d >= mine - 1e-6 for d in local)
      ranks.setdefault(("local", q, c), {})[k] = rank
      r = (c - items[k].code) % 3  # the pool in which k stands as c
      pool = []
      for j in range(n):
        own = [m for m in range(3) if documents[j, m] is not None]
        pool.append(documents[j, own[(items[j].code + r) % 3 if len(own) == 3 else 0]])
      rank = sum(asked @ d >= mine - 1e-6 for d in pool)
      ranks.setdefault(("global", q, c), {})[k] = rank
  return ranks


@pytest.mark.parametrize("view", ["plain", "centered"])
def test_equals_the_definition(view):
  items = build_items(odd_records())
  embed = noisy(32)
  result = evaluate_nine(items, embed, center=view, chunk=5)
  expected = by_definition(items, embed, view == "centered")
  asked = 0
  for q, c in CELLS:
    for pool in ("local", "global"):
      ranks = np.array(list(expected[pool, q, c].values()))
      cell = cells(result, pool, view)[cell_name(q, c)]
      assert cell["queries"] == len(ranks)
      assert cell["median_rank"] == np.median(ranks)
      for k in (1, 5, 10, 50):
        assert cell[f"R@{k}"] == pytest.approx(100 * np.mean(ranks <= k))
      asked += len(ranks)
  assert asked > 100
  assert cells(result, "global", view)["t->i"]["pool"] == 32
  sizes = [cells(result, "local", view)[f"t->{c}"]["pool"] for c in LETTERS]
  assert sizes == [25, 28, 21]


def test_global_pools_hold_every_item_once_and_ask_every_cell_once():
  n = 50
  has = np.ones((3, n), bool)
  has[1:, :4] = False  # pictures alone
  has[[0, 2], 4:7] = False  # texts alone
  codes = np.random.default_rng(0).integers(0, 1 << 32, n)
  modalities = [pool_modalities(has, codes, r) for r in range(3)]
  for k in range(n):
    stands = [m[k] for m in modalities]
    assert sorted(stands) == (
      [0, 1, 2] if k >= 7 else [0, 0, 0] if k < 4 else [1, 1, 1]
    )
  rows = np.random.default_rng(1).normal(size=(3, n, 4)).astype(np.float32)
  banks = Banks(rows, rows, has, has, 0)
  asked = has[:, None] & has[None]
  answers = answer(banks, asked, codes % 3)
  assert ((answers.ranks["global"] > 0) == asked).all()
  assert ((answers.ranks["local"] > 0) == asked).all()
  assert (answers.share_queries == asked.sum(axis=1)).all()


def test_blocks_change_nothing(monkeypatch):
  items = build_items(odd_records())
  whole = evaluate_nine(items, noisy(32))
  monkeypatch.setattr("gcl_jax.evaluation.metrics.BLOCK_ENTRIES", 1_000)
  blocks = evaluate_nine(items, noisy(32))
  for view in ("plain", "centered"):
    for pool in ("local", "global"):
      for name in NAMES:
        a, b = (cells(r, pool, view)[name] for r in (whole, blocks))
        assert a["R@1"] == b["R@1"]
        assert a["median_rank"] == b["median_rank"]
    assert whole[view]["own_share"]["mean"] == blocks[view]["own_share"]["mean"]


def test_order_of_records_changes_nothing():
  source = odd_records()
  there, back = build_items(source), build_items(source[::-1])
  assert evaluate_nine(there, noisy(32)) == evaluate_nine(back, noisy(32))


def test_single_pictures_mark_four_directions():
  result = evaluate_nine(build_items(records(20, views=1)), perfect(20))
  marked = [name for name in NAMES if cells(result, "local")[name]["marked"]]
  assert marked == ["i->i", "i->it", "it->i", "it->it"]
  for pool in ("local", "global"):
    assert result["plain"][pool]["same"]["cells"] == ["t->t"]
    other = ["i->t", "t->i", "t->it", "it->t"]
    assert result["plain"][pool]["other"]["cells"] == other
    assert cells(result, pool)["i->i"]["queries"] == 20  # asked and shown all the same


@pytest.mark.parametrize(
  ("single", "asked", "marked"), [(8, 12, False), (11, 20, True)]
)
def test_mixed_sources_ask_true_views_or_mark(single, asked, marked):
  source = [record(k, views=1 if k < single else 2) for k in range(20)]
  result = evaluate_nine(build_items(source), perfect(20), center=False)
  cell = cells(result, "global")["i->it"]
  assert (cell["queries"], cell["marked"]) == (asked, marked)
  text = cells(result, "global")["i->t"]
  assert (text["queries"], text["marked"]) == (20, False)


def test_marked_cells_do_not_touch_the_means():
  n = 20
  good, noise = perfect(n), units(n, 32, seed=1)

  def embed(images, texts):
    blind = np.array([text is None for text in texts])[:, None]
    own = [whose(*pair)[0] for pair in zip(images, texts, strict=True)]
    return np.where(blind, noise[own], good(images, texts))

  result = evaluate_nine(build_items(records(n, views=1)), embed, center=False)
  local, plain = cells(result, "local"), result["plain"]["local"]
  assert local["i->it"]["R@1"] < 50
  assert local["it->i"]["R@1"] < 50
  assert local["i->i"]["R@1"] == 100
  kept = [local[c]["R@1"] for c in ("i->t", "t->i", "t->it", "it->t")]
  assert plain["other"]["R@1"] == pytest.approx(np.mean(kept))
  assert plain["same"]["R@1"] == local["t->t"]["R@1"]


def test_one_caption_asks_only_for_pictures():
  result = evaluate_nine(build_items(records(30, captions=1)), perfect(30))
  counts = {name: cells(result, "global")[name]["queries"] for name in NAMES}
  asked = {"i->i", "i->t", "i->it", "t->i"}
  assert counts == {name: 30 if name in asked else 0 for name in NAMES}
  empty = cells(result, "local")["t->t"]
  assert empty["R@1"] is None
  assert empty["interval"]["R@1"] is None
  assert result["plain"]["global"]["same"]["cells"] == ["i->i"]
  share = result["plain"]["own_share"]
  assert share["fused"] is None
  assert share["queries"] == {"image": 90, "text": 30, "fused": 0}
  top = result["plain"]["top10_share"]
  assert [top[f"it->{c}"] for c in LETTERS] == [None] * 3
  assert sum(top[f"t->{c}"] for c in LETTERS) == pytest.approx(100)


def test_texts_alone():
  result = evaluate_nine(build_items(records(12, views=0)), perfect(12))
  counts = {name: cells(result, "global")[name]["queries"] for name in NAMES}
  assert counts == {name: 12 if name == "t->t" else 0 for name in NAMES}
  assert result["plain"]["global"]["other"]["R@1"] is None
  assert result["plain"]["gap"]["delta"]["i-t"] is None
  assert result["plain"]["own_share"]["text"] == 100  # nothing else is there
  assert result["plain"]["own_share"]["no_bias"]["text"] == 100


def test_every_document_and_query_is_embedded_once():
  embed = perfect(20)
  done = []
  items = build_items(records(20))
  evaluate_nine(items, embed, chunk=8, progress=lambda a, b: done.append((a, b)))
  assert embed.documents == 6 * 20
  assert done == [(8, 40), (16, 40), (20, 40), (28, 40), (36, 40), (40, 40)]


def test_unreadable_pictures_are_counted_and_left_out():
  n = 20
  source = records(n)
  source[3]["images"] = [b"no picture"] * 2
  source[5]["images"] = [b"\xff\xd8 neither", b"nor this"]
  source += [record(n + k, views=1, captions=0) for k in range(6)]
  for lost in source[n:]:
    lost["images"] = [b"no picture, and no text either"]
  embed = perfect(n)

  def strict(images, texts):
    if any(isinstance(image, bytes) for image in images):
      raise ValueError("cannot read a picture")
    return embed(images, texts)

  result = evaluate_nine(build_items(source), strict, center=False)
  assert result["items"]["bad_images"] == 3 + 6
  assert cells(result, "local")["t->i"]["queries"] == n - 2
  assert cells(result, "local")["t->i"]["pool"] == n - 2
  assert cells(result, "local")["t->t"]["queries"] == n
  assert cells(result, "global")["t->t"]["pool"] == n
  assert result["plain"]["global"]["other"]["R@1"] == 100


def test_an_error_of_the_model_is_not_swallowed():
  embed = perfect(3)

  def broken(images, texts):
    if not broken.calls:
      broken.calls += 1
      raise ValueError("shapes do not fit")
    return embed(images, texts)

  broken.calls = 0

  with pytest.raises(ValueError, match="shapes do not fit"):
    evaluate_nine(build_items(records(3)), broken)


def test_not_finite_embeddings_are_named():
  good = perfect(10)

  def embed(images, texts):
    rows = good(images, texts)
    if images[0] is not None and texts[0] is not None:
      rows[4] = np.nan
    return rows

  message = "1 of 10 fused document embeddings are not finite"
  with pytest.raises(UserError, match=message):
    evaluate_nine(build_items(records(10)), embed)


def test_wrong_shapes_are_refused():
  with pytest.raises(ValueError, match="embed returned"):
    evaluate_nine(build_items(records(4)), lambda i, t: np.ones((1, 3)))
  with pytest.raises(ValueError, match="center"):
    evaluate_nine(build_items(records(4)), perfect(4), center="middle")


def test_views_and_json_round_trip():
  items = build_items(odd_records())
  result = evaluate_nine(items, noisy(32))
  assert json.loads(json.dumps(result, allow_nan=False)) == result
  assert "centered" not in evaluate_nine(items, noisy(32), center=False)
  only = evaluate_nine(items, noisy(32), center=True)
  assert only["centered"] == result["centered"]
  assert "plain" not in only


def test_errors_of_means_come_from_items():
  n = 200
  result = evaluate_nine(build_items(records(n)), noisy(n, noise=0.2), center=False)
  cell = cells(result, "local")["t->i"]
  p = cell["R@1"] / 100
  assert 0.2 < p < 0.95
  assert cell["se"]["R@1"] == pytest.approx(100 * (p * (1 - p) / n) ** 0.5, rel=0.15)
  low, high = cell["interval"]["R@1"]
  assert low < cell["R@1"] < high
  mean = result["plain"]["local"]["other"]
  assert mean["interval"]["R@1"][0] < mean["R@1"] < mean["interval"]["R@1"][1]
  assert mean["se"]["R@1"] < cell["se"]["R@1"]


def test_questions_by_hand():
  items = build_items([record(0), record(1, captions=1), record(2, captions=0)])
  banks = embed_items(items, perfect(3))
  asked, marked = questions(items, banks)
  assert not marked.any()
  place = {item.name: k for k, item in enumerate(items)}
  assert asked[:, :, place["item 0"]].all()
  assert asked[:, :, place["item 1"]].tolist() == [
    [True, True, True],
    [True, False, False],
    [False, False, False],
  ]
  assert asked[:, :, place["item 2"]].tolist() == [
    [True, False, False],
    [False, False, False],
    [False, False, False],
  ]
