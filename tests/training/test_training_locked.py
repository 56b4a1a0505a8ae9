"""Of a locked tower no gradient is computed: not even the products are in the program."""

import jax
import jax.numpy as jnp
import pytest

from gcl_jax.models import CLIPConfig, build
from gcl_jax.processing import ImageProcessor
from gcl_jax.sharding import make_mesh
from gcl_jax.training import optimizer as optimizers
from gcl_jax.training.config import default_config
from gcl_jax.training.objective import make_objective
from gcl_jax.training.state import make_step

_TOWER = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
# The towers' MLPs differ, so that a gradient's shape says whose it is.
_MODEL = {
  "projection_dim": 16,
  "vision_config": {
    **_TOWER,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
  },
  "text_config": {
    **_TOWER,
    "intermediate_size": 80,
    "max_position_embeddings": 8,
    "vocab_size": 50,
  },
}
_GRADIENT = {"image": (32, 64), "text": (32, 80)}


def product_shapes(jaxpr):
  """Shapes of all matrix products in a program, loops and calls included."""
  found = set()
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      found |= {output.aval.shape for output in equation.outvars}
    for value in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        found |= product_shapes(inner)
  return found


def traced_step(microbatches, **fields):
  config = default_config()
  config.update_from_flattened_dict(fields)
  config.microbatches, config.loss.form = microbatches, "dense"
  model = build(CLIPConfig.from_hf(_MODEL))
  mesh = make_mesh(devices=jax.devices()[:1])
  images = ImageProcessor.from_dict(
    {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
  )
  objective = make_objective(model, images, config, mesh)
  shapes = model.abstract()
  rules = (config.optimizer, config.temperature, shapes)
  optimizer = optimizers.make_optimizer(*rules, 10)
  frozen = optimizers.frozen_mask(*rules)
  step = make_step(objective, optimizer, frozen, config.temperature)
  batch = {
    "pixels": jnp.zeros((4, 16, 16, 3), jnp.uint8),
    # 28 places: were they 32, as the width, activations would pass for gradients.
    "tokens": jnp.zeros((4, 7), jnp.int32),
    "has_image": jnp.ones(4, bool),
    "has_text": jnp.ones(4, bool),
    "pair_ids": jnp.arange(8, dtype=jnp.int32).reshape(4, 2),
  }
  state = {
    "params": shapes,
    "optimizer": jax.eval_shape(optimizer.init, shapes),
    **dict.fromkeys(("step", "bad_records", "failed_step"), jnp.int32(0)),
  }
  return product_shapes(jax.make_jaxpr(step)(state, batch, {}).jaxpr)


@pytest.mark.parametrize(
  ("locked", "microbatches"), [("", 1), ("image", 1), ("text", 1), ("text", 2)]
)
def test_no_gradient_of_a_locked_tower_is_in_the_program(locked, microbatches):
  found = traced_step(microbatches, **{"optimizer.locked_tower": locked})
  for tower, shape in _GRADIENT.items():
    there = shape in found or shape[::-1] in found
    assert there == (tower != locked), tower
