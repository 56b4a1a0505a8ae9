"""Packing and reading back: what stays equal, what a kill leaves, what is refused."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gcl_jax.data import BadRecord, DataSettings, Pipeline, open_source, pack_records
from gcl_jax.paths import as_path
from gcl_jax.data.pack import _range
from gcl_jax.data.pack_records import Packing, pack_picture, shorter_side
from gcl_jax.data.packed_format import decode_index, decode_record, encode_record
from gcl_jax.data.packing import pack
from gcl_jax.errors import UserError

SIDE = 16  # of the fixture `processor`
SIZES = [(40, 30), (30, 41), (16, 16), (17, 90), (200, 18), (9, 12), (33, 33), (64, 16)]


def noise(i, size, kind="PNG", **options):
  """An encoded picture of noise: every difference shows."""
  values = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(values).save(file, kind, **options)
  return file.getvalue()


def table(folder, count=20, sizes=SIZES):
  """A folder of pairs; some pictures lie on their side by EXIF."""
  (folder / "images").mkdir(parents=True)
  records = []
  for i in range(count):
    exif = Image.Exif()
    exif[0x0112] = 6 if i % 3 == 1 else 1
    raw = noise(i, sizes[i % len(sizes)], exif=exif)
    (folder / f"images/{i}.png").write_bytes(raw)
    records.append({"image": f"images/{i}.png", "captions": [f"text {i}", "größer 猫"]})
  (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, records)))
  return folder


def settings_of(folder, **fields):
  return DataSettings.from_config({"path": str(folder), **fields})


def packed(folder, output, packing=None, split="all", fields=None, **options):
  settings = settings_of(folder, **(fields or {}))
  packing = packing or Packing(SIDE, lossless=True, shard_records=8)
  source = open_source(settings, split=split)
  return pack(source, output, packing, settings, split=split, threads=2, **options)


def opened(folder, split="all", **fields):
  return open_source({"source": "packed", "path": str(folder), **fields}, split=split)


def shards(folder):
  return sorted(path.name for path in Path(folder).glob("*.array_record"))


def contents(folder):
  return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@functools.cache
def undisturbed(root):
  """A table and its packing, made once for all tests."""
  table(root / "pairs")
  packed(root / "pairs", root / "packed")
  return root / "pairs", root / "packed"


@pytest.fixture
def made(tmp_path_factory):
  return undisturbed(tmp_path_factory.getbasetemp() / "packing")


def test_records_are_the_same(made):
  pairs, output = made
  here, there = open_source(settings_of(pairs), split="all"), opened(output)
  assert len(there) == len(here) == 20 and len(shards(output)) == 3
  for ours, theirs in zip(here, pickle.loads(pickle.dumps(there)), strict=True):
    for field in ("id", "texts", "group", "meta"):
      assert ours[field] == theirs[field]
    assert len(theirs["images"]) == 1 and "split" not in theirs
  manifest = json.loads((output / "packed.json").read_text())
  assert manifest["complete"] and manifest["records"] == 20
  assert manifest["splits"] == {"": 20} and manifest["bad_records"] == 0


def test_without_loss_the_pixels_of_training_are_the_same(made, processor):
  pairs, output = made
  sources = [open_source(settings_of(pairs), split="all"), opened(output)]
  batches = []
  for source in sources:
    with Pipeline(source, processor, batch_size=20, seed=3) as pipeline:
      batches.append(next(pipeline))
  assert batches[0]["has_image"].all()
  for name, array in batches[0].items():
    np.testing.assert_array_equal(array, batches[1][name], err_msg=name)


def test_splits_by_hash_are_the_same(made):
  pairs, output = made
  for split in ("train", "eval"):
    here = open_source(settings_of(pairs, eval_fraction=0.4), split=split)
    there = opened(output, split, eval_fraction=0.4)
    assert [r["id"] for r in here] == [r["id"] for r in there]


def test_one_split_alone_keeps_its_name(made, tmp_path):
  manifest = packed(made[0], tmp_path / "out", split="eval", fields={"eval_fraction": 0.4})
  held = open_source(settings_of(made[0], eval_fraction=0.4), split="eval")
  assert manifest["splits"] == {"eval": len(held)}
  there = opened(tmp_path / "out", "eval", eval_fraction=0.1)
  assert [r["id"] for r in there] == [r["id"] for r in held]
  assert {r["split"] for r in there} == {"eval"}


@pytest.mark.parametrize("size", [(16, 16), (9, 12), (16, 300)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_small_picture_keeps_its_file(size, kind):
  raw = noise(0, size, kind)
  assert pack_picture(raw, Packing(SIDE)) == raw


def test_a_small_picture_in_a_large_file_is_written_anew_without_loss():
  frames = [Image.effect_noise((16, 16), 90) for _ in range(300)]
  file = io.BytesIO()
  frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
  assert len(file.getvalue()) > 66_560
  short = pack_picture(file.getvalue(), Packing(SIDE))
  assert len(short) < 2000
  before, after = (Image.open(io.BytesIO(r)).convert("RGB") for r in (file.getvalue(), short))
  np.testing.assert_array_equal(np.asarray(before), np.asarray(after))


@pytest.mark.parametrize(
  ("size", "expected"), [((40, 30), (21, 16)), ((30, 41), (16, 21)), ((17, 90), (16, 84))]
)
def test_a_large_picture_is_reduced_to_the_shorter_side(size, expected, processor):
  raw = noise(0, size, "JPEG", quality=95)
  for lossless, kind in ((False, "JPEG"), (True, "PNG")):
    image = Image.open(io.BytesIO(pack_picture(raw, Packing(SIDE, lossless=lossless))))
    assert image.size == expected and image.format == kind
    assert processor.image.resized(size) == expected


def test_quality_is_used_and_pictures_stay_close():
  smooth = Image.linear_gradient("L").resize((100, 80)).convert("RGB")
  file = io.BytesIO()
  smooth.save(file, "PNG")
  exact = Image.open(io.BytesIO(pack_picture(file.getvalue(), Packing(SIDE, lossless=True))))
  sizes = []
  for quality in (95, 92, 30):
    raw = pack_picture(file.getvalue(), Packing(SIDE, quality=quality))
    sizes.append(len(raw))
    off = np.asarray(Image.open(io.BytesIO(raw)), int) - np.asarray(exact, int)
    assert abs(off).max() <= (3 if quality > 90 else 255)
  assert sizes[0] > sizes[1] > sizes[2]


def test_pil_pictures_and_several_of_them(tmp_path):
  fields = {"source": "scenes", "scenes_train_size": 6, "scenes_image_size": 32}
  packed("", tmp_path / "out", Packing(SIDE, lossless=True), "train", fields)
  here = open_source(fields, split="train")
  there = opened(tmp_path / "out", "train")
  assert len(there) == 6 and there[0]["split"] == "train"
  assert len(there[0]["images"]) == len(here[0]["images"]) == 16
  for k in (0, 15):
    expected = here[5]["images"][k].resize((16, 16), Image.Resampling.BICUBIC)
    got = Image.open(io.BytesIO(there[5]["images"][k]))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
  assert there[3]["texts"] == list(here[3]["texts"])


def test_bad_records_are_left_out_counted_and_listed(tmp_path):
  pairs = table(tmp_path / "pairs")
  (pairs / "images/3.png").write_bytes(b"no picture")
  (pairs / "images/9.png").unlink()
  with (pairs / "captions.jsonl").open("a") as file:
    two = {"images": ["images/3.png", "images/1.png"], "captions": ["half"]}
    file.write("\n" + json.dumps(two))
    file.write("\n" + json.dumps({"images": [], "captions": ["words only"]}))
  output = tmp_path / "out"
  with pytest.raises(UserError, match=r"3 records cannot be read.*\(0\.1\).*row-20: "):
    packed(pairs, tmp_path / "no", fields={"max_bad_fraction": 0.1})
  manifest = packed(pairs, output, fields={"max_bad_fraction": 0.2})
  assert manifest["records"] == 20 and manifest["bad_records"] == 2
  assert [m.split(":")[0] for m in manifest["bad"]] == ["row-3", "row-9", "row-20"]
  assert "not a picture" in manifest["bad"][0] and "not there" in manifest["bad"][1]
  source = opened(output)
  names = [f"row-{i}" for i in range(22) if i not in (3, 9)]
  assert [record["id"] for record in source] == names
  assert len(source[18]["images"]) == 1 and source[18]["texts"] == ["half"]
  assert source[19]["images"] == [] and source[19]["texts"] == ["words only"]


class Killed(BaseException):
  """Stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("after", [0, 5, 8, 13, 16, 19])
def test_it_goes_on_after_a_stop_anywhere(made, tmp_path, monkeypatch, after):
  pairs, whole = made
  output, done = tmp_path / "out", []
  original = pack_records.pack_record

  def record(source, index, packing):
    if index >= after:
      raise Killed
    return original(source, index, packing)

  with monkeypatch.context() as patch:
    patch.setattr("gcl_jax.data.packing.pack_record", record)
    with pytest.raises(Killed):
      packed(pairs, output)
  assert len(shards(output)) == after // 8
  with pytest.raises(UserError, match="packing is not finished: there is no .*array_rec"):
    opened(output)

  def note(source, index, packing):
    done.append(index)
    return original(source, index, packing)

  monkeypatch.setattr("gcl_jax.data.packing.pack_record", note)
  packed(pairs, output)
  assert sorted(done) == list(range(after // 8 * 8, 20))
  assert contents(output) == contents(whole)


def test_it_goes_on_after_sigkill(made, tmp_path):
  pairs, whole = made
  output = tmp_path / "out"
  code = """
import sys, time
from gcl_jax.data import DataSettings, open_source, packing
from gcl_jax.data.pack_records import Packing, pack_record
def slow(source, index, packing):
  time.sleep(0.02)
  return pack_record(source, index, packing)
packing.pack_record = slow
settings = DataSettings.from_config({"path": sys.argv[1]})
source = open_source(settings, split="all")
packing.pack(source, sys.argv[2], Packing(16, 92, True, 8), settings, threads=1)
"""
  process = subprocess.Popen([sys.executable, "-c", code, str(pairs), str(output)])
  until = time.monotonic() + 60
  while not shards(output) and time.monotonic() < until and process.poll() is None:
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL and len(shards(output)) in (1, 2)
  packed(pairs, output)
  assert contents(output) == contents(whole)  # and nothing half-written beside it


def test_several_processes_share_the_shards(made, tmp_path):
  pairs, whole = made
  output = tmp_path / "out"
  assert not packed(pairs, output, shard_range=(1, 3))["complete"]
  assert len(shards(output)) == 2
  assert packed(pairs, output, shard_range=(0, 1))["complete"]
  assert contents(output) == contents(whole)


def test_what_is_packed_is_left_alone(made, tmp_path):
  pairs, whole = made
  output = tmp_path / "out"
  shutil.copytree(whole, output)
  before = {p.name: p.stat().st_mtime_ns for p in output.glob("pairs*")}
  (output / "pairs-00001-of-00003.index.npz0.part").touch()  # as a kill leaves it
  said = []
  packed(pairs, output, progress=said.append)
  assert {p.name: p.stat().st_mtime_ns for p in output.glob("pairs*")} == before
  assert [done.total for done in said] == [0]


def test_progress(made, tmp_path):
  said = []
  packed(made[0], tmp_path / "out", progress=said.append)
  assert (said[-1].records, said[-1].total, said[-1].bad) == (20, 20, 0)
  assert said[-1].seconds > 0


def test_another_packing_is_refused(made, tmp_path):
  pairs, whole = made
  before = contents(whole)
  for packing, message in (
    (Packing(17, lossless=True, shard_records=8), "shorter_side: 16 then, 17 now"),
    (Packing(SIDE, shard_records=8), "lossless: True then, False now"),
    (Packing(SIDE, lossless=True, shard_records=9), "shard_records: 8 then, 9 now"),
  ):
    with pytest.raises(UserError, match=rf"another packing \({message}\)"):
      packed(pairs, whole, packing)
  other = tmp_path / "pairs"
  shutil.copytree(pairs, other)
  with pytest.raises(UserError, match=r"data\.path"):
    packed(other, whole)
  with pytest.raises(UserError, match="split: 'all' then, 'train' now"):
    packed(pairs, whole, split="train")
  text = (other / "captions.jsonl").read_text()
  packed(other, tmp_path / "out")
  (other / "captions.jsonl").write_text(text.replace("text 0", "text X"))
  with pytest.raises(UserError, match="content"):
    packed(other, tmp_path / "out")
  assert contents(whole) == before


def test_other_folders_are_refused(made, tmp_path):
  pairs, _ = made
  (tmp_path / "file").write_text("mine")
  with pytest.raises(UserError, match="is a file: name a folder"):
    packed(pairs, tmp_path / "file")
  with pytest.raises(UserError, match="is not empty and holds nothing packed"):
    packed(pairs, tmp_path)
  with pytest.raises(UserError, match=r"cannot be written: .*Not a directory"):
    packed(pairs, tmp_path / "file" / "sub")
  assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
  (tmp_path / "empty").mkdir()
  packed(pairs, tmp_path / "empty")


@pytest.mark.parametrize("shard_range", [(0, 4), (2, 2), (3, 4), (-1, 2)])
def test_shards_outside_the_range(made, tmp_path, shard_range):
  with pytest.raises(UserError, match=r"outside the 3 shards.*choose within 0:3"):
    packed(made[0], tmp_path / "out", shard_range=shard_range)
  assert not (tmp_path / "out").exists()


def test_a_full_disk(made, tmp_path, monkeypatch):
  from array_record.python import array_record_module as module

  class Full(module.ArrayRecordWriter):
    def write(self, raw):
      raise RuntimeError("No space left on device")

  class Silent(module.ArrayRecordWriter):
    def write(self, raw):
      pass

  for writer, said in ((Full, "No space left"), (Silent, "0 of 8 records")):
    output = tmp_path / writer.__name__
    with monkeypatch.context() as patch:
      patch.setattr(module, "ArrayRecordWriter", writer)
      with pytest.raises(UserError, match=rf"cannot be written \({said}.*disk full\?"):
        packed(made[0], output)
    assert [p.name for p in output.iterdir()] == ["packed.json"]
    packed(made[0], output)
    assert len(opened(output)) == 20


@pytest.mark.parametrize(
  ("harm", "message"),
  [
    (lambda f: (f / "packed.json").unlink(), r"there is no .*packed\.json: pack a source"),
    (lambda f: (f / "packed.json").write_text("{"), "is no manifest"),
    (lambda f: (f / "packed.json").write_text('{"format": 0, "shards": 3}'), "format 0"),
    (lambda f: (f / shards(f)[1]).unlink(), "not finished: there is no .*00001-of-00003"),
    (lambda f: os.truncate(f / shards(f)[1], 3000), "00001-of-00003.*3,000 bytes and not"),
    (lambda f: next(f.glob("*.npz")).write_bytes(b"PK"), "index.npz cannot be read"),
    (lambda f: next(f.glob("*.npz")).write_bytes(b""), "index.npz cannot be read"),
  ],
)
def test_damage_is_noticed_at_the_start(made, tmp_path, harm, message):
  shutil.copytree(made[1], tmp_path / "out")
  harm(tmp_path / "out")
  with pytest.raises(UserError, match=message):
    opened(tmp_path / "out")


def test_a_shard_that_went_bad_is_no_silent_end(made, tmp_path):
  shutil.copytree(made[1], tmp_path / "out")
  path = tmp_path / "out" / shards(made[1])[0]
  path.write_bytes(bytes(path.stat().st_size))
  with pytest.raises(UserError, match="is damaged: 0 records and not 8"):
    opened(tmp_path / "out")[0]


def test_a_record_that_went_bad_is_a_bad_record(made, tmp_path, processor):
  shutil.copytree(made[1], tmp_path / "out")
  path = tmp_path / "out" / shards(made[1])[0]
  raw = bytearray(path.read_bytes())
  at = raw.find(b'"text 2"')
  raw[at : at + 8] = b'"broken"'
  path.write_bytes(raw)
  source = opened(tmp_path / "out")
  assert source[1]["texts"][0] == "text 1"
  with pytest.raises(BadRecord, match=r"00000-of-00003\.array_record, record 2"):
    source[2]
  with Pipeline(source, processor, batch_size=20, seed=0) as pipeline:
    assert next(pipeline)["has_image"].sum() == 19


def test_no_path():
  with pytest.raises(UserError, match=r"config\.data\.path is empty"):
    opened("")


def test_the_bytes_of_a_record():
  record = {"id": "größe", "texts": ["a\ud800"], "group": "g", "meta": {"day": time}}
  raw = encode_record(record, [b"one", b"", b"three"])
  again = decode_record(raw)
  assert again["images"] == [b"one", b"", b"three"] and again["texts"] == ["a\ud800"]
  assert again["id"] == "größe" and again["meta"]["day"].startswith("<module")
  for broken in (raw[:-1], raw + b"x", b"", raw[:3], b"\xff\xff\xff\xff" + raw[4:]):
    with pytest.raises(BadRecord, match="no packed record"):
      decode_record(broken)
  with pytest.raises(ValueError, match="no index"):
    decode_index(raw)


def test_threads_read_the_same(made):
  source, wrong = opened(made[1]), []
  expected = [record["id"] for record in source]
  source = pickle.loads(pickle.dumps(source))

  def read(seed):
    for i in np.random.default_rng(seed).integers(20, size=300):
      if source[i]["id"] != expected[i]:
        wrong.append(i)

  threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


def test_from_and_to_a_bucket(made, tmp_path, bucket, own_cache, monkeypatch, processor):
  pairs, whole = made
  url = bucket(pairs)
  manifest = packed(url, "gs://bucket/packed")
  assert manifest["complete"]
  here = {k: v for k, v in contents(whole).items() if k != "packed.json"}
  there = {p.name: p.read_bytes() for p in as_path("gs://bucket/packed").walk()}
  assert there.keys() == {*here, "packed.json"}
  assert all(there[name] == here[name] for name in here)
  source = opened("gs://bucket/packed")
  assert not list(own_cache.rglob("pairs*.array_record"))  # not before it is asked for
  with Pipeline(source, processor, batch_size=20, seed=0) as pipeline:
    assert next(pipeline)["has_image"].all()
  copies = sorted(own_cache.rglob("shards/*"))
  assert [copy.read_bytes() for copy in copies] == [here[name] for name in shards(whole)]
  stamps = [copy.stat().st_mtime_ns for copy in copies]
  assert list(opened("gs://bucket/packed")) == list(opened(whole))
  assert [copy.stat().st_mtime_ns for copy in copies] == stamps

  opened("gs://bucket/packed", cache_dir=str(tmp_path / "else"))[0]
  assert len(list((tmp_path / "else").rglob("*.array_record"))) == 1
  usage = shutil.disk_usage("/")._replace(free=1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
  assert len(opened("gs://bucket/packed")) == 20  # the copies are there
  with pytest.raises(UserError, match=r"copied to .*0\.0 GB left.*config\.data\.cache_dir"):
    opened("gs://bucket/packed", cache_dir=str(tmp_path / "new"))


@pytest.mark.parametrize(
  ("size", "margin", "augment", "expected"),
  [
    (224, 0, "none", 224),
    (224, 0, "flip", 224),
    (224, 0, "crop", 317),
    (100, 1.25, "crop_flip", 125),
    (100, 1, "crop", 100),
  ],
)
def test_the_shorter_side(size, margin, augment, expected):
  settings = settings_of("x", augment=augment)
  assert shorter_side(size, margin, settings) == expected


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: shorter_side(0, 0, settings_of("x")), "--size is missing"),
    (lambda: shorter_side(8, 0.5, settings_of("x")), r"--margin=0\.5 is below 1"),
    (lambda: Packing(0), "pictures of 0 pixels"),
    (lambda: Packing(8, quality=96), "--quality=96 is outside"),
    (lambda: Packing(8, shard_records=0), "--shard_records=0"),
    (lambda: _range("1-2"), "--shard_range=1-2: write first:end"),
  ],
)
def test_flags_that_cannot_be(call, message):
  with pytest.raises(UserError, match=message):
    call()


def run(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "gcl_jax.data.pack", *arguments],
    cwd=Path(__file__).parents[2],
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_the_command_line(tmp_path, real_data):
  output = tmp_path / "out"
  arguments = [f"--data={real_data / 'webdataset_sample'}", f"--output={output}"]
  done = run(*arguments, "--config=configs/small.py", "--shard_records=150")
  assert done.returncode == 0, done.stderr
  assert "200 records in 2 shards" in done.stdout
  assert f"--config.data.source=packed --config.data.path={output}" in done.stdout
  assert "packed 200 of 200 records" in done.stderr and "0:00 left, 0 bad" in done.stderr
  plan = json.loads((output / "packed.json").read_text())["plan"]
  assert plan["shorter_side"] == 136  # 96 pixels, and crops of half the area
  assert [len(opened(output, split)) for split in ("train", "eval")] == [120, 40]
  done = run(*arguments, "--size=96")
  assert done.returncode == 2 and "holds another packing" in done.stderr
  assert done.stderr.count("\n") == 1
