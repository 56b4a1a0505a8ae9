"""Schedule, decay by path, factors by path, freezing, the cap of the logit scale."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gcl_jax.errors import UserError
from gcl_jax.training import optimizer as optimizers
from gcl_jax.training.config import default_config
from gcl_jax.training.depth import depth_factors

STEPS = 100


def params():
  return {
    "vision": {"dense": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}},
    "text": {"token_embedding": {"embedding": jnp.ones((4, 3))}},
    "logit_scale": jnp.float32(3.0),
  }


def update(config, tree, grads):
  optimizer = optimizers.make_optimizer(
    config.optimizer, config.temperature, tree, STEPS
  )
  updates, _ = optimizer.update(grads, optimizer.init(tree), tree)
  return optax.apply_updates(tree, updates)


def plain():
  config = default_config()
  config.optimizer.schedule = "constant"
  config.optimizer.learning_rate = 0.1
  config.optimizer.clip_norm = 0.0
  return config


def test_warm_up_then_cosine():
  config = default_config().optimizer
  config.learning_rate, config.warmup_steps, config.final_fraction = 2.0, 10, 0.5
  rate = optimizers.learning_rate_schedule(config, 110)
  np.testing.assert_allclose(
    [rate(0), rate(5), rate(10), rate(60), rate(110)],
    [0.0, 1.0, 2.0, 1.5, 1.0],
    atol=1e-6,
  )


def test_a_warm_up_longer_than_the_run_is_refused():
  config = default_config().optimizer
  config.warmup_steps = 50
  with pytest.raises(UserError, match=r"warmup_steps is 50.*only 50 steps"):
    optimizers.learning_rate_schedule(config, 50)


def test_only_kernels_and_embeddings_decay():
  config, tree = plain(), params()
  config.optimizer.weight_decay = 0.5
  new = update(config, tree, jax.tree.map(jnp.zeros_like, tree))
  # decay alone: 1 - learning rate * decay
  np.testing.assert_allclose(new["vision"]["dense"]["kernel"], 0.95)
  np.testing.assert_allclose(new["text"]["token_embedding"]["embedding"], 0.95)
  # a stacked bias has two axes and must still not decay
  np.testing.assert_array_equal(new["vision"]["dense"]["bias"], 1.0)
  assert new["logit_scale"] == 3.0


def test_factors_scale_the_update_and_zero_freezes_to_the_bit():
  config, tree = plain(), params()
  config.optimizer.weight_decay = 0.0
  config.optimizer.multipliers = (("text/.*", 0.0), (".*/bias", 0.1))
  new = update(config, tree, jax.tree.map(jnp.ones_like, tree))
  np.testing.assert_array_equal(new["text"]["token_embedding"]["embedding"], 1.0)
  np.testing.assert_allclose(new["vision"]["dense"]["kernel"], 0.9, rtol=1e-5)
  np.testing.assert_allclose(new["vision"]["dense"]["bias"], 0.99, rtol=1e-5)


def test_frozen_parameters_hold_no_moments_and_do_not_count_in_the_norm():
  config, tree = plain(), params()
  config.optimizer.clip_norm = 1.0
  config.optimizer.multipliers = (("text/.*", 0.0),)
  optimizer = optimizers.make_optimizer(
    config.optimizer, config.temperature, tree, STEPS
  )
  state = optimizer.init(tree)
  shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
  assert (4, 3) not in shapes
  grads = jax.tree.map(jnp.zeros_like, tree)
  grads["vision"]["dense"]["bias"] += 0.01
  big = {**grads, "text": jax.tree.map(lambda x: x + 1e6, grads["text"])}
  for given in (grads, big):  # a huge gradient there must not clip the rest away
    updates, _ = optimizer.update(given, state, tree)
    assert float(jnp.abs(updates["vision"]["dense"]["bias"]).min()) > 0.05


def test_a_fixed_logit_scale_is_frozen_and_a_learned_one_is_capped():
  config, tree = plain(), params()
  config.temperature.mode = "fixed"
  frozen = optimizers.frozen_mask(config.optimizer, config.temperature, tree)
  assert frozen["logit_scale"] is True
  assert frozen["vision"]["dense"]["kernel"] is False
  config.temperature.mode = "learned"
  capped = optimizers.cap_logit_scale({"logit_scale": 9.0}, config.temperature)
  np.testing.assert_allclose(jnp.exp(capped["logit_scale"]), 100.0, rtol=1e-5)
  capped = optimizers.cap_logit_scale({"logit_scale": -1.0}, config.temperature)
  assert capped["logit_scale"] == 0.0


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ((("txt/.*", 0.0),), "no parameter's path matches"),
    ((("text/(", 0.0),), "no regular expression"),
    (((".*", 0.0),), "freezes every parameter"),
  ],
)
def test_bad_multipliers_are_named(rules, message):
  config = plain()
  config.optimizer.multipliers = rules
  with pytest.raises(UserError, match=message):
    optimizers.make_optimizer(config.optimizer, config.temperature, params(), STEPS)


def deep_params():
  block = {"mlp": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}}
  return {
    "vision": {
      "class_embedding": jnp.ones(2),
      "patch_embedding": {"kernel": jnp.ones((2, 2))},
      "pre_norm": {"scale": jnp.ones(2)},
      "blocks": block,
      "post_norm": {"scale": jnp.ones(2)},
    },
    "text": {"blocks": {"norm1": {"scale": jnp.ones((2, 2))}}},
    "image_projection": {"kernel": jnp.ones((2, 2))},
    "lora": {"text": {"blocks": {"mlp": {"a": jnp.ones((2, 2, 1))}}}},
    "logit_scale": jnp.float32(3.0),
  }


def test_layer_decay_slows_what_is_near_the_input():
  factors = depth_factors(0.5, deep_params())
  vision = factors["vision"]
  assert vision["blocks"]["mlp"]["kernel"].shape == (3, 1, 1)
  np.testing.assert_array_equal(
    vision["blocks"]["mlp"]["kernel"][:, 0, 0], [0.125, 0.25, 0.5]
  )
  np.testing.assert_array_equal(
    vision["blocks"]["mlp"]["bias"][:, 0], [0.125, 0.25, 0.5]
  )
  assert vision["class_embedding"] == vision["patch_embedding"]["kernel"] == 0.5**4
  assert vision["pre_norm"]["scale"] == 0.5**4
  assert vision["post_norm"]["scale"] == factors["image_projection"]["kernel"] == 1.0
  assert factors["logit_scale"] == 1.0
  # A tower of its own depth, and LoRA's factors as the block they are of.
  np.testing.assert_array_equal(
    factors["text"]["blocks"]["norm1"]["scale"][:, 0], [0.25, 0.5]
  )
  lora = factors["lora"]["text"]["blocks"]["mlp"]["a"]
  np.testing.assert_array_equal(lora[:, 0, 0], [0.25, 0.5])


def test_layer_decay_and_multipliers_are_multiplied():
  config, tree = plain(), deep_params()
  del tree["lora"]
  config.optimizer.weight_decay = 0.0
  config.optimizer.layer_decay = 0.5
  config.optimizer.multipliers = (("text/.*", 0.0), (".*/bias", 0.1))
  new = update(config, tree, jax.tree.map(jnp.ones_like, tree))
  # Adam's first step is the learning rate, 0.1, times the factor.
  mlp = new["vision"]["blocks"]["mlp"]
  for layer, factor in enumerate((0.125, 0.25, 0.5)):
    np.testing.assert_allclose(1 - mlp["kernel"][layer], 0.1 * factor, rtol=1e-4)
    np.testing.assert_allclose(1 - mlp["bias"][layer], 0.01 * factor, rtol=1e-4)
  np.testing.assert_array_equal(new["text"]["blocks"]["norm1"]["scale"], 1.0)
  np.testing.assert_allclose(new["vision"]["post_norm"]["scale"], 0.9, rtol=1e-5)


def frozen_paths(**fields):
  config, tree = default_config(), deep_params()
  config.update_from_flattened_dict(fields)
  del tree["lora"]
  mask = optimizers.frozen_mask(config.optimizer, config.temperature, tree)
  leaves = jax.tree_util.tree_leaves_with_path(mask)
  return {jax.tree_util.keystr(p, simple=True, separator="/") for p, f in leaves if f}


def test_a_locked_tower_is_frozen_with_its_projection():
  paths = frozen_paths(**{"optimizer.locked_tower": "image"})
  assert {path.split("/")[0] for path in paths} == {"vision", "image_projection"}
  assert len(paths) == 7
  assert frozen_paths(**{"optimizer.locked_tower": "text"}) == {
    "text/blocks/norm1/scale"
  }
  config, tree = plain(), deep_params()
  del tree["lora"], tree["logit_scale"], tree["text"]
  config.optimizer.locked_tower = "image"
  with pytest.raises(UserError, match="freezes every parameter"):
    optimizers.make_optimizer(config.optimizer, config.temperature, tree, STEPS)


def test_beside_lora_only_what_belongs_to_no_tower_is_trained():
  config, tree = default_config(), deep_params()
  mask = optimizers.frozen_mask(config.optimizer, config.temperature, tree)
  assert all(jax.tree.leaves([mask["vision"], mask["text"], mask["image_projection"]]))
  assert not any(jax.tree.leaves([mask["lora"], mask["logit_scale"]]))
