"""Paths of this machine and of object stores: the same questions, the same answers."""

from __future__ import annotations

import importlib
import json
import pickle
import zipfile

import pytest
from PIL import Image

from gcl_jax.data import BadRecord, Pipeline, open_source
from gcl_jax.paths import RemotePath, as_path, is_remote, size_of, stamp
from gcl_jax.data.random_access import RandomFile
from gcl_jax.errors import UserError


def test_local_paths_are_pathlibs(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert as_path("~/a") == tmp_path / "a"
  assert not is_remote("C:\\data") and not is_remote("/a:/b") and is_remote("gs://a")
  (tmp_path / "a").write_bytes(b"123")
  before = stamp(tmp_path / "a")
  assert before[1] == size_of(tmp_path / "a") == 3
  (tmp_path / "a").write_bytes(b"1234")
  assert stamp(tmp_path / "a") != before


def test_a_remote_path_answers_as_a_path_does(tmp_path, bucket):
  (tmp_path / "sub").mkdir()
  (tmp_path / "a.json").write_bytes(b"0123456789")
  (tmp_path / "sub/b.tar").write_bytes(b"")
  root = as_path(bucket(tmp_path))
  assert str(root) == "gs://bucket/data" and root.is_dir() and not root.is_file()
  assert sorted(p.name for p in root.iterdir()) == ["a.json", "sub"]
  file = root / "a.json"
  assert (file.name, file.stem, file.suffix) == ("a.json", "a", ".json")
  assert file.parent == root and file.with_name("x") == root / "x"
  assert file.is_file() and file.exists() and not (root / "x").exists()
  assert file.read_bytes() == b"0123456789" and file.read_range(8, 5) == b"89"
  assert RandomFile(file).read(2, 3) == b"234"
  assert pickle.loads(pickle.dumps(RandomFile(file))).read(2, 3) == b"234"
  assert root.walk() == [file, root / "sub/b.tar"]
  assert (root / "*.json").glob_self() == [file]
  assert stamp(file)[:2] == [str(file), 10]
  assert RemotePath("gs://bucket//data/./sub/../a.json/") == file
  file.fetch(tmp_path / "here")
  assert (tmp_path / "here").read_bytes() == b"0123456789"
  (root / "there").put(tmp_path / "here")
  assert (root / "there").size() == 10
  with pytest.raises(FileNotFoundError):
    (root / "x").read_bytes()


def test_a_folder_does_not_list_itself(tmp_path, bucket, monkeypatch):
  """Some stores keep an object for a folder; another folder inside may be its namesake."""
  (tmp_path / "data").mkdir()
  (tmp_path / "data/a.txt").touch()
  root = as_path(bucket(tmp_path))
  store = type(root._fs)
  listed = ["bucket/data/", "bucket/data/data"]
  monkeypatch.setattr(store, "ls", lambda *_, **__: listed)
  assert list(root.iterdir()) == [root / "data"]


def table(folder, count=6):
  (folder / "images").mkdir()
  records = []
  for i in range(count):
    Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"images/{i}.png")
    records.append({"image": f"images/{i}.png", "captions": [f"text {i}"]})
  (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, records)))
  return records


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_table_in_a_bucket(tmp_path, bucket, processor, suffix):
  records = table(tmp_path)
  if suffix != ".jsonl":
    (tmp_path / "captions.jsonl").unlink()
    lines = [f'{r["image"]},"{r["captions"][0]}"' for r in records]
    text = json.dumps(records) if suffix == ".json" else "\n".join(lines)
    header = "image,captions\n" if suffix == ".csv" else ""
    (tmp_path / f"t{suffix}").write_text(header + text)
  here = open_source({"path": str(tmp_path)}, split="all")
  there = open_source({"path": bucket(tmp_path)}, split="all")
  there = pickle.loads(pickle.dumps(there))
  assert len(there) == len(here) == 6
  for ours, theirs in zip(here, there, strict=True):
    with open(ours["images"][0], "rb") as file:
      assert theirs["images"][0] == file.read()
    for field in ("id", "texts", "group", "meta"):
      assert ours[field] == theirs[field]
  with Pipeline(there, processor, batch_size=6, seed=0) as pipeline:
    assert next(pipeline)["has_image"].all()


def test_a_zip_in_a_bucket(tmp_path, bucket):
  table(tmp_path)
  with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
    for file in sorted((tmp_path / "images").iterdir()):
      archive.write(file, f"images/{file.name}")
  expected = [(tmp_path / f"images/{i}.png").read_bytes() for i in range(6)]
  for i in range(6):
    (tmp_path / f"images/{i}.png").unlink()
  source = open_source({"path": bucket(tmp_path)}, split="all")
  assert [record["images"][0] for record in source] == expected


def test_a_picture_that_is_not_in_the_bucket(tmp_path, bucket):
  table(tmp_path)
  (tmp_path / "images/3.png").unlink()
  source = open_source({"path": bucket(tmp_path)}, split="all")
  with pytest.raises(BadRecord, match=r"gs://bucket/data/images/3\.png is not there"):
    source[3]["images"][0]


def test_a_store_that_refuses(tmp_path, bucket, monkeypatch, processor):
  class Refused(Exception):
    """As stores raise: no OSError."""

  def refuse(self, *args, **kwargs):
    raise Refused("Anonymous caller\n does not have access")

  table(tmp_path)
  url = bucket(tmp_path)
  source = open_source({"path": url}, split="all")
  store = type(as_path(url)._fs)
  monkeypatch.setattr(store, "cat_file", refuse)
  with Pipeline(source, processor, batch_size=6, seed=0, threads=0) as pipeline:
    assert not next(pipeline)["has_image"].any()
    assert "Refused: Anonymous caller does not" in pipeline.recent_errors()[0]
  monkeypatch.setattr(store, "isfile", refuse)
  with pytest.raises(UserError, match=r"gs://bucket/data cannot be reached .*credent"):
    open_source({"path": url}, split="all")


@pytest.mark.parametrize(
  ("url", "message"),
  [
    ("gs://bucket/data", "pip install gcsfs"),
    ("s3://bucket/data", "pip install s3fs"),
    ("nonsense://bucket/data", "nonsense:// is no kind of address"),
  ],
)
def test_the_library_of_a_store_is_missing(monkeypatch, url, message):
  import_module = importlib.import_module

  def missing(name, *args):
    if name in ("gcsfs", "s3fs"):
      raise ImportError(name)
    return import_module(name, *args)

  monkeypatch.setattr(importlib, "import_module", missing)
  with pytest.raises(UserError, match=message):
    open_source({"path": url}, split="all")


def test_no_such_folder_in_a_bucket(tmp_path, bucket):
  with pytest.raises(UserError, match="there is no folder gs://bucket/data/x"):
    open_source({"path": bucket(tmp_path) + "/x"}, split="all")
