"""The note on large fusion weights: once, and only where they cost something."""

import pytest

from gcl_jax.training.config import default_config
from gcl_jax.training.run import _weight_watch


def notes(capsys, weights, **fields):
  config = default_config()
  config.update_from_flattened_dict(fields)
  watch = _weight_watch(config)
  for step, weight in enumerate(weights):
    watch(step, {"fusion/largest_weight": weight})
  return capsys.readouterr().err


def test_it_is_said_once(capsys):
  said = notes(capsys, [1.0, 10.0, 30.0, 50.0])
  assert said.count("note:") == 1
  assert "at step 2" in said and "30-fold" in said and "fusion.as_bank=True" in said


@pytest.mark.parametrize(
  "fields",
  [{"fusion.as_bank": True}, {"loss.form": "dense"}, {"loss.name": "contrastive"}],
)
def test_where_it_costs_nothing_nothing_is_said(capsys, fields):
  assert notes(capsys, [99.0], **fields) == ""
