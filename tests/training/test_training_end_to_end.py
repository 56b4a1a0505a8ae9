"""The real entry point on tiny scenes: trains, resumes, refuses, exports.

Runs are subprocesses, as a user starts them: `kill -9` needs a process to kill.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = (
  "--config=configs/demo.py",
  "--config.model.hf.vision_config.num_hidden_layers=2",
  "--config.model.hf.text_config.num_hidden_layers=2",
  "--config.batch_size=16",
  "--config.steps=12",
  "--config.optimizer.warmup_steps=2",
  "--config.data.scenes_train_size=100",
  "--config.eval.max_items=40",
  "--config.checkpoint.every=3",
  "--config.log.every=1",
)


def environment():
  # One device: bit-exactness is promised on the same topology, and one is quickest.
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
  return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def start(*arguments, tool="train", **options):
  return subprocess.Popen(
    [sys.executable, "-m", f"gcl_jax.{tool}", *arguments],
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    **options,
  )


def run(*arguments, tool="train"):
  process = start(*arguments, tool=tool)
  output, _ = process.communicate(timeout=300)
  return process.returncode, output


def parameters(workdir, step=None):
  from gcl_jax.checkpoints import read_run

  return read_run(workdir, step)[1]


def assert_same_bits(a, b):
  import jax

  for (path, x), (_, y) in zip(
    jax.tree_util.tree_leaves_with_path(a),
    jax.tree_util.tree_leaves_with_path(b),
    strict=True,
  ):
    assert x.tobytes() == y.tobytes(), path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "straight"
  code, output = run(*TINY, f"--workdir={workdir}")
  assert code == 0, output
  return workdir, output


def test_a_run_prints_its_tables_and_the_next_commands(finished):
  workdir, output = finished
  for words in ("before", "after", "after + centring", "gcl_jax.evaluate", "pairs/s"):
    assert words in output, words
  lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
  evaluated = [line for line in lines if "eval/plain.global.other.R@10" in line]
  assert [line["step"] for line in evaluated] == [0, 12]
  lines = [line for line in lines if line not in evaluated]
  assert [line["step"] for line in lines] == list(range(1, 13))
  assert {
    "loss",
    "loss/image_to_text",
    "loss/fused_to_image",
    "logit_scale",
    "fusion/norm_ratio",
    "gradient_norm",
    "pairs_per_second",
    "data_wait",
  } <= lines[0].keys()
  assert lines[0]["logit_scale"] == pytest.approx(100.0, rel=1e-5)
  assert lines[-1]["loss"] < lines[0]["loss"]
  assert any((workdir / "tensorboard").iterdir())


def test_a_finished_run_prints_its_table_again_and_trains_nothing(finished):
  workdir, _ = finished
  before = (workdir / "metrics.jsonl").read_text()
  code, output = run(*TINY, f"--workdir={workdir}")
  assert code == 0, output
  assert "This run is finished" in output
  assert "after" in output
  assert (workdir / "metrics.jsonl").read_text() == before


def test_kill_9_and_the_same_command_end_in_the_same_bits(finished, tmp_path):
  straight, _ = finished
  workdir = tmp_path / "killed"
  for at_least in (4, 8):  # two kills, the second one of a run that was resumed
    process = start(*TINY, f"--workdir={workdir}")
    for line in process.stdout:
      found = re.search(r"step (\d+)/12", line)
      if found and int(found[1]) >= at_least:
        process.send_signal(signal.SIGKILL)
        break
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
  code, output = run(*TINY, f"--workdir={workdir}")
  assert code == 0, output
  assert "going on from step" in output
  assert_same_bits(parameters(straight), parameters(workdir))
  lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
  steps = [line["step"] for line in lines if "loss" in line]
  assert steps == list(range(1, 13))  # no step stands there twice


def test_a_resume_under_another_config_is_refused(finished):
  workdir, _ = finished
  code, output = run(
    *TINY, f"--workdir={workdir}", "--config.optimizer.learning_rate=7"
  )
  assert code == 2, output
  assert "config.optimizer.learning_rate: 0.001 then, 7.0 now" in output
  assert "Traceback" not in output


def test_fewer_steps_than_were_done_are_refused(finished):
  workdir, _ = finished
  shorter = [a for a in TINY if "steps=12" not in a]
  code, output = run(*shorter, "--config.steps=6", f"--workdir={workdir}")
  assert code == 2, output
  assert "is at step 12 already" in output


def test_export_and_evaluate_from_the_command_line(finished, tmp_path):
  workdir, _ = finished
  code, output = run(
    f"--checkpoint={workdir}", f"--output={tmp_path}/hf", tool="export"
  )
  assert code == 0, output
  assert_exported_bits(tmp_path / "hf", parameters(workdir))
  code, output = run(
    f"--checkpoint={workdir}",
    f"--output={tmp_path}/result.json",
    "--items=40",
    "--center",
    tool="evaluate",
  )
  assert code == 0, output
  result = json.loads((tmp_path / "result.json").read_text())
  stored = json.loads((workdir / "results" / "000000012.json").read_text())
  assert result["plain"]["global"] == stored["plain"]["global"]
  code, output = run(
    f"--checkpoint={workdir}", f"--output={ROOT / 'configs'}", tool="export"
  )
  assert code == 2
  assert "holds something else" in output


def assert_exported_bits(folder, params):
  from gcl_jax.models import read_pretrained

  _, _, exported = read_pretrained(folder)
  assert_same_bits(exported, params)
  assert np.isfinite(exported["logit_scale"])


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path):
  arguments = [a for a in TINY if "checkpoint" not in a and "log.every" not in a]
  started = time.monotonic()
  code, output = run(
    *arguments,
    f"--workdir={tmp_path}/nan",
    "--config.optimizer.learning_rate=1e30",
    "--config.optimizer.clip_norm=0.0",
    "--config.checkpoint.every=1",
    "--config.log.every=5",
    "--config.log.tensorboard=false",
    "--config.eval.before=false",
  )
  assert code == 2, output
  found = re.search(r"not finite at step (\d+)", output)
  assert found, output
  assert "Traceback" not in output
  saved = [int(p.name) for p in (tmp_path / "nan" / "checkpoints").iterdir()]
  assert all(step < int(found[1]) for step in saved)
  for step in saved:
    import jax

    leaves = jax.tree.leaves(parameters(tmp_path / "nan", step))
    assert all(np.isfinite(x).all() for x in leaves)
  assert time.monotonic() - started < 200
