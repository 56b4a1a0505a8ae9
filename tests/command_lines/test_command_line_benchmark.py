"""A public benchmark from the command line: one result file, or one message."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from gcl_jax.evaluate import cut_notes, fusion_notes
from gcl_jax.fusion import ENCODER, FusionSettings

ROOT = Path(__file__).resolve().parents[2]


def evaluate(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "gcl_jax.evaluate", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=200,
  )


@pytest.fixture
def composed(tmp_path):
  """Four pictures, two of which are asked for by a picture and a text."""
  root = tmp_path / "composed"
  root.mkdir()
  for k in range(4):
    Image.new("RGB", (40, 30), (60 * k, 200 - 50 * k, 90)).save(root / f"{k}.png")
  lines = [
    {"reference": f"{k}.png", "text": f"a red dot {k}", "target": f"{k + 1}.png"}
    for k in (0, 2)
  ]
  (root / "composed.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  return root


def test_one_result_file_with_all_that_tells_where_it_is_from(
  composed, tiny_run, tmp_path
):
  output, run = tmp_path / "result.json", tmp_path / "run"
  done = evaluate(
    f"--checkpoint={tiny_run}",
    "--benchmark=composed",
    f"--root={composed}",
    f"--output={output}",
    f"--export_run={run}",
  )
  assert done.returncode == 0, done.stderr
  assert "it > i" in done.stdout
  result = json.loads(output.read_text())
  block = result["tasks"]["composed"]["scores"]["all"]
  assert (block["queries"], block["candidates"]) == (2, 4)
  assert block["recall"]["5"] == 100  # three candidates are left to each
  assert result["checkpoint"] == str(tiny_run)
  assert result["protocol"]["fusion"] == "checkpoint"
  for digest in ("config_sha256", "data_sha256"):
    assert len(result[digest]) == 64
  assert len(result["model"]["weights"]) == 64
  assert (run / "composed/all/run.trec").is_file()


@pytest.mark.parametrize(
  ("used", "own", "said"),
  [
    ("raw", {}, False),
    ("unit", {}, True),
    ("raw", {"of": "unit"}, True),
    ("unit", {"of": "unit"}, False),
    ("raw", {"text_weight": 0.5}, True),
    ("raw", {"learned": True}, True),
    ("checkpoint", {"of": "unit", "text_weight": 0.5}, False),
  ],
)
def test_fusing_unlike_the_model_s_training_is_said(used, own, said):
  result = {
    "protocol": {"fusion": used},
    "model": {"fusion": FusionSettings(**own).to_dict()},
  }
  assert bool(fusion_notes(result)) is said


@pytest.mark.parametrize("used", ["raw", "unit"])
def test_of_an_encoder_that_fuses_nothing_else_is_called_its_own(used):
  result = {"protocol": {"fusion": used}, "model": {"fusion": {"of": ENCODER}}}
  (note,) = fusion_notes(result)
  assert f"({used})" in note and "own encoder fuses" in note
  result["protocol"]["fusion"] = "checkpoint"
  assert fusion_notes(result) == []


def test_how_often_texts_were_cut_is_said():
  def notes(cut):
    tokenizer = types.SimpleNamespace(texts_cut=cut)
    processor = types.SimpleNamespace(tokenizer=tokenizer)
    return cut_notes(
      types.SimpleNamespace(embedder=types.SimpleNamespace(processor=processor))
    )

  assert notes(0) == []
  (note,) = notes(1234)
  # The same text alone and beside an image is cut twice: so many texts are not there.
  assert note.startswith("1,234 times a text was longer than the model takes")


def test_a_mistake_is_one_message_before_a_model_is_loaded(composed):
  (composed / "composed.jsonl").unlink()
  done = evaluate("--checkpoint=nowhere", "--benchmark=composed", f"--root={composed}")
  assert done.returncode == 2
  assert "lacks composed.jsonl" in done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--root=x",), "--root does nothing without --benchmark: name one"),
    (("--tasks=cirr_task7",), "--tasks does nothing without --benchmark"),
    (("--benchmark=cirr", "--items=5"), "--items does nothing with --benchmark=cirr"),
    (("--batch_size=0",), "--batch_size=0: at least one document"),
  ],
)
def test_flags_of_the_other_kind_are_refused(arguments, message):
  done = evaluate("--checkpoint=nowhere", *arguments)
  assert done.returncode == 2
  assert message in done.stderr
