"""Which differences between a run and its continuation are refused."""

import types

import pytest

from gcl_jax.errors import UserError
from gcl_jax.training.config import default_config
from gcl_jax.training.resume import changed_fields, check_resumable


def stored(config, records=100):
  return types.SimpleNamespace(config=config, records=records)


def test_length_logging_and_mesh_may_change():
  then, now = default_config(), default_config()
  now.steps, now.log.every, now.mesh.data = 7, 3, 4
  now.data.path = "moved"
  check_resumable(stored(then), now, 100, "w")


def test_every_other_field_is_named_with_both_values():
  then, now = default_config(), default_config()
  now.optimizer.learning_rate, now.loss.denominator = 5.0, "literal"
  with pytest.raises(UserError) as error:
    check_resumable(stored(then), now, 100, "w")
  text = str(error.value)
  assert "config.optimizer.learning_rate: 1e-05 then, 5.0 now" in text
  assert "config.loss.denominator: 'self_masked' then, 'literal' now" in text


def test_data_of_another_size_is_refused():
  with pytest.raises(UserError, match="100 records and the data now holds 99"):
    check_resumable(stored(default_config()), default_config(), 99, "w")


def test_what_a_recipe_changed_is_said():
  config = default_config()
  config.loss.denominator = "literal"
  config.model.hf.projection_dim = 8
  assert changed_fields(config) == {
    "loss.denominator": "literal",
    "model.hf.projection_dim": 8,
  }


def test_a_run_from_before_a_field_existed_goes_on_with_its_default():
  then, now = default_config(), default_config()
  del then.optimizer.layer_decay, then.optimizer.moment_dtype
  check_resumable(stored(then), now, 100, "w")
  now.optimizer.layer_decay = 0.8
  with pytest.raises(UserError, match=r"optimizer.layer_decay: 1.0 then, 0.8 now"):
    check_resumable(stored(then), now, 100, "w")
  # And a field that there no longer is, or that a recipe made up, is still compared.
  then.model.hf.projection_dim = 8
  with pytest.raises(UserError, match=r"model.hf.projection_dim: 8 then, None now"):
    check_resumable(stored(then), default_config(), 100, "w")
