"""CIRR, FashionIQ and their M-BEIR forms from the command line: real annotations, a
made-up picture for every id, a small random CLIP. `pytest -m slow -s` prints time and
memory."""

import colorsys
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from test_evaluation_benchmarks_composed_retrieval import linked
from test_evaluation_benchmarks_mbeir import INSTRUCTIONS

from gcl_jax.models import CLIPConfig, build, write_pretrained
from gcl_jax.processing import Processor, Tokenizer, default_clip_processor

ROOT = Path(__file__).resolve().parents[3]
PEAK = 3 << 30  # bytes; the interpreter, JAX and FAISS are a fifth of it


def draw(path, name):
  """A field of one colour with a bar of another, both from the name."""
  bits = hashlib.sha256(name.encode()).digest()
  ground, bar = (
    tuple(
      int(255 * c) for c in colorsys.hsv_to_rgb(bits[k] / 255, 0.8, bits[k + 1] / 255)
    )
    for k in (0, 2)
  )
  image = Image.new("RGB", (16, 16), ground)
  image.paste(bar, (bits[4] % 12, bits[5] % 12, 16, 16))
  image.save(path, compress_level=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory, real_data):
  """A Hugging Face folder with random weights."""
  folder = tmp_path_factory.mktemp("clip")
  tokenizer = Tokenizer.from_folder(real_data / "clip_tokenizer")
  processor: Processor = default_clip_processor(32, tokenizer)
  tower = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
  tower |= {"intermediate_size": 128}
  text = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id}
  text |= {"bos_token_id": tokenizer.bos_id}
  config = CLIPConfig.from_hf(
    {
      "projection_dim": 64,
      "text_config": tower | text,
      "vision_config": tower | {"image_size": 32, "patch_size": 8},
    }
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: np.float32(0.15) * rng.standard_normal(leaf.shape, np.float32),
    build(config).abstract(),
  )
  processor.save(folder)
  write_pretrained(folder, config, params)
  return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory, real_data):
  """The three folders, with a picture for every id."""
  started, annotations = time.monotonic(), real_data / "annotations"
  root = tmp_path_factory.mktemp("benchmarks")
  for name, source in (("cirr", "cirr"), ("fashioniq", "fashion-iq")):
    (root / name).mkdir()
    linked(root / name, annotations / source)
  command = [sys.executable, "-m", "gcl_jax.evaluation.benchmarks.rebuild_mbeir"]
  command += [f"--output={root / 'mbeir'}", f"--cirr={root / 'cirr'}"]
  command += [f"--fashioniq={root / 'fashioniq'}", "--fashioniq_suffix=.png"]
  command += [f"--instructions={annotations / 'mbeir' / INSTRUCTIONS}"]
  subprocess.run(command, check=True, cwd=ROOT)
  (root / "mbeir/mbeir_images").mkdir()
  (root / "fashioniq/images").mkdir()
  links = {"cirr_images": root / "cirr", "fashioniq_images": root / "fashioniq/images"}
  for name, target in links.items():
    (root / "mbeir/mbeir_images" / name).symlink_to(target)
  count = 0
  for pool in (root / "mbeir/cand_pool/local").iterdir():
    for line in pool.read_text().splitlines():
      path = root / "mbeir" / json.loads(line)["img_path"]
      path.parent.mkdir(parents=True, exist_ok=True)
      draw(path, path.name)
      count += 1
  print(f"\n{count:,} pictures in {time.monotonic() - started:.0f} s")
  return root


CASES = {
  "cirr": "val,test1",
  "fashioniq": "dress,shirt,toptee,mbeir",
  "mbeir": "cirr_task7,fashioniq_task7",
}
SIZES = {
  "val": (4181, 2297),
  "test1": (4148, 2315),
  "dress": (2017, 3817),
  "shirt": (2038, 6346),
  "toptee": (1961, 5373),
  "mbeir": (6003, 74_381),
  "cirr_task7": (4170, 21_551),
  "fashioniq_task7": (6003, 74_381),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_real_annotations_with_made_up_pictures(name, data, model, tmp_path):
  started, output = time.monotonic(), tmp_path / "result.json"
  command = [sys.executable, "-m", "gcl_jax.evaluate", f"--checkpoint={model}"]
  command += [f"--benchmark={name}", f"--root={data / name}", f"--tasks={CASES[name]}"]
  command += [f"--output={output}", f"--export_run={tmp_path / 'run'}"]
  command += ["--batch_size=256"]
  done = subprocess.run(
    command,
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  result = json.loads(output.read_text())
  print(
    f"\n{done.stdout}\n{time.monotonic() - started:.0f} s in all, {result['seconds']}"
  )
  print(f"peak memory {result['peak_bytes'] / 2**20:,.0f} MiB")
  assert result["peak_bytes"] < PEAK
  assert not result["partial"]
  for task, fields in result["tasks"].items():
    for scoring, block in fields["scores"].items():
      sizes = SIZES[task] if scoring != "subset" else (SIZES[task][0], 5)
      assert (block["queries"], block["candidates"]) == sizes
      folder = tmp_path / "run" / task / scoring
      if scoring in ("unmasked", "local"):
        counted = count(folder, [int(k) for k in block["recall"]])
        assert block["recall"] == pytest.approx(counted, abs=0.02)  # ties at a cut-off
  if name == "cirr":
    references = dict(
      line.split() for line in (tmp_path / "run/val/recall/excluded.txt").open()
    )
    found = (line.split() for line in (tmp_path / "run/val/recall/run.trec").open())
    assert not any(references[fields[0]] == fields[2] for fields in found)


def count(folder, cutoffs):
  """Hit-or-miss recall in percent of exported vectors, in plain float32 NumPy."""
  queries, pool = (np.load(folder / f"{n}_embed.npy") for n in ("query", "cand"))
  names = {s: (folder / f"{s}_ids.txt").read_text().split() for s in ("query", "cand")}
  place = {name: row for row, name in enumerate(names["cand"])}
  answers = {name: [] for name in names["query"]}
  for line in (folder / "qrels.txt").open():
    qid, _, did, _ = line.split()
    answers[qid].append(place[did])
  hits = np.zeros(len(cutoffs))
  for start in range(0, len(queries), 256):
    scores = queries[start : start + 256] @ pool.T
    for row, qid in zip(scores, names["query"][start : start + 256], strict=True):
      above = [np.sum(row > row[a]) + np.sum(row[:a] == row[a]) for a in answers[qid]]
      hits += [min(above) < k for k in cutoffs]
  return {str(k): 100 * h / len(queries) for k, h in zip(cutoffs, hits, strict=True)}
