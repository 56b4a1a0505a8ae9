"""GradCache: the gradient of the full batch, in less memory, reduced once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcl_jax.models import CLIPConfig, build
from gcl_jax.processing import ImageProcessor
from gcl_jax.sharding import make_mesh, put_batch
from gcl_jax.training.config import default_config
from gcl_jax.training.objective import make_objective
from gcl_jax.training.state import place_parameters

_TOWER = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 128}
_MODEL = {
  "projection_dim": 16,
  "vision_config": {
    **_TOWER,
    "num_hidden_layers": 2,
    "image_size": 32,
    "patch_size": 8,
  },
  "text_config": {
    **_TOWER,
    "num_hidden_layers": 2,
    "max_position_embeddings": 8,
    "vocab_size": 50,
    "bos_token_id": 48,
    "eos_token_id": 49,
    "pad_token_id": 49,
  },
}
_IMAGES = {
  "size": {"shortest_edge": 32},
  "crop_size": {"height": 32, "width": 32},
}


def _batch(rows):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 48, (rows, 8)).astype(np.int32)
  tokens[:, -1] = 49
  has_text = np.arange(rows) % 7 != 3
  return {
    "pixels": rng.integers(0, 256, (rows, 32, 32, 3)).astype(np.uint8),
    "tokens": tokens,
    "has_image": np.arange(rows) % 9 != 5,
    "has_text": has_text,
    "pair_ids": np.stack([np.arange(rows), np.arange(rows) // 2], 1).astype(np.int32),
  }


def _compiled(parts, devices, rows):
  """Value and gradients of the objective, compiled; and what to call it with."""
  config = default_config()
  config.microbatches = parts
  model = build(CLIPConfig.from_hf(_MODEL))
  mesh = make_mesh(devices=jax.devices()[:devices])
  objective = make_objective(model, ImageProcessor.from_dict(_IMAGES), config, mesh)
  params = jax.jit(model.init)(jax.random.key(0))
  arguments = place_parameters(params, mesh), put_batch(mesh, _batch(rows)), {}
  run = jax.jit(jax.value_and_grad(objective, has_aux=True))
  return run.lower(*arguments).compile(), arguments


@pytest.mark.parametrize("devices", [1, 8])
def test_the_gradient_is_that_of_the_full_batch(devices):
  whole, arguments = _compiled(1, devices, 64)
  parts, _ = _compiled(8, devices, 64)
  (loss, metrics), gradients = whole(*arguments)
  (same, also), others = parts(*arguments)
  assert same == pytest.approx(float(loss), rel=1e-6)
  assert metrics.keys() == also.keys()
  gradients, others = jax.tree.leaves(gradients), jax.tree.leaves(others)
  # Some are zero but for rounding: no key bias moves a softmax.
  noise = 1e-7 * max(float(jnp.max(jnp.abs(want))) for want in gradients)
  for got, want in zip(others, gradients, strict=True):
    allowed = 1e-5 * jnp.max(jnp.abs(want)) + noise
    assert jnp.max(jnp.abs(got - want)) <= allowed


def test_it_takes_less_memory():
  bytes_of = [
    _compiled(parts, 1, 256)[0].memory_analysis().temp_size_in_bytes for parts in (1, 8)
  ]
  assert bytes_of[1] < bytes_of[0] / 3


def test_no_row_moves_and_gradients_are_reduced_after_the_last_part():
  text = _compiled(2, 8, 64)[0].as_text()
  computation, found = "", []
  for line in text.splitlines():
    if not line.startswith(" "):
      computation = line
    name = (
      r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    )
    match = re.search(name + r"\(", line)
    if match:
      found.append((computation.startswith("ENTRY"), match[2], match[1]))
  assert found
  assert all(at_the_top for at_the_top, _, _ in found), found
  assert {kind for _, kind, _ in found} == {"all-gather", "all-reduce"}
  # Pixels are the only four-dimensional rows, tokens the only int32 ones of width 8.
  gathered = [shapes for _, kind, shapes in found if kind == "all-gather"]
  assert not any("32,32,3]" in shapes or ",8]" in shapes for shapes in gathered)
  # Every parameter in exactly one sum: the patch kernel stands for them.
  reduced = " ".join(shapes for _, kind, shapes in found if kind == "all-reduce")
  assert reduced.count("f32[192,32]") == 1
