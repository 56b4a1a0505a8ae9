"""Patterns of shards, and what their names say of splits."""

from __future__ import annotations

import pytest

from gcl_jax.data.shards import expand_braces, find_shards, split_in_name
from gcl_jax.errors import UserError


@pytest.mark.parametrize(
  ("pattern", "expected"),
  [
    ("a.tar", ["a.tar"]),
    ("a{008..011}", ["a008", "a009", "a010", "a011"]),
    ("{8..11}", ["8", "9", "10", "11"]),
    ("{2..0}", ["2", "1", "0"]),
    ("{b,a}/x", ["b/x", "a/x"]),
    ("{0..1}-{a,b}", ["0-a", "0-b", "1-a", "1-b"]),
  ],
)
def test_braces(pattern, expected):
  assert expand_braces(pattern) == expected


def test_braces_that_are_no_range():
  with pytest.raises(UserError, match=r"\{a\.\.b\} is no range"):
    expand_braces("{a..b}")


@pytest.mark.parametrize(
  ("name", "split"),
  [
    ("train-00000-of-00004.parquet", "train"),
    ("cc3m-validation-0001.tar", "validation"),
    ("data/test/0001.tar", "test"),
    ("test/train-0.tar", "train"),
    ("TRAIN_01.tar", "train"),
    ("coco_val2017.tar", "val"),
    ("training.tar", "train"),
    ("valid-1.tar", "validation"),
    ("latest-01.tar", ""),
    ("trainer.tar", ""),
    ("evaluate/0.tar", ""),
    ("00000.tar", ""),
  ],
)
def test_split_in_a_name(name, split):
  assert split_in_name(name) == split


@pytest.fixture
def folder(tmp_path):
  for name in ("a/0.tar", "a/1.tar", "b/0.tar", "b/note.txt", "c/0.tar.gz"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
  return tmp_path


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
  ("pattern", "names"),
  [
    ("", ["a/0", "a/1", "b/0"]),
    ("/a", ["0", "1"]),
    ("/b/0.tar", ["0"]),
    ("/?/0.tar", ["a/0", "b/0"]),
    ("/**/1.tar", ["1"]),
    ("/a/{1..0}.tar", ["1", "0"]),
    ("/{b,a}", ["b/0", "a/0", "a/1"]),
  ],
)
def test_what_a_path_stands_for(folder, bucket, remote, pattern, names):
  root = bucket(folder) if remote else str(folder)
  shards = find_shards(root + pattern, (".tar",), compressed=(".tar.gz",))
  assert [shard.name for shard in shards] == names
  assert all(str(shard.path).startswith(root) for shard in shards)


@pytest.mark.parametrize(
  ("pattern", "message"),
  [
    ("", r"config\.data\.path is empty"),
    ("X/a/{0..2}.tar", r"there is no X/a/2\.tar, did you mean"),
    ("X/nowhere", "there is no X/nowhere"),
    ("X/b/*.txt", r"there is no \.tar file, only note\.txt"),
    ("X/*.tar", r"there is no \.tar file;"),
    ("X/c", r"X/c/0\.tar\.gz is compressed.*unpack it to \.tar"),
    ("X/c/0.tar.gz", "is compressed"),
  ],
)
def test_bad_paths(folder, monkeypatch, pattern, message):
  monkeypatch.chdir(folder.parent)
  (folder.parent / "X").unlink(missing_ok=True)
  (folder.parent / "X").symlink_to(folder)
  with pytest.raises(UserError, match=message):
    find_shards(pattern, (".tar",), compressed=(".tar.gz",))
