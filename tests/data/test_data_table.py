"""Tables: every format to the same records, whatever is wrong with single rows."""

from __future__ import annotations

import csv
import json
import pickle
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from gcl_jax.data import BadRecord, Pipeline, open_source
from gcl_jax.data.table_index import _ROW
from gcl_jax.errors import UserError

TEXTS = [
  "a dog",
  'he said "hi", and left',
  "two\nlines\nhere",
  "größer, 猫 \u2028 end",
  "'single' \\ back\\slash",
  '"',
]


def rows(texts=TEXTS):
  return [{"image": f"images/{i}.png", "captions": [t]} for i, t in enumerate(texts)]


@pytest.fixture
def folder(tmp_path):
  """A data folder with six pictures and no table yet."""
  (tmp_path / "images").mkdir()
  for i in range(len(TEXTS)):
    Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"images/{i}.png")
  return tmp_path


def write_json_lines(path, records=None):
  lines = [json.dumps(record) for record in records or rows()]
  path.write_text("\n".join(lines) + "\n")


def write_delimited(path, delimiter, newline="\n", bom=""):
  with open(path, "w", newline="", encoding="utf-8") as file:
    file.write(bom)
    writer = csv.writer(file, delimiter=delimiter, lineterminator=newline)
    writer.writerow(["photo", "title", "price"])
    for i, text in enumerate(TEXTS):
      writer.writerow([f"images/{i}.png", text, i])


def opened(folder, split="all", **fields):
  return open_source({"path": str(folder), **fields}, split=split)


def texts_of(source):
  return [source[i]["texts"] for i in range(len(source))]


def expect_all(source):
  assert texts_of(source) == [[text] for text in TEXTS]
  for i in range(len(source)):
    record = source[i]
    assert record["group"] == f"images/{i}.png"
    assert Image.open(record["images"][0]).getpixel((0, 0)) == (i, 0, 0)
  assert len({source[i]["id"] for i in range(len(source))}) == len(source)
  assert source.bad_lines == 0


COLUMNS = {"image_column": "photo", "caption_column": "title"}


def test_json_lines(folder):
  write_json_lines(folder / "captions.jsonl")
  expect_all(opened(folder))


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array(folder, indent):
  (folder / "meta.json").write_text(json.dumps(rows(), indent=indent))
  expect_all(opened(folder))


def test_json_lines_named_json(folder):
  write_json_lines(folder / "meta.json")
  expect_all(opened(folder))


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.tsv", "\t")])
def test_csv_and_tsv_with_quotes_and_new_lines(folder, name, delimiter, newline, bom):
  write_delimited(folder / name, delimiter, newline, bom)
  source = opened(folder, **COLUMNS)
  expect_all(source)
  assert source[3]["meta"] == {"price": "3"}


def test_csv_agrees_with_pyarrow(folder):
  import pyarrow.csv

  path = folder / "t.csv"
  rng = np.random.default_rng(0)
  letters = list('ab",\n\u00e9 ')
  texts = ["x" + "".join(rng.choice(letters, 12)) for _ in range(300)]
  with open(path, "w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows(
      [("photo", "title"), *[("images/0.png", t) for t in texts]]
    )
  options = pyarrow.csv.ParseOptions(newlines_in_values=True)
  expected = pyarrow.csv.read_csv(path, parse_options=options)["title"].to_pylist()
  assert [t for (t,) in texts_of(opened(folder, **COLUMNS))] == expected == texts


def test_last_line_without_its_end(folder):
  path = folder / "captions.jsonl"
  write_json_lines(path)
  path.write_bytes(path.read_bytes().rstrip())
  expect_all(opened(folder))


def test_a_quote_that_never_closes_costs_one_row(folder):
  lines = ["image,captions", "images/0.png,a dog", 'images/1.png,"torn']
  lines += [f"images/{i % 6}.png,row {i}" for i in range(20)]
  (folder / "t.csv").write_text("\n".join(lines) + "\n")
  source = opened(folder, max_bad_fraction=0.1)
  # The line has the right number of fields: its quote is taken as written.
  assert texts_of(source)[:3] == [["a dog"], ['"torn'], ["row 0"]]
  assert len(source) == 22


def test_tsv_written_without_quoting(folder):
  texts = ['"Hi" he said', '5" screen', '"open', "plain", '"a"b"']
  lines = ["image\tcaptions", *(f"images/{i}.png\t{t}" for i, t in enumerate(texts))]
  (folder / "t.tsv").write_text("\n".join(lines) + "\n")
  assert texts_of(opened(folder)) == [[t] for t in texts]


def test_broken_lines_are_left_out_counted_and_reported(folder):
  good = [json.dumps(row) for row in rows()]
  lines = [
    *good[:2],
    '{"image": "images/2.png", "captions": ["cut o',
    "[1, 2]",
    '{"image": "images/3.png"}',
    '{"captions": ["no picture column"]}',
    '{"image": 5, "captions": ["a number"]}',
    '{"image": null, "captions": []}',
    '{"image": "../secret.png", "captions": ["out"]}',
    '{"image": "/etc/passwd", "captions": ["out"]}',
    "",
    *good[2:],
  ]
  (folder / "captions.jsonl").write_text("\n".join(lines))
  source = opened(folder, max_bad_fraction=0.7)
  assert texts_of(source) == [[text] for text in TEXTS]
  assert source.bad_lines == 8
  assert [m.split(":")[0] for m in source.messages[:2]] == [
    "captions.jsonl line 3",
    "captions.jsonl line 4",
  ]
  assert "not JSON" in source.messages[0]
  with pytest.raises(UserError, match=r"8 of 14 rows .* line 3: not JSON.*max_bad_fra"):
    opened(folder)


def test_delimited_rows_with_other_numbers_of_fields_are_bad(folder):
  lines = ["image,captions", "images/0.png,fine", "images/1.png", "images/2.png,a,b"]
  (folder / "t.csv").write_bytes("\n".join(lines).encode() + b"\nimages/3.png,\xff\n")
  source = opened(folder, max_bad_fraction=1)
  assert texts_of(source) == [["fine"]]
  assert [m.split(": ", 1)[1] for m in source.messages] == [
    "1 fields, the header has 2",
    "3 fields, the header has 2",
    "not UTF-8 (invalid start byte)",
  ]


def test_documents_with_one_side_only(folder):
  records = [
    {"images": ["images/0.png", "images/1.png"], "captions": []},
    {"image": None, "captions": ["words", " ", "more"], "id": 7},
  ]
  write_json_lines(folder / "captions.jsonl", records)
  picture, words = opened(folder)
  assert len(picture["images"]) == 2 and picture["texts"] == []
  assert len(words["images"]) == 0 and words["texts"] == ["words", "more"]
  assert words["group"] == words["id"] == "7"


def test_several_caption_columns(folder):
  lines = ["image,title,about", "images/0.png,one,two", "images/1.png,,three"]
  (folder / "t.csv").write_text("\n".join(lines))
  for columns in ("title, about", ("title", "about")):
    source = opened(folder, caption_column=columns)
    assert texts_of(source) == [["one", "two"], ["three"]]


def test_llava_layout(folder):
  meta = [{"id": "004", "image": "0.png", "blip_caption": "a dog", "url": "http://x"}]
  name = "blip_laion_cc_sbu_558k_meta.json"
  (folder / name).write_text(json.dumps(meta))
  (folder / "other.json").write_text("[]")
  (record,) = opened(
    folder, table=name, caption_column="blip_caption", image_root="images"
  )
  assert record["id"] == "004" and record["group"] == "0.png"
  assert record["meta"] == {"url": "http://x"}
  assert record["images"][0] == str(folder / "images/0.png")


def test_the_path_of_a_table_serves_as_path(folder):
  write_json_lines(folder / "a.jsonl")
  write_json_lines(folder / "b.jsonl")
  expect_all(opened(folder / "a.jsonl"))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json"])
def test_pickled_it_still_reads(folder, kind):
  if kind == "csv":
    write_delimited(folder / "t.csv", ",")
  elif kind == "json":
    (folder / "t.json").write_text(json.dumps(rows()))
  else:
    write_json_lines(folder / "t.jsonl")
  source = opened(folder, **(COLUMNS if kind == "csv" else {}))
  source[0]
  expect_all(pickle.loads(pickle.dumps(source)))


def test_threads_read_the_same(folder):
  records = [{"image": "images/0.png", "captions": [f"t{i}" * 50]} for i in range(400)]
  write_json_lines(folder / "captions.jsonl", records)
  source, wrong = opened(folder), []

  def read(seed):
    for i in np.random.default_rng(seed).integers(400, size=500):
      if source[i]["texts"] != records[i]["captions"]:
        wrong.append(i)

  threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


def cached(own_cache):
  return sorted(own_cache.rglob("*.npy"))


def test_the_index_costs_bytes_and_is_kept(folder, own_cache, monkeypatch):
  assert _ROW.itemsize == 22
  path = folder / "captions.jsonl"
  write_json_lines(path)
  expect_all(opened(folder))
  (file,) = cached(own_cache)
  assert len(np.load(file)) == len(TEXTS)

  def scan(self):
    raise AssertionError("scanned again")

  with monkeypatch.context() as patch:
    patch.setattr("gcl_jax.data.table_formats.JsonLinesTable.scan", scan)
    expect_all(opened(folder))
  write_json_lines(path, rows()[:3])  # another size
  assert len(opened(folder)) == 3
  assert len(cached(own_cache)) == 2


def test_a_damaged_or_refused_cache_is_no_harm(folder, own_cache):
  write_json_lines(folder / "captions.jsonl")
  opened(folder)
  (file,) = cached(own_cache)
  file.write_bytes(file.read_bytes()[:40])
  expect_all(opened(folder))
  blocked = folder / "a_file"
  blocked.write_text("")
  expect_all(opened(folder, cache_dir=str(blocked)))


def test_cache_dir_is_used(folder, tmp_path, own_cache):
  write_json_lines(folder / "captions.jsonl")
  opened(folder, cache_dir=str(tmp_path / "run"))
  assert cached(tmp_path / "run") and not cached(own_cache)


def pack(folder, names, compression=zipfile.ZIP_DEFLATED):
  with zipfile.ZipFile(folder / "images.zip", "w", compression) as archive:
    archive.comment = b"a comment"
    for inside, name in names.items():
      archive.write(folder / name, inside)
      (folder / name).unlink()


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_a_zip_is_read_in_place(folder, compression):
  write_json_lines(folder / "captions.jsonl")
  names = {f"images/{i}.png": f"images/{i}.png" for i in range(1, 6)}  # 0 stays on disk
  expected = [(folder / name).read_bytes() for name in names]
  pack(folder, names, compression)
  for source in (opened(folder), pickle.loads(pickle.dumps(opened(folder)))):
    assert isinstance(source[0]["images"][0], str)
    assert [source[i]["images"][0] for i in range(1, 6)] == expected


def test_a_zip_without_the_image_root_inside(folder):
  write_json_lines(folder / "captions.jsonl", [{"image": "0.png", "captions": ["x"]}])
  pack(folder, {"0.png": "images/0.png"})
  (record,) = opened(folder, image_root="images")
  assert record["images"][0][:4] == b"\x89PNG"


def test_damage_in_a_zip_is_a_bad_record(folder, processor):
  write_json_lines(folder / "captions.jsonl")
  pack(folder, {f"images/{i}.png": f"images/{i}.png" for i in range(6)}, 0)
  archive = folder / "images.zip"
  raw = bytearray(archive.read_bytes())
  raw[raw.find(b"IDAT") + 6] ^= 255
  archive.write_bytes(raw)
  source = opened(folder)
  with pytest.raises(BadRecord, match="checksum"):
    source[0]["images"][0]
  (folder / "captions.jsonl").write_text(
    json.dumps({"image": "images/gone.png", "captions": ["x"]})
    + "\n"
    + json.dumps(rows()[1])
  )
  source = opened(folder)
  with pytest.raises(BadRecord, match=r"gone\.png is not there"):
    source[0]["images"][0]
  with Pipeline(source, processor, batch_size=2, seed=0, threads=0) as pipeline:
    assert next(pipeline)["has_image"].sum() == 1
    assert "gone.png" in pipeline.recent_errors()[0]


def test_not_a_zip(folder):
  write_json_lines(folder / "captions.jsonl")
  (folder / "images.zip").write_text("<html>")
  with pytest.raises(UserError, match="cannot be read as a zip"):
    opened(folder)


def test_odd_images_are_padding_exactly_where_they_cannot_be_read(
  real_data, tmp_path, processor
):
  from gcl_jax.processing import ImageError, decode_image

  odd = real_data / "odd_images"
  expected = [json.loads(line) for line in (odd / "expected.jsonl").open()]
  for entry in expected:
    (tmp_path / entry["image"]).symlink_to(odd / entry["image"])
  records = [{"image": e["image"], "captions": [e["about"]]} for e in expected]
  write_json_lines(tmp_path / "captions.jsonl", records)
  source = opened(tmp_path)
  with Pipeline(source, processor, batch_size=len(source), seed=0) as pipeline:
    batch = next(pipeline)
  readable = dict(zip(batch["index"].tolist(), batch["has_image"], strict=True))
  for i, entry in enumerate(expected):
    if entry["expect"] in ("ok", "error"):
      assert readable[i] == (entry["expect"] == "ok"), entry
    try:
      decode_image(odd / entry["image"])
      assert readable[i]
    except ImageError:
      assert not readable[i]
  np.testing.assert_array_equal(batch["has_image"], batch["has_text"])
  assert pipeline.bad_count == (~batch["has_image"]).sum() >= 6


@pytest.mark.parametrize(
  ("files", "fields", "message"),
  [
    ({}, {"path": ""}, r"config\.data\.path is empty"),
    ({}, {"path": "nowhere"}, "there is no folder nowhere"),
    ({}, {}, "is empty; put a table"),
    ({"a.png": "x"}, {}, r"no table, only a\.png"),
    ({"a.csv": "x", "b.tsv": "x"}, {}, r"several tables: a\.csv, b\.tsv"),
    ({"captions.jsonl": "{}"}, {"table": "caption.jsonl"}, "did you mean .captions"),
    ({"a.csv": "x"}, {"table": "a.xls"}, r"no table .*a\.csv"),
    ({"a.txt": "x"}, {"table": "a.txt"}, r"use \.jsonl"),
    ({"captions.jsonl": " \n"}, {}, "is empty"),
    ({"captions.jsonl": "not\njson\n"}, {}, "no usable row; 2 are broken.*line 1"),
    ({"a.json": '{"x": [\n1]}'}, {}, "no usable row"),
    ({"a.json": "[1, "}, {}, "is not JSON"),
    ({"a.json": "[]"}, {}, "no usable row"),
    (
      {"a.csv": "\ufeffimage,caption\nx,y\n"},
      {},
      'no column "captions", did you mean "c',
    ),
    ({"a.csv": "img\tcaptions\nx,y\n"}, {}, 'no column "image"'),
    ({"captions.jsonl": '{"img": "a", "captions": []}\n'}, {}, "Columns there: capt"),
    (
      {"a.csv": "image,captions,product\nx,y,z\n"},
      {"group_column": "products"},
      'no column "products", did you mean "product"',
    ),
    ({"a.csv": "image,captions\n"}, {}, "no usable row"),
    ({"a.csv": "image,captions\na.png,x\n"}, {}, r"none of 16 pictures.*image_root"),
  ],
)
def test_bad_input(tmp_path, monkeypatch, files, fields, message):
  monkeypatch.chdir(tmp_path)
  folder = tmp_path / "data"
  folder.mkdir()
  for name, content in files.items():
    (folder / name).write_text(content, encoding="utf-8")
  with pytest.raises(UserError, match=message):
    open_source({"path": str(folder)} | fields, split="all")


def test_utf16(tmp_path):
  (tmp_path / "a.csv").write_text("image,captions\na,b\n", encoding="utf-16")
  with pytest.raises(UserError, match="UTF-16; save it as UTF-8"):
    opened(tmp_path)
