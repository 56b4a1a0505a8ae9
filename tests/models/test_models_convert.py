"""The conversion table against CLIPModel's own keys, both ways."""

from __future__ import annotations

import clip_cases as cases
import numpy as np
import pytest
import torch
import transformers

from gcl_jax.errors import UserError
from gcl_jax.models import CLIPConfig, build, named_config
from gcl_jax.models.convert import TABLE, from_hf, hf_shapes, to_hf
from gcl_jax.sharding import map_with_path


def _meta_shapes(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
  with torch.device("meta"):
    model = transformers.CLIPModel(transformers.CLIPConfig.from_dict(config.to_hf()))
  return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _random(config: CLIPConfig) -> dict[str, np.ndarray]:
  """Every tensor, of numbers that differ from each other in their bits."""
  rng = np.random.default_rng(0)
  return {
    key: rng.random(shape, np.float32) if shape else np.float32(rng.random())
    for key, shape in hf_shapes(config).items()
  }


def _round_trip(config: CLIPConfig) -> None:
  theirs = _random(config)
  back = to_hf(from_hf(theirs, config, "a test"), config)
  assert back.keys() == theirs.keys()
  for key, array in back.items():
    assert array.dtype == np.float32 and array.flags.c_contiguous, key
    assert array.shape == theirs[key].shape, key
    assert np.array_equal(array.view(np.uint32), theirs[key].view(np.uint32)), key


@pytest.mark.parametrize("name", cases.PLAIN)
def test_keys_and_shapes_are_clip_models(name):
  config = named_config(name)
  assert hf_shapes(config) == _meta_shapes(config)


@pytest.mark.parametrize("name", cases.PLAIN)
def test_round_trip_at_full_width_is_bit_identical(name):
  fields = cases.changed(named_config(name).to_hf(), num_hidden_layers=2)
  fields["text_config"]["vocab_size"] = 3000  # the table is most of the model
  _round_trip(CLIPConfig.from_hf(fields))


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.PLAIN)
def test_round_trip_at_full_depth_is_bit_identical(name):
  _round_trip(named_config(name))


def test_every_parameter_has_one_row():
  paths = []
  map_with_path(lambda path, _: paths.append(path), build(CLIPConfig()).abstract())
  assert sorted(paths) == sorted(path for path, _, _ in TABLE)


def test_ours_to_theirs_and_back_is_bit_identical():
  config = CLIPConfig.from_hf(cases.SMALL)
  params = from_hf(_random(config), config, "a test")
  again = from_hf(to_hf(params, config), config, "a test")
  named = {}
  map_with_path(lambda path, leaf: named.update({path: leaf}), again)
  map_with_path(
    lambda path, leaf: np.testing.assert_array_equal(leaf, named[path]), params
  )


def test_missing_left_over_and_misshapen_are_named_in_one_message():
  config = CLIPConfig.from_hf(cases.SMALL)
  tensors = _random(config)
  del tensors["vision_model.encoder.layers.1.mlp.fc1.bias"]
  tensors["text_model.embeddings.position_ids"] = np.arange(16)[None]
  tensors["vision_model.embeddings.position_ids"] = np.arange(17)[None]
  tensors["vision_model.encoder.layers.2.mlp.fc1.bias"] = np.zeros(96, np.float32)
  tensors["text_projection.weight"] = np.zeros((32, 31), np.float32)
  tensors["visual_projection.weight"] = np.zeros((32, 48), np.int8)
  with pytest.raises(UserError) as error:
    from_hf(tensors, config, "the folder")
  message = str(error.value)
  assert "the folder" in message
  assert "1 missing: vision_model.encoder.layers.1.mlp.fc1.bias" in message
  assert "1 left over: vision_model.encoder.layers.2.mlp.fc1.bias" in message
  assert "text_projection.weight (32, 31), not (32, 32)" in message
  assert "visual_projection.weight holds int8" in message
  assert "position_ids" not in message


def test_a_wrong_depth_does_not_print_hundreds_of_keys():
  config = CLIPConfig.from_hf(cases.SMALL)
  deeper = CLIPConfig.from_hf(cases.changed(cases.SMALL, num_hidden_layers=12))
  with pytest.raises(UserError, match=r"304 missing: .*\.\.\.") as error:
    from_hf(_random(config), deeper, "the folder")
  assert len(str(error.value)) < 1000


def test_parameters_of_another_shape_are_our_bug():
  config = CLIPConfig.from_hf(cases.SMALL)
  params = from_hf(_random(config), config, "a test")
  with pytest.raises(ValueError, match="text_projection/kernel"):
    to_hf({**params, "text_projection": {"kernel": np.zeros((1, 1))}}, config)
