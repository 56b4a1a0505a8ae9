"""The separation term through a whole run: features of a file, of the first text tower."""

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def recipe(features, steps):
  namespace: dict = {}
  path = ROOT / "configs" / "demo.py"
  exec(compile(path.read_text(), str(path), "exec"), namespace)
  config = namespace["get_config"]("contrastive")
  config.update_from_flattened_dict(
    {
      "model.hf.vision_config.num_hidden_layers": 1,
      "model.hf.text_config.num_hidden_layers": 1,
      "batch_size": 32,
      "steps": steps,
      "optimizer.warmup_steps": 0,
      "data.scenes_train_size": 64,
      "eval.max_items": 16,
      "eval.before": False,
      "log.every": 1,
      "log.tensorboard": False,
      "loss.intra_modal_separation": 0.5,
      "loss.separation_features": features,
    }
  )
  return config


def terms(folder):
  lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
  return [line["loss/separation"] for line in lines if "loss" in line]


@pytest.mark.parametrize("kind", ["file", "tower"])
def test_features_reach_the_loss_and_survive_a_resume(kind, tmp_path):
  from gcl_jax.train import train_and_evaluate

  features = "initial_text_tower"
  if kind == "file":
    # Equal rows: every distance is 0, and each of the 31 negatives counts exp(0).
    features = str(tmp_path / "rows.npy")
    np.save(features, np.tile(np.float32([[0.6, 0.8]]), (64, 1)))
  train_and_evaluate(recipe(features, 1), tmp_path / "run")
  trained, _ = train_and_evaluate(recipe(features, 2), tmp_path / "run")
  assert trained
  found = terms(tmp_path / "run")
  assert len(found) == 2
  assert np.isfinite(found).all()
  if kind == "file":
    # Untrained pictures are alike: without the rows the term would be near the scale.
    assert found[0] < 50
  else:
    assert (tmp_path / "run" / "initial" / "model.safetensors").is_file()
