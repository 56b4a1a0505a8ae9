"""The protocol on Flickr8k, the emoji and the scenes, with a cheap embedder."""

import zlib

import numpy as np
import pytest

from gcl_jax.data import collapse, open_source
from gcl_jax.evaluation import build_items, evaluate_nine, render
from gcl_jax.evaluation.nine import CELLS, cell_name
from gcl_jax.processing import decode_image

DAGGER = {"i->i", "i->it", "it->i", "it->it"}


def histogram(image):
  """(64,) colours of a picture of 16 x 16."""
  small = np.asarray(decode_image(image).resize((16, 16)))
  codes = (small // 64).reshape(-1, 3) @ [16, 4, 1]
  return np.sqrt(np.bincount(codes, minlength=64))


def bag(text):
  """(64,) words of a text."""
  words = [zlib.crc32(word.encode()) % 64 for word in text.casefold().split()]
  return np.sqrt(np.bincount(words, minlength=64))


def embed(images, texts):
  """Pictures and texts in halves of their own: segregated, and blind across."""
  rows = np.zeros((len(images), 128), np.float32)
  for row, image, text in zip(rows, images, texts, strict=True):
    if image is not None:
      half = histogram(image)
      row[:64] = half / np.linalg.norm(half)
    if text is not None:
      half = bag(text)
      row[64:] = half / max(np.linalg.norm(half), 1e-6)
  return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def check(items, result):
  """No query is a document; cells and counts fit."""
  documents = {collapse(i.document_caption) for i in items if i.document_caption}
  for item in items:
    if item.query_caption is not None and not item.one_caption:
      assert collapse(item.query_caption) not in documents
  n = len(items)
  for pool in ("local", "global"):
    for q, c in CELLS:
      cell = result["plain"][pool]["cells"][cell_name(q, c)]
      assert cell["queries"] <= n
      assert cell["pool"] <= n
  assert max(map(len, render({"histogram": result}).splitlines())) <= 100


def test_flickr8k(real_data, tmp_path):
  settings = {"path": str(real_data / "flickr8k"), "cache_dir": str(tmp_path)}
  source = open_source(settings, split="test")
  items = build_items(source)
  assert items.counts["items"] == 1_000
  assert items.counts["cropped_views"] == 1_000
  assert items.counts["one_caption"] == 0
  assert items.counts["dropped_text_queries"] == 0
  items = build_items(source, limit=200)
  result = evaluate_nine(items, embed)
  check(items, result)
  for pool in ("local", "global"):
    cells = result["plain"][pool]["cells"]
    assert {cell["queries"] for cell in cells.values()} == {200}
    assert {cell["pool"] for cell in cells.values()} == {200}
    assert {name for name, cell in cells.items() if cell["marked"]} == DAGGER
  cells = result["plain"]["local"]["cells"]
  assert cells["i->i"]["R@1"] > 10  # why these cells are marked
  assert cells["t->t"]["R@1"] > 3
  assert cells["t->i"]["R@10"] < 12
  assert result["plain"]["own_share"]["image"] > 95
  assert result["plain"]["own_share"]["text"] > 60
  assert result["items"]["bad_images"] == 0


def test_emoji(real_data, tmp_path):
  settings = {"path": str(real_data / "emoji"), "cache_dir": str(tmp_path)}
  source = open_source(settings, split="all")
  items = build_items(source)
  counts = items.counts
  assert counts["records"] == 5_484
  assert counts["items"] == 1_371
  assert counts["cropped_views"] == 0  # four vendors: true views
  vendors = set()
  documents = set()
  for k, item in enumerate(items):
    assert item.document_picture.record != item.query_picture.record
    vendors.add(item.document_picture.record % 4)
    documents.add(bytes(items.document_picture(k)))
  assert len(vendors) == 4
  assert len(documents) == 1_370  # Fluent draws 1f431 and 1f63a alike
  assert not any(bytes(items.query_picture(k)) in documents for k in range(len(items)))

  items = build_items(source, limit=400)
  counts = items.counts
  assert counts["one_caption"] > 0
  assert counts["dropped_text_queries"] > 0
  result = evaluate_nine(items, embed, center="plain")
  check(items, result)
  cells = result["plain"]["global"]["cells"]
  assert not any(cell["marked"] for cell in cells.values())
  assert cells["i->i"]["queries"] == 400
  asked = 400 - counts["one_caption"] - counts["dropped_text_queries"]
  assert cells["t->t"]["queries"] == asked
  assert cells["it->it"]["queries"] == asked
  assert cells["t->i"]["queries"] == 400 - counts["dropped_text_queries"]
  assert asked > 380


def test_scenes():
  items = build_items(open_source({"source": "scenes"}, split="eval"), limit=200)
  assert items.counts["items"] == 200
  for name in ("cropped_views", "one_caption", "dropped_text_queries"):
    assert items.counts[name] == 0
  result = evaluate_nine(items, embed)
  check(items, result)
  for pool in ("local", "global"):
    for cell in result["plain"][pool]["cells"].values():
      assert (cell["queries"], cell["pool"], cell["marked"]) == (200, 200, False)
  assert result["plain"]["local"]["other"]["R@10"] == pytest.approx(20, abs=20)
