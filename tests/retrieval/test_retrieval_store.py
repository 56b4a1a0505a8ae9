"""Saved indexes: what is written is read back, and damage is named."""

import itertools
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from gcl_jax.errors import UserError
from gcl_jax.retrieval import read_index
from gcl_jax.retrieval.store_format import Bad, Document
from gcl_jax.retrieval.store_writer import IndexWriter

WIDTH, SHARDS = 8, 3
SETTINGS = {
  "dtype": "float16",
  "dimension": WIDTH,
  "model": {"weights": "aa", "fusion": {"of": "raw"}},
  "data": {"source": "scenes"},
  "split": "eval",
}


def shard(number):
  """Seven rows, their documents and one bad record."""
  rng = np.random.default_rng(number)
  vectors = rng.normal(size=(7, WIDTH)).astype(np.float32)
  documents = [
    Document(f"d{number}.{i}", i % 3, f"text {i}" if i % 3 else None, None, i, 0)
    for i in range(7)
  ]
  return vectors, documents, [Bad(f"b{number}", "no picture")]


def write(folder, settings=SETTINGS, shards=range(SHARDS), **about):
  writer = IndexWriter(folder, settings, SHARDS, **about)
  for number in shards:
    writer.write(number, *shard(number))
  return writer


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
  write(tmp_path / "index", about={"checkpoint": "runs/a"}).finish()
  return tmp_path / "index"


def vectors():
  rows = np.concatenate([shard(k)[0] for k in range(SHARDS)])
  return rows.astype(np.float16)


def test_what_is_written_is_read_back(folder):
  index = read_index(folder)
  assert len(index) == 21 and index.vectors.shape == (21, WIDTH)
  assert index.vectors.dtype == np.float16
  for rows in (slice(0, 7), slice(3, 18), slice(20, 40), slice(5, 5), slice(1, 20, 4)):
    np.testing.assert_array_equal(index.vectors[rows], vectors()[rows])
  np.testing.assert_array_equal(index.vectors[[20, 0, 8]], vectors()[[20, 0, 8]])
  assert index.ids.tolist() == [f"d{k}.{i}" for k in range(3) for i in range(7)]
  assert index.modalities.tolist() == [i % 3 for _ in range(3) for i in range(7)]
  assert index.documents([20, 7]) == [
    {
      "id": "d2.6",
      "modality": "image",
      "text": None,
      "image": None,
      "record": 6,
      "picture": 0,
    },
    {
      "id": "d1.0",
      "modality": "image",
      "text": None,
      "image": None,
      "record": 0,
      "picture": 0,
    },
  ]
  with pytest.raises(IndexError, match="row -1 of 21"):
    index.documents([-1])
  manifest = index.manifest
  assert manifest["modalities"] == {"image": 9, "text": 6, "fused": 6}
  assert (manifest["rows"], manifest["bad_count"]) == (21, 3)
  assert manifest["bad"][1] == {"id": "b1", "reason": "no picture"}
  assert manifest["checkpoint"] == "runs/a"


def test_search(folder):
  index = read_index(folder)
  queries = np.random.default_rng(9).normal(size=(4, WIDTH)).astype(np.float32)
  scores = queries @ vectors().astype(np.float32).T
  order = np.argsort(-scores, axis=1)
  np.testing.assert_array_equal(index.search(queries, 5).rows, order[:, :5])
  found = index.search(queries, 21, modality=["text", "fused"])
  for row, all_rows in zip(found.rows, order, strict=True):
    assert row[:12].tolist() == [r for r in all_rows if r % 7 % 3]
    assert (row[12:] == -1).all()
  found = index.search(queries, 3, modality="image", exclude=order[:, :1])
  assert not (found.rows == order[:, :1]).any()
  assert (index.modalities[found.rows] == 0).all()
  with pytest.raises(UserError, match="modality 'video' is none of image, text, fused"):
    index.search(queries, 3, modality="video")
  with pytest.raises(UserError, match="queries are 5 wide"):
    index.search(queries[:, :5], 3)


def test_a_picture_is_found_by_its_path_or_in_its_source(tmp_path):
  file = tmp_path / "red.png"
  Image.new("RGB", (4, 4), "red").save(file)
  documents = [
    Document("a", 0, None, str(file), 0, 0),
    Document("b", 0, None, None, 5, 0),
    Document("c", 1, "words", None, 0, -1),
    Document("d", 0, None, None, 10**6, 0),
  ]
  writer = IndexWriter(tmp_path / "index", SETTINGS, 1)
  writer.write(0, np.eye(4, WIDTH), documents, [])
  writer.finish()
  index = read_index(tmp_path / "index")
  assert index.picture(0) == str(file)
  assert index.picture(1).size == (64, 64)  # of the procedural scenes
  assert index.picture(2) is None and index.picture(3) is None
  file.unlink()
  assert index.picture(0).size == (64, 64)  # moved: by its place in the source


def test_a_shard_without_rows(tmp_path):
  writer = IndexWriter(tmp_path / "index", SETTINGS, 2)
  writer.write(0, np.zeros((0, WIDTH)), [], [Bad("x", "torn")])
  writer.write(1, *shard(1))
  writer.finish()
  index = read_index(tmp_path / "index")
  assert len(index) == 7 and index.ids[0] == "d1.0"
  assert index.search(np.ones((1, WIDTH)), 1).rows.shape == (1, 1)


def test_nothing_at_all_is_refused(tmp_path):
  writer = IndexWriter(tmp_path / "index", SETTINGS, 1)
  writer.write(0, np.zeros((0, WIDTH)), [], [Bad("x", "torn")])
  with pytest.raises(UserError, match="all 1 records are bad: x: torn"):
    writer.finish()
  assert not writer.complete


class Killed(BaseException):
  """As SIGKILL: what is not on the disk yet is lost, parts stay."""


@pytest.mark.parametrize("dies_at", range(2 + 2 * SHARDS))
def test_killed_at_any_file_and_started_again(tmp_path, folder, monkeypatch, dies_at):
  there, about = tmp_path / "killed", {"checkpoint": "runs/a"}

  def work():
    writer = IndexWriter(there, SETTINGS, SHARDS, about=about)
    done = writer.missing()
    for number in done:
      writer.write(number, *shard(number))
    writer.finish()
    return done

  replace, calls, left = os.replace, itertools.count(), {}

  def dying(part, path):
    if next(calls) == dies_at:
      left[part] = part.read_bytes()
      raise Killed
    replace(part, path)

  with monkeypatch.context() as patched, pytest.raises(Killed):
    patched.setattr(os, "replace", dying)
    work()
  for part, raw in left.items():
    # Nobody cleared up, and who goes on is another process.
    part.with_name(part.name.replace(f".{os.getpid()}.", ".1.")).write_bytes(raw)
  with pytest.raises(UserError, match=r"holds no index|is not whole: run the command"):
    read_index(there)
  assert work() == list(range(max(dies_at - 1, 0) // 2, SHARDS))
  assert contents(there) == contents(folder)


def test_two_processes_write_one_index(tmp_path, folder):
  first, second = (IndexWriter(tmp_path / "two", SETTINGS, SHARDS) for _ in range(2))
  second.write(1, *shard(1))
  first.write(0, *shard(0))
  first.write(2, *shard(2))
  first.finish()
  made = contents(tmp_path / "two")
  wanted = contents(folder)
  assert {n: made[n] for n in made if n != "manifest.json"} == {
    n: wanted[n] for n in wanted if n != "manifest.json"
  }


def test_other_settings_do_not_go_on(folder):
  other = {**SETTINGS, "model": {"weights": "bb", "fusion": {"of": "raw"}}}
  with pytest.raises(UserError, match=r"model\.weights: 'aa' then, 'bb' now"):
    write(folder, other)


def test_places_that_cannot_be_written(tmp_path):
  file = tmp_path / "file"
  file.write_text("mine")
  with pytest.raises(UserError, match="is a file: name a folder"):
    IndexWriter(file, SETTINGS, 1)
  with pytest.raises(UserError, match="not empty and holds no index"):
    IndexWriter(tmp_path, SETTINGS, 1)
  with pytest.raises(UserError, match="lies in a folder of this machine"):
    IndexWriter("gs://bucket/index", SETTINGS, 1)
  with pytest.raises(UserError, match="cannot be written"):
    IndexWriter(file / "below", SETTINGS, 1)
  with pytest.raises(UserError, match="'int8' is none of float32, float16"):
    IndexWriter(tmp_path / "new", {**SETTINGS, "dtype": "int8"}, 1)
  assert file.read_text() == "mine"


def test_no_room(tmp_path, monkeypatch):
  writer = IndexWriter(tmp_path / "index", SETTINGS, SHARDS)

  def full(*_, **__):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np.lib.format, "write_array", full)
  with pytest.raises(UserError, match=r"No space left .* goes on where it was"):
    writer.write(0, *shard(0))
  assert [path.name for path in writer.folder.iterdir()] == ["settings.json"]


@pytest.mark.parametrize("value", [np.nan, 1e6])  # which float16 does not hold
def test_vectors_that_are_not_finite_are_not_written(tmp_path, value):
  writer = IndexWriter(tmp_path / "index", SETTINGS, SHARDS)
  vectors, *rest = shard(0)
  vectors[4, 2] = value
  with pytest.raises(UserError, match="shard 0: row 4 is not finite"):
    writer.write(0, vectors, *rest)
  assert writer.missing() == [0, 1, 2]


def flip(path, at=-1):
  raw = bytearray(path.read_bytes())
  raw[at] ^= 0x10
  path.write_bytes(raw)


def shorten(path):
  path.write_bytes(path.read_bytes()[:-16])


def forget(folder, shard, **changes):
  """Lets the manifest say something else of a shard."""
  manifest = json.loads((folder / "manifest.json").read_text())
  manifest["shards"][shard].update(changes)
  (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("part", ["vectors-00001.npy", "documents-00001.parquet"])
def test_damaged_shards(folder, part):
  intact = (folder / part).read_bytes()
  flip(folder / part, len(intact) // 2)
  with pytest.raises(UserError, match=f"{part} is damaged .its checksum is another"):
    read_index(folder)
  shorten(folder / part)
  with pytest.raises(UserError, match=f"{part} is damaged .* were written"):
    read_index(folder, verify=False)
  (folder / part).unlink()
  with pytest.raises(UserError, match=f"{part} is missing: copy the whole folder"):
    read_index(folder)


def test_row_counts_that_differ(folder):
  forget(folder, 1, rows=6)
  with pytest.raises(UserError, match=r"float16 \(7, 8\), not float16 \(6, 8\)"):
    read_index(folder)
  vectors, documents, bad = shard(1)
  other = write(folder.parent / "other", shards=[])
  other.write(1, vectors[:6], documents[:6], bad)
  name = "documents-00001.parquet"
  shutil.copy(folder.parent / "other" / name, folder / name)
  forget(folder, 1, rows=7, documents_bytes=(folder / name).stat().st_size)
  with pytest.raises(UserError, match="6 rows, 7 vectors"):
    read_index(folder, verify=False).documents([8])


def test_vectors_on_disk_that_are_not_finite(folder):
  path = folder / "vectors-00001.npy"
  rows = np.load(path)
  rows[2, 0] = np.inf
  np.save(path, rows)
  index = read_index(folder, verify=False)
  for engine in ("jax", "faiss"):
    with pytest.raises(UserError, match="candidate 9 is not finite"):
      index.search(np.ones((1, WIDTH)), 2, engine=engine)


def test_a_damaged_shard_is_written_again(folder):
  wanted = contents(folder)
  (folder / "vectors-00001.npy").unlink()
  (folder / "manifest.json").unlink()
  writer = IndexWriter(folder, SETTINGS, SHARDS, about={"checkpoint": "runs/a"})
  assert writer.missing() == [1]
  writer.write(1, *shard(1))
  writer.finish()
  assert contents(folder) == wanted


@pytest.mark.parametrize(
  ("part", "harm", "said"),
  [
    ("documents-00001.parquet", shorten, "is damaged .*: delete it and run"),
    ("vectors-00001.npy", shorten, "is damaged .* were written"),
    ("vectors-00001.npy", flip, "is damaged .its checksum is another.: delete it"),
  ],
)
def test_damage_between_two_calls_is_told_and_mended(folder, part, harm, said):
  wanted = contents(folder)
  (folder / "manifest.json").unlink()
  harm(folder / part)
  about = {"checkpoint": "runs/a"}
  with pytest.raises(UserError, match=f"{part} {said}"):
    IndexWriter(folder, SETTINGS, SHARDS, about=about).finish()
  assert not (folder / "manifest.json").exists()
  (folder / part).unlink()  # as the message says
  writer = IndexWriter(folder, SETTINGS, SHARDS, about=about)
  writer.write(1, *shard(1))
  writer.finish()
  assert contents(folder) == wanted


@pytest.mark.parametrize("text", ['{"format', "[]"])
def test_settings_that_cannot_be_read(folder, text):
  (folder / "settings.json").write_text(text)
  with pytest.raises(UserError, match=r"settings\.json cannot be read"):
    IndexWriter(folder, SETTINGS, SHARDS)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"shards": 5}, "shards is 5"),
    ({"shards": [5]}, r"shards\[0\] is 5"),
    ({"shards": [{"rows": -1}]}, r"shards\[0\]\.rows is -1"),
    ({"dimension": "8"}, "dimension is '8'"),
    ({"dtype": "int8"}, "dtype is 'int8'"),
    ({"modalities": {"image": None}}, r"modalities\.image is None"),
    ({"bad": [[1, 2]]}, r"bad\[0\] is \[1, 2\]"),
    ({"checkpoint": 3}, "checkpoint is 3"),
    ({"faiss": {}}, r"faiss\.factory is None"),
  ],
)
def test_damaged_manifests(folder, changes, said):
  path = folder / "manifest.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
  with pytest.raises(UserError, match=rf"manifest\.json is damaged \({said}\)"):
    read_index(folder)
  path.write_text('{"format": 1}')
  with pytest.raises(UserError, match=r"is damaged .dimension is None"):
    read_index(folder)


def test_manifests_that_cannot_be_read(folder, tmp_path):
  with pytest.raises(UserError, match=r"holds no index .*gcl_jax\.embed"):
    read_index(tmp_path)
  path = folder / "manifest.json"
  path.write_text('{"format": 2}')
  with pytest.raises(UserError, match="of format 2, this version reads 1"):
    read_index(folder)
  for broken in ('{"format"', "[]", "{}"):
    path.write_text(broken)
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
      read_index(folder)
