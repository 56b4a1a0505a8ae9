"""The commands with a VISTA, which fuses by its own encoder: benchmark, embed, search."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from PIL import Image

import gcl_jax
from gcl_jax import embed, evaluate, search

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "models"))
import vista_cases as cases  # noqa: E402

TEXTS = ("A red dog.", "A cat runs.", "Man.", "A dog runs.", "Red cat.", "A man.")


def run(command, *arguments):
  """A command's `main` in this process, with these flags alone."""
  before = set(flags.FLAGS)
  command._define_flags()
  try:
    flags.FLAGS(["command", *arguments])
    command.main()
  finally:
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)


@pytest.fixture(scope="module")
def vista(tmp_path_factory):
  folder = tmp_path_factory.mktemp("vista") / "hub"
  cases.write_folder(folder)
  return folder


@pytest.fixture(scope="module")
def mbeir(tmp_path_factory):
  """Three queries and three candidates, each a picture and a text."""
  root, name = tmp_path_factory.mktemp("M-BEIR"), "oven_task8"
  (root / "pictures").mkdir()
  rng = np.random.default_rng(0)
  for k in range(6):
    pixels = rng.integers(0, 256, (40, 47, 3), np.uint8)
    Image.fromarray(pixels).save(root / "pictures" / f"{k}.png")
  both = "image,text"
  asked = [
    {
      "qid": f"5:{k}",
      "query_txt": TEXTS[k],
      "query_img_path": f"pictures/{k}.png",
      "query_modality": both,
      "task_id": 8,
    }
    for k in range(3)
  ]
  pool = [
    {
      "did": f"5:{k}",
      "txt": TEXTS[k],
      "img_path": f"pictures/{k}.png",
      "modality": both,
    }
    for k in range(3, 6)
  ]
  for file, entries in (
    (f"query/test/mbeir_{name}_test.jsonl", asked),
    (f"cand_pool/local/mbeir_{name}_cand_pool.jsonl", pool),
  ):
    (root / file).parent.mkdir(parents=True)
    (root / file).write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
  judged = root / f"qrels/test/mbeir_{name}_test_qrels.txt"
  judged.parent.mkdir(parents=True)
  judged.write_text("".join(f"5:{k} 0 5:{k + 3} 1 8\n" for k in range(3)))
  return root


@pytest.fixture(scope="module")
def fused(vista, mbeir):
  """(6, D) what the model makes of the six documents."""
  images = [mbeir / "pictures" / f"{k}.png" for k in range(6)]
  return gcl_jax.load(vista).embed(images, list(TEXTS))


def benchmark(vista, mbeir, folder, *more):
  """The result of M-BEIR, and its six rows."""
  run(
    evaluate,
    f"--checkpoint={vista}",
    "--benchmark=mbeir",
    f"--root={mbeir}",
    "--tasks=oven_task8",
    "--instructions=none",
    f"--output={folder / 'result.json'}",
    f"--export_run={folder / 'run'}",
    *more,
  )
  rows = folder / "run" / "oven_task8" / "local"
  parts = [np.load(rows / f"{side}_embed.npy") for side in ("query", "cand")]
  return json.loads((folder / "result.json").read_text()), np.concatenate(parts)


def test_a_benchmark_takes_the_pass_that_makes_both_one(vista, mbeir, fused, tmp_path):
  result, rows = benchmark(vista, mbeir, tmp_path)
  np.testing.assert_allclose(rows, fused, atol=1e-3)  # kept in float16
  assert result["protocol"]["fusion"] == "checkpoint"
  assert result["protocol"]["official_embedding"] is True
  assert result["model"]["fusion"] == {"of": "encoder"}
  assert not any("fused" in note for note in result["notes"])


def test_adding_instead_is_said(vista, mbeir, fused, tmp_path):
  result, rows = benchmark(vista, mbeir, tmp_path, "--fusion=raw", "--stored=float32")
  assert (np.sum(rows * fused, axis=1) < 0.99).all()
  assert result["protocol"]["official_embedding"] is False
  (note,) = [note for note in result["notes"] if "fused" in note]
  assert "adding vectors of image and text (raw)" in note and "encoder" in note


def test_embed_says_how_often_it_cut_a_text(vista, tmp_path, capsys):
  Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
  line = {"image": "0.png", "captions": ["a dog runs " * 20]}
  (tmp_path / "captions.jsonl").write_text(f"{json.dumps(line)}\n")
  data, output = f"--data={tmp_path}", f"--output={tmp_path / 'index'}"
  run(embed, f"--checkpoint={vista}", data, output, "--modality=each")
  said = "2 times, in this process, a text was longer than the model takes"
  assert said in capsys.readouterr().out


def test_embed_and_search(vista, mbeir, fused, tmp_path, capsys):
  lines = [{"image": f"{k}.png", "captions": [text]} for k, text in enumerate(TEXTS)]
  captions = "".join(f"{json.dumps(line)}\n" for line in lines)
  (mbeir / "pictures" / "captions.jsonl").write_text(captions)
  index = tmp_path / "index"
  run(
    embed,
    f"--checkpoint={vista}",
    f"--data={mbeir / 'pictures'}",
    f"--output={index}",
    "--modality=each",
  )
  assert "18 documents: 6 image, 6 text, 6 fused" in capsys.readouterr().out
  manifest = json.loads((index / "manifest.json").read_text())
  assert manifest["model"]["fusion"] == {"of": "encoder"}
  run(
    search,
    f"--index={index}",
    f"--text={TEXTS[4]}",
    f"--image={mbeir / 'pictures' / '4.png'}",
    "--modality=fused",
    "--json",
  )
  hits = json.loads(capsys.readouterr().out)
  assert hits[0]["text"] == TEXTS[4] and hits[0]["score"] > 1 - 1e-5
  want = fused[4] @ fused.T
  np.testing.assert_allclose([h["score"] for h in hits], -np.sort(-want), atol=1e-5)
