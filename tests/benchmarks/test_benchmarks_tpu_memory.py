"""The ahead-of-time figures: what is compiled is our loss and our step."""

import importlib.util
import types

import pytest

from benchmarks import tpu_memory
from gcl_jax.errors import UserError
from gcl_jax.models import CLIPConfig, build
from gcl_jax.sharding import make_mesh
from gcl_jax.training.config import default_config

_TOWER = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
_MODEL = {
  "projection_dim": 8,
  "vision_config": {
    **_TOWER,
    "num_hidden_layers": 1,
    "image_size": 16,
    "patch_size": 8,
  },
  "text_config": {
    **_TOWER,
    "num_hidden_layers": 1,
    "max_position_embeddings": 8,
    "vocab_size": 50,
    "bos_token_id": 48,
    "eos_token_id": 49,
    "pad_token_id": 49,
  },
}


def test_the_step_and_the_loss_compile_from_shapes_alone(capsys):
  mesh, model = make_mesh(), build(CLIPConfig.from_hf(_MODEL))
  config = default_config()
  config.microbatches = 2
  compiled = tpu_memory._step(config, mesh, 32, model)
  assert "all-gather" in compiled.as_text()
  tpu_memory._print("step", compiled)
  assert "step: temporaries 0.0" in capsys.readouterr().out
  ring = tpu_memory._loss(mesh, 32, 8, "ring").as_text()
  assert "collective-permute" in ring and "all-gather" not in ring


def test_without_the_compiler_it_says_so(monkeypatch):
  flags = types.SimpleNamespace(config=default_config())
  monkeypatch.setattr(tpu_memory, "_FLAGS", flags)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
  with pytest.raises(UserError, match="pip install libtpu"):
    tpu_memory.main()
  flags.config = None
  with pytest.raises(UserError, match=r"--config=configs/clip\.py"):
    tpu_memory.main()
