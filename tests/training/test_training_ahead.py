"""The step for a slice that is not there: the run's own, from shapes alone."""

import importlib.util

import jax
import numpy as np
import pytest
from ahead_cases import tiny_config
from jax.sharding import PartitionSpec as P

from gcl_jax.errors import UserError
from gcl_jax.sharding import make_mesh
from gcl_jax.training import ahead
from gcl_jax.training.chips import Chip
from gcl_jax.training.config import default_config
from gcl_jax.training.program import Moved
from gcl_jax.training.start import model_from_config


def test_the_step_compiles_from_shapes_alone_on_any_mesh():
  config = tiny_config()
  config.ema_decay = 0.9
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  step, (state, batch, _) = ahead.step_and_shapes(
    config, model_from_config(config), mesh
  )
  kernel = state["params"]["text"]["blocks"]["mlp"]["fc1"]["kernel"]
  assert kernel.sharding.spec == P(None, "fsdp", "tensor")
  assert state["ema"].keys() <= state["params"].keys()
  assert batch["tokens"].shape == (32, 8)
  memory = step.lower(state, batch, {}).compile().memory_analysis()
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  assert memory.argument_size_in_bytes < whole / 2


def report(**fields):
  chip = Chip(flops=1e12, memory=16e9, memory_rate=1e11, link_rate=1e10)
  moved = Moved(10**10, {"all-gather": 10**8, "all-reduce": 10**8}, {})
  moved = moved._replace(counts={"all-gather": 4, "all-reduce": 1})
  values = {
    "chips": 4,
    "kind": "TPU v0",
    "pairs": 400,
    "arguments": 5 * 10**9,
    "temporaries": 10**10,
    "flops": 4 * 10**11,
    "model_flops": 3 * 10**11,
    "moved": moved,
    "chip": chip,
  }
  return ahead.Report(**values | fields)


def test_the_slowest_of_three_bounds_the_step():
  found = report()
  assert found.seconds == pytest.approx(
    {"arithmetic": 0.4, "memory": 0.1, "links": 0.02}
  )
  text = ahead.render(found)
  assert "15.00 of 16 GB: fits" in text
  assert "arithmetic bounds it: 1,000 pairs/s, 250 a chip, MFU 75%" in text
  assert "all-gather 100.0 MB in 4, all-reduce 100.0 MB in 1" in text


def test_a_chip_keeps_some_memory_for_itself():
  assert not report(temporaries=10_500_000_000).fits
  assert "does NOT fit" in ahead.render(report(temporaries=2 * 10**10))


def test_without_the_compiler_it_says_so(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
  with pytest.raises(UserError, match="pip install libtpu"):
    ahead.compile_only(tiny_config(), "v5e:4x4")


def test_a_batch_that_the_slice_cannot_share(monkeypatch):
  monkeypatch.setattr(ahead, "slice_devices", lambda topology: jax.devices())
  monkeypatch.setattr(ahead, "chip_of", lambda kind: Chip(1e12, 1e9, 1e9, 0))
  config = tiny_config()
  config.batch_size, config.microbatches = 24, 2
  with pytest.raises(UserError, match="is 24, which is no multiple of 16"):
    ahead.compile_only(config, "v5e:2x4")


def test_what_is_no_tpu_has_no_bound(monkeypatch):
  monkeypatch.setattr(ahead, "slice_devices", lambda topology: jax.devices())
  with pytest.raises(UserError, match="cpu is not in the table of chips"):
    ahead.compile_only(tiny_config(), "v5e:2x4")


def test_what_separation_needs_is_part_of_the_step(tmp_path):
  config = tiny_config()
  config.loss.intra_modal_separation = 0.5
  model, mesh = model_from_config(config), make_mesh()
  config.loss.separation_features = "initial_text_tower"
  _, (state, _, constants) = ahead.step_and_shapes(config, model, mesh)
  assert jax.tree.leaves(constants["initial_params"]) == jax.tree.leaves(
    state["params"]
  )
  config.loss.separation_features = str(tmp_path / "features.npy")
  np.save(config.loss.separation_features, np.zeros((3, 7), np.float32))
  _, (_, batch, constants) = ahead.step_and_shapes(config, model, mesh)
  assert batch["separation_features"].shape == (32, 7)
  assert constants == {}


def test_a_vocabulary_of_our_own_replaces_that_of_a_named_shape():
  config = default_config()
  config.model.name = "ViT-B/32"
  config.tokenizer.vocab_size = 600
  text = model_from_config(config).config.text
  assert (text.vocab_size, text.eos_id) == (600, 599)


@pytest.mark.slow
def test_a_real_slice():  # needs libtpu
  config = tiny_config()
  config.batch_size = 16 * 64
  found = ahead.compile_only(config, "v5e:4x4")
  assert (found.chips, found.kind) == (16, "TPU v5 lite")
  assert found.fits
  assert found.flops > found.model_flops > 0
  assert found.moved.counts["all-gather"] >= 4
  with pytest.raises(UserError, match=r"v5e:3x3: no such slice"):
    ahead.compile_only(config, "v5e:3x3")
