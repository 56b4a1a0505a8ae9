"""WebDataset tars: the samples as `tarfile` sees them, whatever is wrong with them."""

from __future__ import annotations

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from gcl_jax.data import BadRecord, Pipeline, open_source
from gcl_jax.data.tar_members import TarError, members
from gcl_jax.data.webdataset import _ROW
from gcl_jax.errors import UserError


def picture(i, kind="PNG"):
  file = io.BytesIO()
  Image.new("RGB", (4, 4), (i, 0, 0)).save(file, kind)
  return file.getvalue()


def write_tar(path, entries, format=tarfile.PAX_FORMAT):
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w", format=format) as tar:
    for name, content in entries:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))


def pairs(first, count, **fields):
  """Entries of samples with a picture, a text and, where there are fields, a json."""
  for i in range(first, first + count):
    yield f"{i:04d}.png", picture(i)
    yield f"{i:04d}.txt", f"text {i}\n".encode()
    if fields:
      row = {k: v(i) if callable(v) else v for k, v in fields.items()}
      yield f"{i:04d}.json", json.dumps(row).encode()


def opened(path, split="all", **fields):
  data = {"source": "webdataset", "path": str(path), **fields}
  return open_source(data, split=split)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513])
@pytest.mark.parametrize(
  "format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]
)
def test_members_are_those_of_tarfile(tmp_path, format, size):
  path = tmp_path / "a.tar"
  folder = "sub/" + "d" * 60
  entries = [("a.jpg", b"1" * size), ("b.txt", b"2" * 700), (f"{folder}/c.png", b"3")]
  entries.append((f"{folder}/{'f' * 80}.txt", b"prefix"))
  if format != tarfile.USTAR_FORMAT:
    entries += [("größe猫.png", b"4"), ("x" * 300 + ".txt", b"5"), ("after.txt", b"6")]
  write_tar(path, entries, format)
  with tarfile.open(path, "a", format=format) as tar:
    for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
      info = tarfile.TarInfo("other")
      info.type, info.linkname = kind, "a.jpg"
      tar.addfile(info)
    tar.addfile(tarfile.TarInfo("last.txt"))
  raw = path.read_bytes()
  found = list(members(lambda at, n: raw[at : at + n], len(raw)))
  with tarfile.open(path) as tar:
    expected = [(m.name, m.offset, m.offset_data, m.size) for m in tar if m.isfile()]
  assert [(m.name, m.start, m.data, m.length) for m in found] == expected
  assert [raw[m.data : m.data + m.length] for m in found][:-1] == [c for _, c in entries]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_member_of_more_than_8_gib(format):
  long, short = tarfile.TarInfo("long.bin"), tarfile.TarInfo("short.txt")
  long.size = 9 << 30
  head, tail = (
    info.tobuf(format, "utf-8", "surrogateescape") for info in (long, short)
  )
  end = len(head) + long.size

  def read(at, length):
    return head[at : at + length] if at < end else tail[at - end : at - end + length]

  first, second = members(read, end + len(tail))
  assert (first.name, first.data, first.length) == ("long.bin", len(head), 9 << 30)
  assert (second.name, second.start) == ("short.txt", end)


def test_a_tar_that_is_cut_is_noticed(tmp_path):
  write_tar(tmp_path / "a.tar", [("a.jpg", b"1" * 600), ("a.txt", b"2")])
  raw = (tmp_path / "a.tar").read_bytes()
  ends = {0: 0, 1536: 1, 2560: 2}  # a tar may end where a member does
  for cut in [*range(0, 2560, 7), *range(0, 2561, 512)]:
    found = members(lambda at, n, cut=cut: raw[at : min(at + n, cut)], cut)
    if cut in ends:
      assert len(list(found)) == ends[cut]
    else:
      with pytest.raises(TarError, match="it ends within"):
        list(found)


def test_samples_of_several_tars(tmp_path):
  write_tar(tmp_path / "00.tar", pairs(0, 3))
  write_tar(tmp_path / "01.tar", pairs(3, 2))
  source = opened(tmp_path)
  assert [r["id"] for r in source] == [
    "00/0000", "00/0001", "00/0002", "01/0003", "01/0004",
  ]  # fmt: skip
  for i, record in enumerate(pickle.loads(pickle.dumps(source))):
    assert record["images"] == [picture(i)]
    assert record["texts"] == [f"text {i}"]
    assert record["group"] == record["id"]
    assert "split" not in record and record["meta"] == {}


def test_keys_of_different_tars_are_different_samples(tmp_path):
  for name in ("a/0.tar", "b/0.tar"):
    write_tar(tmp_path / name, pairs(0, 2))
  ids = [record["id"] for record in opened(tmp_path)]
  assert ids == ["a/0/0000", "a/0/0001", "b/0/0000", "b/0/0001"]


def test_fields_of_the_json(tmp_path):
  fields = {
    "captions": lambda i: ["one", " ", f"two {i}"],
    "split": lambda i: "test" if i == 2 else "train",
    "group": lambda i: i // 2,
    "id": lambda i: f"n{i}",
    "width": 4,
  }
  write_tar(tmp_path / "0.tar", pairs(0, 4, **fields))
  source = opened(tmp_path)
  assert [r["texts"] for r in source] == [["one", f"two {i}"] for i in range(4)]
  assert [r["id"] for r in source] == ["n0", "n1", "n2", "n3"]
  assert [r["group"] for r in source] == ["0", "0", "1", "1"]
  assert [r["split"] for r in source] == ["train", "train", "test", "train"]
  assert source[0]["meta"] == {"width": 4}
  assert [r["id"] for r in opened(tmp_path, "train")] == ["n0", "n1", "n3"]
  assert [r["id"] for r in opened(tmp_path, "eval")] == ["n2"]


def test_which_caption(tmp_path):
  entries = [
    ("0.png", picture(0)),
    ("0.txt", b"from the txt"),
    ("0.alt", b"from the alt"),
    ("0.json", json.dumps({"caption": "from the json", "title": "a title"}).encode()),
    ("1.png", picture(1)),
    ("1.json", json.dumps({"caption": "from the json"}).encode()),
    ("2.png", picture(2)),
  ]
  write_tar(tmp_path / "0.tar", entries)
  default = ["from the txt"], ["from the json"], []
  assert [r["texts"] for r in opened(tmp_path)] == list(default)
  source = opened(tmp_path, caption_column="caption")
  assert [r["texts"] for r in source] == [["from the json"], ["from the json"], []]
  source = opened(tmp_path, caption_column="title, alt")
  assert [r["texts"] for r in source][:1] == [["a title", "from the alt"]]


def test_which_picture(tmp_path):
  entries = [
    ("0.JPG", picture(0, "JPEG")),
    ("0.seg.png", picture(1)),
    ("0.cls", b"7"),
    ("0.txt", b"x"),
  ]
  write_tar(tmp_path / "0.tar", entries)
  (record,) = opened(tmp_path)
  assert record["images"] == [picture(0, "JPEG")]
  (record,) = opened(tmp_path, image_column="seg.png")
  assert record["images"] == [picture(1)]


def test_what_macos_puts_in_a_tar_is_passed_over(tmp_path):
  entries = [(f"._{n}", b"x") if k else (n, c) for n, c in pairs(0, 2) for k in (1, 0)]
  write_tar(tmp_path / "0.tar", entries)
  assert [r["texts"] for r in opened(tmp_path)] == [["text 0"], ["text 1"]]


def test_names_of_tars_say_the_split(tmp_path):
  write_tar(tmp_path / "x-train-0.tar", pairs(0, 3))
  write_tar(tmp_path / "x-test-0.tar", pairs(3, 2))
  assert [r["texts"][0] for r in opened(tmp_path, "train")] == [
    "text 0", "text 1", "text 2",
  ]  # fmt: skip
  assert [r["split"] for r in opened(tmp_path, "eval")] == ["test", "test"]


def test_without_splits_a_part_is_held_out(tmp_path):
  write_tar(tmp_path / "0.tar", pairs(0, 100))
  train, held = (opened(tmp_path, s, eval_fraction=0.3) for s in ("train", "eval"))
  ids = [{r["id"] for r in part} for part in (train, held)]
  assert len(ids[0]) + len(ids[1]) == 100 and not ids[0] & ids[1]
  assert 15 < len(ids[1]) < 45


def test_bad_samples_are_bad_records_in_their_place(tmp_path, processor):
  entries = [
    *pairs(0, 2),
    ("2.png", picture(2)),
    ("2.txt", b"\xff\xfe"),
    ("3.png", picture(3)),
    ("3.json", b"{"),
    ("4.png", picture(4)),
    ("4.json", b"[1]"),
    ("5.cls", b"1"),
    ("6.png", b"no picture"),
    ("6.txt", b"x"),
    ("7.png", picture(7)),
    ("7.json", b'{"captions": [1]}'),
  ]
  write_tar(tmp_path / "0.tar", entries)
  source = opened(tmp_path)
  for i, message in (
    (2, "its txt is not UTF-8"),
    (3, "its json cannot be read"),
    (4, "its json is a list"),
    (5, "0/5 has neither an image nor a caption"),
    (7, '"captions" holds a int'),
  ):
    with pytest.raises(BadRecord, match=message):
      source[i]
  with Pipeline(source, processor, batch_size=8, seed=0, threads=0) as pipeline:
    batch = next(pipeline)
  assert sorted(batch["index"][batch["has_image"]]) == [0, 1]


def test_the_index_costs_bytes_and_is_kept(tmp_path, own_cache, monkeypatch):
  assert _ROW.itemsize == 26
  write_tar(tmp_path / "0.tar", pairs(0, 3))
  opened(tmp_path)
  (file,) = own_cache.rglob("*.npy")
  assert len(np.load(file)) == 3

  def scan(*_):
    raise AssertionError("scanned again")

  with monkeypatch.context() as patch:
    patch.setattr("gcl_jax.data.webdataset._scan", scan)
    assert len(opened(tmp_path)) == 3
    assert len(opened(tmp_path, caption_column="txt")) == 3
  write_tar(tmp_path / "0.tar", pairs(0, 4))
  assert len(opened(tmp_path)) == 4


def test_a_tar_that_changes_under_us(tmp_path):
  write_tar(tmp_path / "0.tar", pairs(0, 3))
  source = opened(tmp_path)
  raw = bytearray((tmp_path / "0.tar").read_bytes())
  raw[source._rows[1]["offset"] + 5] ^= 1
  (tmp_path / "0.tar").write_bytes(raw)
  assert source[0]["texts"] == ["text 0"]
  with pytest.raises(BadRecord, match=r"0\.tar has changed since.*no header"):
    source[1]


def test_a_bucket_is_asked_once_a_record(tmp_path, bucket, processor):
  write_tar(tmp_path / "0.tar", pairs(0, 3))
  write_tar(tmp_path / "1.tar", pairs(3, 3))
  url = bucket(tmp_path)
  here = list(opened(tmp_path))
  source = opened(f"{url}/{{0..1}}.tar")
  store = type(source._shards[0].path._fs)
  assert len(store.opened) == 2  # each tar once, for its index
  store.ranges.clear()
  assert list(pickle.loads(pickle.dumps(source))) == here
  assert len(store.ranges) == 6
  assert {n for _, n in store.ranges} == {4 * 512}  # two headers, two members
  store.opened.clear()
  opened(f"{url}/{{0..1}}.tar")
  assert not store.opened  # the index is kept
  with Pipeline(source, processor, batch_size=6, seed=0) as pipeline:
    assert next(pipeline)["has_image"].all()


@pytest.mark.parametrize(
  ("entries", "fields", "message"),
  [
    ([], {}, "no sample in it"),
    ([("0.png", b"x"), ("1.png", b"y"), ("0.txt", b"z")], {}, "members of 0 are apart"),
    ([("0.png", b"x"), ("0.txt", b"x")], {"image_column": "pngs"}, r'"pngs"\), did you m'),
    ([("0.png", b"x")], {}, r'caption_column names \("captions"\)\. Members there: png'),
    ([("0.txt", b"x")], {}, 'image_column names .*Members there: txt'),
    (
      [("0.png", b"x"), ("0.json", b'{"title": "x"}')],
      {"caption_column": "titel"},
      r'\("titel"\), did you mean "title"\? .*fields of the json: title',
    ),
  ],
)  # fmt: skip
def test_bad_input(tmp_path, entries, fields, message):
  write_tar(tmp_path / "0.tar", entries)
  with pytest.raises(UserError, match=message):
    opened(tmp_path, **fields)


def test_broken_tars_are_named(tmp_path):
  write_tar(tmp_path / "0.tar", pairs(0, 3))
  whole = (tmp_path / "0.tar").read_bytes()
  (tmp_path / "1.tar").write_bytes(whole[:1540])
  (tmp_path / "2.tar").write_bytes(b"<html>" * 200)
  with pytest.raises(UserError) as caught:
    opened(tmp_path)
  message = str(caught.value)
  assert "1.tar: it ends within 0000.txt, at byte 1,540" in message
  assert "2.tar: there is no header at byte 0" in message
  assert "0.tar" not in message and "Replace it" in message


def test_the_sample_of_real_tars(real_data, processor):
  folder = real_data / "webdataset_sample"
  source = opened(folder)
  assert len(source) == 200
  assert [len(opened(folder, s)) for s in ("train", "eval", "dev")] == [120, 40, 40]
  table = open_source({"path": str(real_data / "flickr8k")}, split="all")
  texts = {record["group"].rpartition("/")[2]: record["texts"] for record in table}
  with tarfile.open(folder / "00000.tar") as tar:
    for i in (0, 57, 99):
      expected = tar.extractfile(f"{i:09d}.jpg").read()
      assert source[i]["images"] == [expected] and source[i]["id"] == f"00000/{i:09d}"
  for record in source:
    assert record["texts"] == texts[record["meta"]["file_name"]]
  with Pipeline(source, processor, batch_size=200, seed=0) as pipeline:
    assert next(pipeline)["has_image"].all()
