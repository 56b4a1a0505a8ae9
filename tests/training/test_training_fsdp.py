"""What `fsdp` saves: parameters lie split, and no device computes another's rows."""

import re

import pytest
from ahead_cases import tiny_config

from gcl_jax.sharding import make_mesh
from gcl_jax.training import ahead
from gcl_jax.training.program import moved
from gcl_jax.training.start import model_from_config

BATCH = 32


def compiled(**mesh):
  config = tiny_config()
  config.batch_size = BATCH
  tower = {"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 512}
  config.model.hf.vision_config.update({**tower, "image_size": 32, "patch_size": 8})
  config.model.hf.text_config.update(tower)
  model = model_from_config(config)
  step, arguments = ahead.step_and_shapes(config, model, make_mesh(**mesh))
  return step.lower(*arguments).compile()


@pytest.fixture(scope="module")
def replicated():
  return compiled()


@pytest.mark.parametrize("mesh", [{"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 4}])
def test_parameters_are_split_and_rows_stay_apart(mesh, replicated):
  split = compiled(**mesh)
  ours, whole = split.memory_analysis(), replicated.memory_analysis()
  parts = mesh["fsdp"]
  assert ours.argument_size_in_bytes < 1.5 / parts * whole.argument_size_in_bytes
  assert ours.temp_size_in_bytes < 1.5 * whole.temp_size_in_bytes
  text = split.as_text()
  # 17 places of a picture, 8 of a text: activations of the global batch are nowhere.
  assert not re.search(rf"f32\[{BATCH},(17|8),\d+\]", text)
  assert re.search(rf"f32\[{BATCH // 8},17,\d+\]", text)
  # Each layer's are gathered where it runs, in the forward and again in the backward.
  assert moved(text).counts["all-gather"] > 3 * 6
