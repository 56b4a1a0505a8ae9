"""The step benchmark: both sides train alike, and what its rows say."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from benchmarks import step, step_sides, step_startup
from benchmarks.step_sides import Ours, PyTorch, agreement
from gcl_jax.errors import UserError
from gcl_jax.models import CLIPConfig, VistaConfig, build
from gcl_jax.processing import ImageProcessor
from gcl_jax.training.config import default_config

_TOWER = {
  "hidden_size": 16,
  "num_attention_heads": 2,
  "intermediate_size": 32,
  "num_hidden_layers": 2,
}
_SHAPE = {
  "projection_dim": 8,
  "vision_config": {**_TOWER, "image_size": 16, "patch_size": 8},
  "text_config": {**_TOWER, "max_position_embeddings": 12},
}
_LAST = list(range(16, 24))  # the fused rows of eight pairs
_WORDS = {
  "vocab_size": 50,
  "bos_token_id": 48,
  "eos_token_id": 49,
  "pad_token_id": 49,
}


@pytest.fixture(scope="module")
def parts():
  shape = {**_SHAPE, "text_config": {**_SHAPE["text_config"], **_WORDS}}
  model = build(CLIPConfig.from_hf(shape))
  params = jax.tree.map(np.asarray, model.init(jax.random.key(0)))
  images = ImageProcessor(shortest_edge=16, crop_size=16)
  config = default_config()
  config.optimizer.learning_rate = 1e-2
  return config, model, images, params


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 48, (8, 12), dtype=np.int32)
  for row, end in zip(tokens, rng.integers(3, 12, 8), strict=True):
    row[end:] = 49
  return {
    "pixels": rng.integers(0, 256, (8, 16, 16, 3), np.uint8),
    "tokens": tokens,
    "has_image": np.ones(8, bool),
    "has_text": np.ones(8, bool),
    "pair_ids": np.arange(16, dtype=np.int32).reshape(8, 2),
  }


def test_both_sides_train_alike(parts, batch):
  jax.config.update("jax_disable_most_optimizations", True)  # compiles quickly
  found = agreement(Ours(*parts), PyTorch(*parts), batch)
  jax.config.update("jax_disable_most_optimizations", False)
  assert found.loss < 1e-6 and found.movement < 1e-3


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_both_sides_train_a_vista_alike(parts, batch, kind):
  config = parts[0].copy_and_resolve_references()
  config.temperature.mode = "fixed"
  config.optimizer.learning_rate = 1e-4
  fields = {**_TOWER, "intermediate_size": 20}
  shape = {
    "vision_config": {**fields, "image_size": 16, "patch_size": 8, "projection_dim": 4},
    "text_config": {
      **_TOWER,
      "model_type": kind,
      "max_position_embeddings": 24,
      "vocab_size": 50,
      "pad_token_id": 3,
      "bos_token_id": 48,
      "eos_token_id": 49,
    },
  }
  model = build(VistaConfig.from_hf(shape))
  params = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0)))
  jax.config.update("jax_disable_most_optimizations", True)
  given = (config, model, parts[2], params)
  found = agreement(Ours(*given), PyTorch(*given), batch)
  jax.config.update("jax_disable_most_optimizations", False)
  assert found.loss < 1e-6 and found.movement < 1e-2


def test_it_is_seen_where_sides_do_not_train_alike(parts, batch, monkeypatch):
  config = parts[0].copy_and_resolve_references()
  config.optimizer.weight_decay = 0.0
  found = agreement(PyTorch(*parts), PyTorch(config, *parts[1:]), batch)
  assert found.loss == 0 and found.movement > 1e-3
  loss, calls = step_sides.gcl_loss, iter((True, False))
  monkeypatch.setattr(
    step_sides,
    "gcl_loss",
    lambda rows, scale: loss(
      rows if next(calls) else rows[[*range(8)] * 2 + _LAST], scale
    ),
  )
  found = agreement(PyTorch(*parts), PyTorch(*parts), batch)
  assert found.loss > 1e-2 and found.movement > 1e-1


def test_rows(monkeypatch):
  monkeypatch.setattr(step_sides, "Ours", PyTorch)  # nothing to compile
  config = default_config()
  config.model.hf, config.batch_size = _SHAPE, 8
  config.data.source, config.data.scenes_train_size = "scenes", 64
  config.data.text_buckets = (10, 12)
  config.tokenizer.vocab_size = 514
  threads = torch.get_num_threads()
  rows = step.measure(config, repeats=1)
  torch.set_num_threads(threads)
  assert [(row["side"], row["text_length"]) for row in rows][:2] == [
    ("pytorch", 12),
    ("gcl_jax", 12),
  ]
  for row in json.loads(json.dumps(rows)):
    assert row["pairs_per_s"] > 0 and row["ratio_to"] == "pytorch 12"
    assert row["data"] == "made up" and row["batch"] == 8
  assert rows[0]["ratio"] == rows[0]["ratio_same_length"] == 1
  assert len(step.table(rows).splitlines()) == 2 + len(rows)


def test_pairs_that_the_plain_loss_does_not_know_are_left_out():
  ids = np.asarray([[1, 5], [2, 6], [3, 7]])
  assert step._distinct({"pair_ids": ids})
  ids[2, 1] = 5
  assert not step._distinct({"pair_ids": ids})


def test_what_is_refused(monkeypatch):
  config = default_config()
  config.model.hf, config.batch_size = _SHAPE, 64
  config.data.source, config.data.scenes_train_size = "scenes", 64
  config.tokenizer.vocab_size = 514
  monkeypatch.setattr(step, "_distinct", lambda batch: False)
  monkeypatch.setattr(step, "_TRIED", 1)
  with pytest.raises(UserError, match="share a picture or a caption"):
    step.measure(config, repeats=1)
  monkeypatch.setattr(step, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="pip install torch"):
    step.measure(config, repeats=1)


def test_startup_rows(monkeypatch):
  ran = []
  monkeypatch.setattr(
    step_startup,
    "_run",
    lambda config, folder, cache: (
      ran.append(cache) or {"compile_s": 3.0, "first_step_s": 9.0}
    ),
  )
  rows = step_startup.measure(step.recipe("ViT-B/32", Path("nowhere"), 16))
  assert ran == [row["cache"] for row in rows] == ["cold", "warm"]
  assert "| ViT-B/32 | 16 | cold | 3 s | 9 s |" in step_startup.table(rows)
