"""The embedding benchmark: both sides give the same vectors, and what its rows say."""

import json

import pytest
import torch

from benchmarks import embed
from gcl_jax.errors import UserError
from gcl_jax.training.config import default_config

_TOWER = {
  "hidden_size": 16,
  "num_attention_heads": 2,
  "intermediate_size": 32,
  "num_hidden_layers": 1,
}


@pytest.fixture
def config():
  config = default_config()
  config.model.hf = {
    "projection_dim": 8,
    "vision_config": {**_TOWER, "image_size": 16, "patch_size": 8},
    "text_config": {**_TOWER, "max_position_embeddings": 40},
  }
  config.batch_size = 8
  config.data.source, config.data.scenes_train_size = "scenes", 64
  config.tokenizer.vocab_size = 514
  return config


def test_rows(config, monkeypatch):
  threads = torch.get_num_threads()
  rows = embed.measure(config, documents=20, turns=1)
  whats = ["pytorch", "gcl_jax", "stage read", "stage decode", "stage tokenise"]
  assert [row["what"] for row in rows] == [*whats, "stage model"]
  for row in json.loads(json.dumps(rows)):
    assert row["items_per_s"] > 0 and row["documents"] == 20 and row["batch"] == 8
    assert row["apart"] < embed._APART
  assert rows[0]["ratio"] == 1 and rows[2]["ratio"] is None
  assert len(embed.table(rows).splitlines()) == 2 + len(rows)

  honest = embed.ours
  monkeypatch.setattr(embed, "ours", lambda *given: honest(*given)[::-1])
  with pytest.raises(AssertionError, match="do not compute the same"):
    embed.measure(config, documents=20, turns=1)
  torch.set_num_threads(threads)


def test_without_pytorch(config, monkeypatch):
  monkeypatch.setattr(embed, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="pip install torch"):
    embed.measure(config, documents=4, turns=1)
