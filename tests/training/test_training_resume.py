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
