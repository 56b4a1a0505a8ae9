"""What tables and cards say of a config's loss, and how weights are read."""

import numpy as np
import pytest

from gcl_jax.errors import UserError
from gcl_jax.training.check import (
  check_kernel,
  check_loss,
  check_numbers,
  describe_loss,
  direction_weights,
)
from gcl_jax.training.config import default_config


def test_the_loss_is_described_with_its_features():
  config = default_config()
  assert describe_loss(config) == "Loss: GCL (self_masked); logit scale learned."
  config.loss.name = "contrastive"
  config.loss.intra_modal_separation = 0.5
  config.loss.separation_features = "somewhere/tfidf.npy"
  config.temperature.mode = "fixed"
  assert describe_loss(config) == (
    "Loss: CL + 0.5 x image separation (features: tfidf.npy); logit scale fixed."
  )
  config = default_config()
  config.ema_decay = 0.99
  assert describe_loss(config).endswith(" Weights: their moving average (decay 0.99).")


def test_direction_weights_come_as_rows_or_flat():
  config = default_config()
  assert direction_weights(config) is None
  rows = ((0.0, 1.0, 2.0), (3.0, 0.0, 4.0), (5.0, 6.0, 0.0))
  config.loss.direction_weights = rows
  np.testing.assert_array_equal(direction_weights(config), rows)
  config.loss.direction_weights = tuple(x for row in rows for x in row)
  np.testing.assert_array_equal(direction_weights(config), rows)


@pytest.mark.parametrize(
  "weights", [(1.0,), tuple([-1.0] * 9), tuple([0.0] * 9), ((1.0, 2.0), (3.0,))]
)
def test_other_weights_are_refused(weights):
  config = default_config()
  config.loss.direction_weights = weights
  with pytest.raises(UserError, match="3 rows of 3 weights"):
    check_loss(config)


def test_a_fixed_scale_may_exceed_the_cap_of_a_learned_one():
  config = default_config()
  config.temperature.logit_scale = 150.0
  with pytest.raises(UserError, match="logit_scale is 150"):
    check_loss(config)
  config.temperature.mode = "fixed"
  check_loss(config)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("optimizer.name", "sgd", "'sgd': it is one of adamw, lion, adafactor, lamb, muon"),
    ("optimizer.moment_dtype", "float16", "it is one of float32, bfloat16"),
    ("optimizer.locked_tower", "vision", 'it is one of "", image, text'),
    ("ema_decay", 1.0, "is 1.0: it is at least 0 (off) and below 1"),
    ("ema_decay", -0.1, "is -0.1: it is at least 0 (off) and below 1"),
    ("model.patch_dropout", 1.0, "is 1.0: it is at least 0 (off) and below 1"),
    ("model.patch_dropout", -0.5, "is -0.5: it is at least 0 (off) and below 1"),
    ("accumulate_steps", 0, "is 0: it is at least 1"),
    ("lora.rank", -1, "is -1: it is at least 0"),
    ("optimizer.b1", 1.0, "is 1.0: it is at least 0 and below 1"),
    ("optimizer.b2", -0.1, "is -0.1: it is at least 0 and below 1"),
    ("optimizer.muon_momentum", 1.5, "is 1.5: it is at least 0 and below 1"),
    ("optimizer.layer_decay", 0.0, "is 0.0: it is above 0 and at most 1"),
    ("optimizer.layer_decay", 1.5, "is 1.5: it is above 0 and at most 1"),
    ("optimizer.adamw_learning_rate", -1.0, "is -1.0: it is at least 0"),
  ],
)
def test_what_cannot_be_is_refused_by_name(field, value, message):
  config = default_config()
  check_numbers(config)
  config.update_from_flattened_dict({field: value})
  with pytest.raises(UserError) as error:
    check_numbers(config)
  assert f"config.{field}" in str(error.value)
  assert message in str(error.value)


def test_lora_with_what_makes_no_sense_beside_it_is_refused():
  config = default_config()
  config.lora.alpha = 0.0
  check_numbers(config)  # off: not looked at
  config.lora.rank = 4
  with pytest.raises(UserError, match=r"config.lora.alpha is 0.0: it is above 0"):
    check_numbers(config)
  config.lora.alpha = 1.0
  check_numbers(config)
  for name in ("muon", "lamb"):
    config.optimizer.name = name
    with pytest.raises(UserError, match=rf"is {name}, .*LoRA.*lora.rank \(4\) to 0"):
      check_numbers(config)


def test_kernels_take_embeddings_of_a_multiple_of_sixteen():
  config = default_config()
  config.loss.kernel = "pallas"
  check_kernel(config, 640)
  with pytest.raises(
    UserError, match="multiple of 16 numbers, and this model's have 40"
  ):
    check_kernel(config, 40)
