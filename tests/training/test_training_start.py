"""What a run from scratch starts from."""

import jax
import numpy as np

from gcl_jax.data.scenes import Scenes
from gcl_jax.training.config import default_config
from gcl_jax.training.start import make_start


def first_params(factor):
  config = default_config()
  tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
  tower["intermediate_size"] = 32
  config.model.hf.projection_dim = 16
  config.model.hf.vision_config = {**tower, "image_size": 32, "patch_size": 16}
  config.model.hf.text_config = {**tower, "max_position_embeddings": 24}
  config.tokenizer.vocab_size = 520
  config.init.vision_positions = factor
  return make_start(config, Scenes("train", size=20), None, False).params()


def test_a_factor_on_the_first_vision_positions_moves_nothing_else():
  plain, larger = first_params(1.0), first_params(10.0)
  positions = [
    p["vision"]["position_embedding"].pop("embedding") for p in (plain, larger)
  ]
  np.testing.assert_array_equal(10 * positions[0], positions[1])
  assert 0.1 < positions[1].std() < 0.3
  jax.tree.map(np.testing.assert_array_equal, plain, larger)
