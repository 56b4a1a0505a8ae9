"""Folders that `datasets` and the hub make."""

from __future__ import annotations

import io
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gcl_jax.data import Pipeline, open_source
from gcl_jax.errors import UserError


def picture(i):
  file = io.BytesIO()
  Image.new("RGB", (4, 4), (i, 0, 0)).save(file, "PNG")
  return file.getvalue()


def rows(first, count):
  return [
    {"image": {"bytes": picture(i), "path": f"{i}.png"}, "captions": [f"text {i}"]}
    for i in range(first, first + count)
  ]


def write_arrow(path, rows, batch=2):
  """As `datasets` writes: the streaming format, in small batches."""
  path.parent.mkdir(parents=True, exist_ok=True)
  table = pa.Table.from_pylist(rows)
  with pa.ipc.new_stream(str(path), table.schema) as writer:
    writer.write_table(table, max_chunksize=batch)


def save_to_disk(folder, *shards, **state):
  """The layout of `Dataset.save_to_disk`."""
  names = [f"data-{k:05d}-of-{len(shards):05d}.arrow" for k in range(len(shards))]
  for name, shard in zip(names, shards, strict=True):
    write_arrow(folder / name, shard)
  (folder / "dataset_info.json").write_text("{}")
  files = [{"filename": name} for name in names]
  content = {"_data_files": files, "_fingerprint": "0", "_split": "train", **state}
  (folder / "state.json").write_text(json.dumps(content))


def write_parquet(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.Table.from_pylist(rows), path)


def opened(path, split="all", **fields):
  data = {"source": "huggingface", "path": str(path), **fields}
  return open_source(data, split=split)


def texts(source):
  return [record["texts"] for record in source]


def test_a_saved_dataset(tmp_path, processor):
  save_to_disk(tmp_path, rows(0, 5), rows(5, 3))
  source = opened(tmp_path)
  assert texts(source) == [[f"text {i}"] for i in range(8)]
  for i, record in enumerate(pickle.loads(pickle.dumps(source))):
    assert list(record["images"]) == [picture(i)]
    assert record["group"] == record["id"] and "split" not in record
  train, held = (opened(tmp_path, s, eval_fraction=0.5) for s in ("train", "eval"))
  assert len(train) + len(held) == 8
  with Pipeline(source, processor, batch_size=8, seed=0) as pipeline:
    assert next(pipeline)["has_image"].all()


def test_a_saved_dict_of_splits(tmp_path):
  # Both were one dataset once, and their own state still says so.
  save_to_disk(tmp_path / "train", rows(0, 5))
  save_to_disk(tmp_path / "test", rows(5, 3))
  (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
  assert texts(opened(tmp_path, "train")) == [[f"text {i}"] for i in range(5)]
  assert texts(opened(tmp_path, "eval")) == [[f"text {i}"] for i in range(5, 8)]
  ids = [record["id"] for record in opened(tmp_path)]
  assert len(set(ids)) == 8 and ids[-1] == "test/data-00000-of-00001/2"


def test_a_folder_of_the_cache(tmp_path):
  write_arrow(tmp_path / "flickr-train-00000-of-00002.arrow", rows(0, 3))
  write_arrow(tmp_path / "flickr-train-00001-of-00002.arrow", rows(3, 2))
  write_arrow(tmp_path / "flickr-test.arrow", rows(5, 2))
  write_arrow(tmp_path / "cache-0123456789.arrow", rows(0, 9))
  assert texts(opened(tmp_path, "train")) == [[f"text {i}"] for i in range(5)]
  assert texts(opened(tmp_path, "test")) == [["text 5"], ["text 6"]]
  assert len(opened(tmp_path)) == 7


def card(folder, head):
  (folder / "README.md").write_text(f"---\n{head}---\n# A data set\n")


def test_a_repository_whose_file_names_tell_the_splits(tmp_path):
  write_parquet(tmp_path / "data/train-00000-of-00001.parquet", rows(0, 4))
  write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", rows(4, 2))
  card(tmp_path, "license: mit\n")
  assert [len(opened(tmp_path, s)) for s in ("train", "eval", "validation")] == [4, 2, 2]
  card(tmp_path, "- no\n")
  assert len(opened(tmp_path)) == 6


@pytest.mark.parametrize(
  "files",
  [
    "[{split: train, path: one/*}, {split: test, path: [two/*, three/*]}]",
    "{train: one/*, test: [two/*, three/*]}",
  ],
)
def test_a_repository_whose_card_tells_the_splits(tmp_path, files):
  for first, name in enumerate(["one", "two", "three"]):
    write_parquet(tmp_path / name / "0.parquet", rows(first, 1))
  write_parquet(tmp_path / "unused/0.parquet", rows(9, 1))
  card(tmp_path, f"configs:\n- config_name: x\n  data_files: {files}\n")
  assert texts(opened(tmp_path, "train")) == [["text 0"]]
  assert texts(opened(tmp_path, "test")) == [["text 1"], ["text 2"]]


def test_a_repository_of_several_configurations(tmp_path):
  for first, name in enumerate(["coco", "flickr"]):
    write_parquet(tmp_path / name / "train-0.parquet", rows(first, 1))
  heads = [f"- config_name: {n}\n  data_files: {n}/*\n" for n in ("coco", "flickr")]
  card(tmp_path, "configs:\n" + "".join(heads))
  assert texts(opened(tmp_path, table="flickr")) == [["text 1"]]
  with pytest.raises(UserError, match=r"several configurations: name one of coco, flickr"):
    opened(tmp_path)
  with pytest.raises(UserError, match=r'no configuration "flick", did you mean "flickr"'):
    opened(tmp_path, table="flick")
  card(tmp_path, "configs:\n" + heads[0] + heads[1].replace("name: flickr", "name: default"))
  assert texts(opened(tmp_path)) == [["text 1"]]


def test_a_repository_in_a_bucket(tmp_path, bucket):
  write_parquet(tmp_path / "data/train-0.parquet", rows(0, 2))
  card(tmp_path, "configs:\n- data_files: [{split: dev, path: data/*}]\n")
  source = opened(bucket(tmp_path), "dev")
  assert texts(source) == [["text 0"], ["text 1"]]
  assert [list(r["images"]) for r in source] == [[picture(0)], [picture(1)]]


def test_arrow_files_in_a_bucket(tmp_path, bucket):
  save_to_disk(tmp_path, rows(0, 2))
  with pytest.raises(UserError, match="copy the folder here, or save it with to_parquet"):
    opened(bucket(tmp_path))


def broken(folder):
  save_to_disk(folder, rows(0, 2))
  (folder / "data-00000-of-00001.arrow").write_bytes(b"no arrow file at all")


def lost(folder):
  save_to_disk(folder, rows(0, 2))
  (folder / "data-00000-of-00001.arrow").unlink()


def half(folder):
  save_to_disk(folder / "train", rows(0, 2))
  (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


def unreadable(folder):
  save_to_disk(folder, rows(0, 2))
  (folder / "state.json").write_text("{")


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda folder: folder.rmdir(), "there is no folder"),
    (lambda folder: (folder / "x.tar").touch(), r"neither what.*\(there: x\.tar\)"),
    (broken, "cannot be read as Arrow"),
    (lost, r"there is no .*data-00000-of-00001\.arrow, which state\.json"),
    (half, r"test has no state\.json: it was not written whole"),
    (unreadable, r"state\.json cannot be read"),
    (
      lambda folder: save_to_disk(folder, rows(0, 2), _indices_data_files=[{"filename": "x"}]),
      "flatten_indices",
    ),
    (lambda folder: card(folder, "a: [\n"), "is no YAML"),
  ],
)
def test_bad_input(tmp_path, make, message):
  folder = tmp_path / "data"
  folder.mkdir()
  make(folder)
  with pytest.raises(UserError, match=message):
    opened(folder)


def test_no_path():
  with pytest.raises(UserError, match=r"config\.data\.path is empty"):
    opened("")
