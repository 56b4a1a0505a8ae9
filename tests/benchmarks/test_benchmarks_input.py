"""The input benchmark: that all loaders do the same work, and what its rows say."""

import importlib.util
import io
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import input as benchmark
from gcl_jax.errors import UserError


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
  source = benchmark.made_up(24, size=(40, 30))
  folder = tmp_path_factory.mktemp("input")
  return benchmark.prepare(source, folder, pairs=20, size=16, batch_size=8)


def test_made_up_pictures_cost_what_photographs_do():
  (record,) = benchmark.made_up(1)
  assert Image.open(io.BytesIO(record["images"][0])).size == (500, 375)
  assert 50_000 < len(record["images"][0]) < 90_000


def test_layouts_hold_the_same_pairs(setting):
  for pictures, layouts in (
    ("raw", ("files", "tar")),
    ("resized", ("files", "tar", "packed")),
  ):
    found = []
    for layout in layouts:
      source = setting.source(layout, pictures)
      assert len(source) == 20
      found.append([benchmark._loaded(source[i]) for i in range(20)])
    assert all(other == found[0] for other in found[1:])
  raw, _ = found[0][0]
  assert Image.open(io.BytesIO(raw)).size == (21, 16)


def test_stages(setting):
  rows = benchmark.measure_stages(setting, repeats=1)
  assert len(rows) == 3 * len(benchmark._STAGES)
  assert {row["source"] for row in rows} == {"files", "tar", "packed"}
  assert all(row["pairs_per_cpu_s"] > 0 and row["pairs"] == 16 for row in rows)
  assert len(benchmark.stage_table(rows).splitlines()) == 2 + len(benchmark._STAGES)


def loaders():
  return [row for row in benchmark.ROWS if importlib.util.find_spec(row[0])]


@pytest.mark.parametrize("row", loaders(), ids=" ".join)
def test_every_loader_gives_the_pictures_and_tokens_that_are_there(setting, row):
  loader, layout, pictures = row
  processor = setting.processor
  expected = {}
  source = setting.source("tar", pictures)
  for i in range(len(source)):
    raw, text = benchmark._loaded(source[i])
    pixels = processor.image.pixels(raw)
    expected[pixels.tobytes()] = processor.tokenizer([text], 77)[0]
  stream = benchmark.LOADERS[loader](setting, layout, pictures, 0)
  for _ in range(3):
    pixels, tokens = (np.asarray(array) for array in next(stream))
    assert pixels.shape == (8, 16, 16, 3) and pixels.dtype == np.uint8
    for picture, row_tokens in zip(pixels, tokens, strict=True):
      whole = expected[picture.tobytes()]
      np.testing.assert_array_equal(whole[: len(row_tokens)], row_tokens)
  stream.close()


def test_rows(setting, monkeypatch):
  monkeypatch.setattr(
    benchmark, "find_spec", lambda name: None if name == "webdataset" else True
  )
  rows = benchmark.measure_loaders(
    setting, workers=0, batches=2, repeats=1, isolated=False
  )
  assert [row["loader"] for row in rows] == [name for name, _, _ in benchmark.ROWS]
  for row in json.loads(json.dumps(rows)):
    if row["loader"] == "webdataset":
      assert row["missing"] == "not installed"
    else:
      assert (
        row["pairs"] == 16 and row["pairs_per_s"] > 0 and row["pairs_per_cpu_s"] > 0
      )
      assert row["ratio_to"] == "torch files raw"
  assert rows[0]["ratio"] == 1
  assert len(benchmark.loader_table(rows).splitlines()) == 2 + len(benchmark.ROWS)


def test_a_turn_in_a_process_of_its_own(setting):
  rows = [("gcl_jax", "packed", "resized")]
  (row,) = benchmark.measure_loaders(
    setting, workers=1, batches=1, repeats=1, rows=rows
  )
  assert row["pairs"] == 8 and row["ratio"] == 1


def test_too_few_pairs(tmp_path):
  with pytest.raises(UserError, match="less than a batch"):
    benchmark.prepare(
      benchmark.made_up(3, (40, 30)), tmp_path, pairs=3, size=16, batch_size=4
    )
