"""What tables and cards say of a config's loss, and how weights are read."""

import numpy as np
import pytest

from gcl_jax.errors import UserError
from gcl_jax.training.check import (
  check_kernel,
  check_loss,
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


def test_kernels_take_embeddings_of_a_multiple_of_sixteen():
  config = default_config()
  config.loss.kernel = "pallas"
  check_kernel(config, 640)
  with pytest.raises(
    UserError, match="multiple of 16 numbers, and this model's have 40"
  ):
    check_kernel(config, 40)
