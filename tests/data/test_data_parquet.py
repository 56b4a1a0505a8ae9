"""Parquet: rows of any of the usual layouts, read by row groups."""

from __future__ import annotations

import datetime
import io
import pickle
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import logging
from PIL import Image

from gcl_jax.data import BadRecord, Pipeline, open_source
from gcl_jax.data.parquet import ParquetRows, RowGroups
from gcl_jax.errors import UserError


def picture(i):
  file = io.BytesIO()
  Image.new("RGB", (4, 4), (i, 0, 0)).save(file, "PNG")
  return file.getvalue()


def write(path, rows, schema=None, row_group_size=2):
  path.parent.mkdir(parents=True, exist_ok=True)
  table = pa.Table.from_pylist(rows, schema)
  pq.write_table(table, path, row_group_size=row_group_size)


def pairs(first, count):
  return [
    {"image": picture(i), "captions": [f"text {i}", "more"]}
    for i in range(first, first + count)
  ]


def opened(path, split="all", **fields):
  return open_source({"source": "parquet", "path": str(path), **fields}, split=split)


def test_rows_of_several_files(tmp_path):
  write(tmp_path / "a.parquet", pairs(0, 5))
  write(tmp_path / "sub/b.parquet", pairs(5, 2))
  source = opened(tmp_path)
  for i, record in enumerate(pickle.loads(pickle.dumps(source))):
    assert list(record["images"]) == [picture(i)]
    assert record["texts"] == [f"text {i}", "more"]
    assert record["group"] == record["id"]
    assert "split" not in record and record["meta"] == {}
  assert [r["id"] for r in source] == [*(f"a/{i}" for i in range(5)), "sub/b/0", "sub/b/1"]
  assert len(opened(tmp_path / "a.parquet")) == 5
  assert len(opened(f"{tmp_path}/s*/?.parquet")) == 2


@pytest.mark.parametrize(
  ("stored", "expected"),
  [
    (b"raw", [b"raw"]),
    ({"bytes": b"raw", "path": "x.jpg"}, [b"raw"]),
    ({"bytes": b"raw", "path": None}, [b"raw"]),
    ({"bytes": None, "path": "1.png"}, [picture(1)]),
    ([b"one", b"two"], [b"one", b"two"]),
    ([{"bytes": b"one", "path": ""}, {"bytes": b"two", "path": ""}], [b"one", b"two"]),
    ("1.png", [picture(1)]),
    (["1.png"], [picture(1)]),
    (None, []),
  ],
)
def test_how_pictures_are_stored(tmp_path, stored, expected):
  kind = pa.array([stored if stored is not None else b"", stored]).type
  rows = [
    {"image": stored, "caption": "x"},
    {"image": b"y" if stored is None else stored, "caption": "y"},
  ]
  schema = pa.schema([("image", kind), ("caption", pa.string())])
  write(tmp_path / "a.parquet", rows, schema)
  (tmp_path / "1.png").write_bytes(picture(1))
  images = opened(tmp_path, caption_column="caption")[0]["images"]
  got = [image if isinstance(image, bytes) else open(image, "rb").read() for image in images]
  assert got == expected and len(images) == len(expected)


def test_groups(tmp_path):
  rows = [{"image": f"{i // 2}.png", "captions": [f"{i}"]} for i in range(40)]
  for i in range(20):
    (tmp_path / f"{i}.png").write_bytes(picture(i))
  write(tmp_path / "a.parquet", rows)
  source = opened(tmp_path)
  assert [r["group"] for r in source] == [f"{i // 2}.png" for i in range(40)]
  groups = [{r["group"] for r in opened(tmp_path, s)} for s in ("train", "eval")]
  assert not groups[0] & groups[1] and len(groups[0] | groups[1]) == 20
  rows = [{"image": picture(i), "captions": ["x"], "product": i // 2} for i in range(40)]
  write(tmp_path / "a.parquet", rows)
  fields = {"group_column": "product"}
  groups = [{r["group"] for r in opened(tmp_path, s, **fields)} for s in ("train", "eval")]
  assert not groups[0] & groups[1] and groups[0] | groups[1] == set(map(str, range(20)))


def test_splits(tmp_path):
  write(tmp_path / "train-0.parquet", pairs(0, 3))
  write(tmp_path / "test-0.parquet", pairs(3, 2))
  assert [len(opened(tmp_path, s)) for s in ("train", "eval", "test")] == [3, 2, 2]
  rows = [p | {"split": s} for p, s in zip(pairs(0, 3), ["dev", None, " "], strict=True)]
  write(tmp_path / "train-0.parquet", rows)
  splits = [r["split"] for r in opened(tmp_path)]
  assert splits == ["test", "test", "dev", "train", "train"]


def test_other_columns(tmp_path):
  day = datetime.date(2024, 1, 2)
  extra = {"id": 7, "price": 1.5, "day": day, "mask": b"x", "vector": [1.0], "box": {"x": 1}}
  write(tmp_path / "a.parquet", [pairs(0, 1)[0] | extra])
  (record,) = opened(tmp_path)
  assert record["id"] == "7" and record["meta"] == {"price": 1.5, "day": day}


def test_bad_rows_are_bad_records(tmp_path, processor):
  rows = [
    {"image": b"no picture", "captions": ["x"]},
    {"image": None, "captions": [None, " "]},
    *pairs(2, 4),
  ]
  write(tmp_path / "a.parquet", rows)
  source = opened(tmp_path)
  with pytest.raises(BadRecord, match="a/1 has neither an image nor a caption"):
    source[1]
  with Pipeline(source, processor, batch_size=6, seed=0) as pipeline:
    batch = next(pipeline)
  assert sorted(batch["index"][batch["has_image"]]) == [2, 3, 4, 5]
  rows = [{"image": "/etc/passwd", "captions": ["x"]}, *({"image": "1.png", "captions": ["x"]},) * 5]
  (tmp_path / "1.png").write_bytes(picture(1))
  write(tmp_path / "a.parquet", rows)
  with pytest.raises(BadRecord, match="leads out of the data folder"):
    opened(tmp_path)[0]


def counted(monkeypatch):
  read = []
  original = pq.ParquetFile.read_row_group

  def count(self, group, *args, **kwargs):
    read.append(group)
    return original(self, group, *args, **kwargs)

  monkeypatch.setattr(pq.ParquetFile, "read_row_group", count)
  return read


def test_only_row_groups_that_are_asked_for_are_read(tmp_path, monkeypatch):
  write(tmp_path / "a.parquet", pairs(0, 10))
  source = opened(tmp_path)
  source = pickle.loads(pickle.dumps(source))  # with nothing kept
  read = counted(monkeypatch)
  assert source[5]["texts"][0] == "text 5" and read == [2]
  assert source[4]["texts"][0] == "text 4" and read == [2]
  [source[i] for i in range(10)]
  assert sorted(read) == [0, 1, 2, 3, 4]


def test_row_groups_are_let_go_of_oldest_first():
  kept = RowGroups(limit=100)
  tables = {k: pa.table({"x": pa.array(range(5))}) for k in "abc"}
  for k in "ab":
    kept.put(k, tables[k])
  kept.put("a", tables["a"])  # a second time changes nothing
  assert kept.get("a") is tables["a"]
  kept.put("c", tables["c"])
  assert kept.get("b") is None and kept.get("a") is tables["a"]
  kept.put("large", pa.table({"x": pa.array(range(1000))}))
  assert kept.get("large") is not None and kept.get("a") is kept.get("c") is None


def test_threads_read_the_same(tmp_path):
  write(tmp_path / "a.parquet", pairs(0, 60), row_group_size=7)
  source, wrong = opened(tmp_path), []
  for file in source._files:
    file._kept._limit = 1  # so that they read again and again

  def read(seed):
    for i in np.random.default_rng(seed).integers(60, size=100):
      if source[i]["texts"][0] != f"text {i}":
        wrong.append(i)

  threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


def test_large_row_groups_are_warned_of(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
  monkeypatch.setattr("gcl_jax.data.parquet._HEAVY_BYTES", 400)
  write(tmp_path / "a.parquet", pairs(0, 4), row_group_size=1)
  opened(tmp_path)
  assert not said
  write(tmp_path / "a.parquet", pairs(0, 40), row_group_size=40)
  opened(tmp_path)
  assert "a record in random order costs one" in said[0] and "gcl_jax.data.pack" in said[0]


def test_the_index_is_kept(tmp_path, own_cache, monkeypatch):
  write(tmp_path / "a.parquet", [p | {"split": "train"} for p in pairs(0, 4)])
  opened(tmp_path)
  assert list(own_cache.rglob("*.npy"))
  with monkeypatch.context() as patch:
    patch.setattr(ParquetRows, "rows", None)
    assert len(opened(tmp_path)) == 4
  write(tmp_path / "a.parquet", pairs(0, 5))
  assert len(opened(tmp_path)) == 5


def test_from_a_bucket_only_what_is_needed_is_read(tmp_path, bucket, processor):
  rng = np.random.default_rng(0)
  rows = [{"image": rng.bytes(50_000), "captions": [f"{i}"]} for i in range(20)]
  write(tmp_path / "a.parquet", rows)
  url = bucket(tmp_path)
  source = opened(url)
  store = type(source._files[0].shard.path._fs)
  source = pickle.loads(pickle.dumps(source))
  read = []
  original = io.BytesIO.read
  file = source._files[0]._opened()  # in memory it is a file that counts what is read
  assert file.num_row_groups == 10
  handle = store.store["/bucket/data/a.parquet"]
  type(handle).read = lambda self, n=-1: read.append(n) or original(self, n)
  try:
    assert source[7]["images"][0] == rows[7]["image"]
  finally:
    del type(handle).read
  assert 100_000 <= sum(read) < 110_000
  assert [r["texts"] for r in source] == [r["captions"] for r in rows]


@pytest.mark.parametrize(
  ("content", "fields", "message"),
  [
    (b"PAR1 no PAR1", {}, r"a\.parquet cannot be read as Parquet"),
    (None, {}, r"there is no \.parquet file"),
    ([{"img": b"", "captions": "x"}], {}, 'no column "image", did you mean "img"'),
    ([{"image": b"", "caption": "x"}], {}, 'no column "captions", did you mean "caption"'),
    (pairs(0, 1), {"group_column": "products"}, 'no column "products"'),
    (
      [{"image": "gone.png", "captions": "x"}] * 5,
      {},
      r"none of 4 rows tried.*gone\.png is not there.*image_root",
    ),
    ([{"image": 5, "captions": "x"}] * 5, {}, '"image" holds a int and not a text'),
  ],
)
def test_bad_input(tmp_path, content, fields, message):
  if isinstance(content, bytes):
    (tmp_path / "a.parquet").write_bytes(content)
  elif content:
    write(tmp_path / "a.parquet", content)
  with pytest.raises(UserError, match=message):
    opened(tmp_path, **fields)


def test_no_rows(tmp_path):
  schema = pa.schema([("image", pa.binary()), ("captions", pa.string())])
  write(tmp_path / "a.parquet", [], schema)
  with pytest.raises(UserError, match="holds no row"):
    opened(tmp_path)


def test_the_sample_of_real_parquet(real_data, processor):
  source = opened(real_data / "parquet_sample")
  tars = {"source": "webdataset", "path": str(real_data / "webdataset_sample")}
  tars = {r["meta"]["file_name"]: r for r in open_source(tars, split="all")}
  assert [len(opened(real_data / "parquet_sample", s)) for s in ("train", "eval")] == [120, 40]
  for record in source:
    other = tars[record["meta"]["file_name"]]
    assert list(record["images"]) == other["images"]
    assert record["texts"] == other["texts"] and record["split"] == other["split"]
  with Pipeline(source, processor, batch_size=200, seed=0) as pipeline:
    assert next(pipeline)["has_image"].all()
