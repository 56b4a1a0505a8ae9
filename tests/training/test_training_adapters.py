"""LoRA in a run's config: who gets factors, and what is stored for the rest."""

import jax

from gcl_jax.models import CLIPConfig, build
from gcl_jax.training import optimizer as optimizers
from gcl_jax.training.adapters import adapted_shapes
from gcl_jax.training.config import default_config

_TOWER = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
_MODEL = {
  "projection_dim": 16,
  "vision_config": {
    **_TOWER,
    "num_hidden_layers": 2,
    "image_size": 32,
    "patch_size": 8,
  },
  "text_config": {**_TOWER, "num_hidden_layers": 2, "vocab_size": 50},
}


def model_shapes():
  return build(CLIPConfig.from_hf(_MODEL)).abstract()


def test_without_a_rank_nothing_is_added():
  shapes = model_shapes()
  assert adapted_shapes(default_config(), shapes) is shapes


def test_a_locked_tower_gets_no_factors():
  config = default_config()
  config.lora.rank = 2
  assert adapted_shapes(config, model_shapes())["lora"].keys() == {"vision", "text"}
  config.optimizer.locked_tower = "image"
  assert adapted_shapes(config, model_shapes())["lora"].keys() == {"text"}


def test_the_optimizer_s_state_is_of_the_factors_alone():
  config = default_config()
  config.lora.rank, config.lora.image = 2, ("query",)
  shapes = adapted_shapes(config, model_shapes())
  optimizer = optimizers.make_optimizer(
    config.optimizer, config.temperature, shapes, 10
  )
  state = jax.eval_shape(optimizer.init, shapes)
  held = sum(leaf.size for leaf in jax.tree.leaves(state))
  # query alone, and all six of the other tower; two moments and a scalar's, counters.
  vision = 2 * (32 + 32) * 2
  text = 2 * (4 * (32 + 32) + 2 * (32 + 64)) * 2
  assert 2 * (vision + text + 1) <= held <= 2 * (vision + text + 1) + 4
