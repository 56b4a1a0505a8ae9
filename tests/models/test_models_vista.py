"""VISTA against plain PyTorch, and against itself by other ways of computing it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import vista_cases as cases

from gcl_jax.errors import UserError
from gcl_jax.models import VISTA_SHAPES, VistaConfig, build
from gcl_jax.models.convert import from_tensors
from gcl_jax.models.initial import rotary_tables
from gcl_jax.models.vista_table import VISTA
from gcl_jax.sharding import PARAMETER_RULES, batch_sharding, make_mesh, shardings

TOLERANCE = 2e-5
CONFIGS = {"bert": cases.BASE, "xlm-roberta": cases.M3}
LENGTHS = (9, 4, 12, 2)


@functools.cache
def weights(kind: str):
  """Tensors under VISTA's keys, and the same as our parameters."""
  config = CONFIGS[kind]
  theirs = cases.state_dict(config)
  own = {k: v.numpy() for k, v in theirs.items() if ".attn.rope." not in k}
  ours = from_tensors(own, config, "a test", VISTA)
  return theirs, {**ours, "logit_scale": np.float32(config.logit_scale_init)}


@functools.cache
def pair_function(kind: str):
  model = build(CONFIGS[kind])
  return jax.jit(lambda params, *batch: model.bind(params).embed_pair(*batch))


@pytest.mark.parametrize("kind", CONFIGS)
def test_image_text_and_fused_equal_pytorch(kind):
  config, (theirs, ours) = CONFIGS[kind], weights(kind)
  pixels, tokens = cases.pixels(config, 4), cases.tokens(config, LENGTHS)
  got = pair_function(kind)(ours, pixels, tokens)
  want = cases.embed(config, theirs, pixels, tokens, LENGTHS)
  for rows, expected in zip(got, want, strict=True):
    assert rows.shape == (4, config.text.width) and rows.dtype == jnp.float32
    assert np.abs(rows - expected.numpy()).max() < TOLERANCE
    # Rows that were all alike would hide what is wrong with one of them.
    assert np.abs(expected @ expected.T - torch.eye(4)).max() < 0.98
  model = build(config)
  alone = jax.jit(lambda p, x: model.bind(p).embed_image(x))(ours, pixels)
  norm = np.linalg.norm(alone, axis=1, keepdims=True)
  assert np.abs(alone / norm - got[0]).max() < 1e-6
  both = jax.jit(lambda p, *x: model.bind(p).embed_both(*x))(ours, pixels, tokens)
  norm = np.linalg.norm(both, axis=1, keepdims=True)
  assert np.abs(both / norm - got[2]).max() < 1e-6


@pytest.mark.parametrize("kind", CONFIGS)
def test_padding_changes_nothing(kind):
  config, (_, ours) = CONFIGS[kind], weights(kind)
  pixels = cases.pixels(config, 4)
  tokens = cases.tokens(config, LENGTHS)
  wide = cases.tokens(config, LENGTHS, width=20)
  wide[:, :12] = tokens
  short = pair_function(kind)(ours, pixels, tokens)
  padded = pair_function(kind)(ours, pixels, wide)
  for a, b in zip(short, padded, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_sep_and_a_pad_within_a_text_are_read():
  config, (theirs, ours) = cases.BASE, weights("bert")
  pixels, tokens = cases.pixels(config, 4), cases.tokens(config, LENGTHS)
  tokens[0, 3], tokens[2, 5] = config.text.eos_id, config.text.pad_id
  got = pair_function("bert")(ours, pixels, tokens)
  want = cases.embed(config, theirs, pixels, tokens, LENGTHS)
  for rows, expected in zip(got, want, strict=True):
    assert np.abs(rows - expected.numpy()).max() < TOLERANCE


def test_a_text_too_long_beside_an_image_is_cut_and_keeps_its_sep():
  config, (theirs, ours) = cases.BASE, weights("bert")
  most = config.pair_context
  assert most == 40 - 16 and config.text.context == 40
  tokens = cases.tokens(config, (40, 30, most, 10))
  cut = tokens[:, :most].copy()
  cut[:2, -1] = config.text.eos_id
  lengths = (most, most, most, 10)
  pixels = cases.pixels(config, 4)
  got = pair_function("bert")(ours, pixels, tokens)
  fused = cases.embed(config, theirs, pixels, cut, lengths)[2]
  assert np.abs(got[2] - fused.numpy()).max() < TOLERANCE
  whole = cases.embed_text(
    config, theirs, torch.from_numpy(tokens).long(), torch.tensor([40, 30, most, 10])
  )
  whole = torch.nn.functional.normalize(whole, dim=-1).numpy()
  assert np.abs(got[1] - whole).max() < TOLERANCE  # alone it is read to its end
  with pytest.raises(ValueError, match=r"at most \(B, 40\)"):
    jax.eval_shape(
      lambda p, t: build(config).bind(p).embed_text(t),
      ours,
      np.zeros((1, 41), np.int32),
    )


def test_the_gradient_is_pytorchs():
  config, (theirs, ours) = cases.BASE, weights("bert")
  pixels, tokens = cases.pixels(config, 4), cases.tokens(config, LENGTHS)
  leaves = {k: v.clone().requires_grad_() for k, v in theirs.items()}
  image, text, fused = cases.embed(config, leaves, pixels, tokens, LENGTHS)
  (image * text + text * fused[[1, 2, 3, 0]]).sum().backward()
  zero = {
    k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()
  }
  own = {k: v.numpy() for k, v in zero.items() if ".attn.rope." not in k}
  want = from_tensors(own, config, "gradients", VISTA)
  model = build(config, remat="full")

  def score(params):
    image, text, fused = model.bind(params).embed_pair(pixels, tokens)
    return jnp.sum(image * text + text * fused[jnp.array([1, 2, 3, 0])])

  got = jax.jit(jax.grad(score))(ours)
  trained = ("vision", "text", "image_projection")
  for part in trained:
    for ours_leaf, theirs_leaf in zip(
      jax.tree.leaves(got[part]), jax.tree.leaves(want[part]), strict=True
    ):
      scale = max(np.abs(theirs_leaf).max(), 1e-2)
      assert np.abs(ours_leaf - theirs_leaf).max() < 1e-4 * scale


def test_patches_in_any_order_are_the_same_picture_and_fewer_are_not():
  config, (_, ours) = cases.BASE, weights("bert")
  model = build(config)
  pixels = cases.pixels(config, 2)

  @jax.jit
  def embed(params, pixels, kept):
    return model.bind(params).embed_image(pixels, kept_patches=kept)

  count = config.vision.grid**2
  shuffled = np.stack([np.random.default_rng(k).permutation(count) for k in range(2)])
  whole = jax.jit(lambda p, x: model.bind(p).embed_image(x))(ours, pixels)
  np.testing.assert_allclose(embed(ours, pixels, shuffled), whole, atol=2e-5)
  assert np.abs(embed(ours, pixels, shuffled[:, :8]) - whole).max() > 1e-2


def test_a_missing_modality_leaves_the_other_and_nan_does_no_harm():
  config, (_, ours) = cases.BASE, weights("bert")
  model = build(config)
  pixels, tokens = cases.pixels(config, 4), cases.tokens(config, LENGTHS)
  pixels[1] = np.nan
  has_image, has_text = np.array([1, 0, 1, 0], bool), np.array([1, 1, 0, 0], bool)

  @jax.jit
  def rows(params):
    return model.bind(params).embed_pair(
      pixels, tokens, has_image=has_image, has_text=has_text
    )

  image, text, fused = rows(ours)
  assert not np.isnan(np.concatenate([image, text, fused])).any()
  np.testing.assert_array_equal(fused[1], text[1])
  np.testing.assert_array_equal(fused[2], image[2])
  np.testing.assert_array_equal(fused[3], np.zeros(config.text.width))
  assert np.abs(fused[0] - image[0]).max() > 0.01


def test_bfloat16_stays_near_and_gives_float32():
  config, (_, ours) = cases.BASE, weights("bert")
  model = build(config, dtype="bfloat16")
  pixels, tokens = cases.pixels(config, 4), cases.tokens(config, LENGTHS)
  exact = pair_function("bert")(ours, pixels, tokens)
  got = jax.jit(lambda p: model.bind(p).embed_pair(pixels, tokens))(ours)
  for a, b in zip(got, exact, strict=True):
    assert a.dtype == jnp.float32
    assert np.sum(a * b, axis=1).min() > 0.98


def test_split_over_a_mesh_it_is_the_same():
  config = cases.changed(cases.BASE, "vision", mlp=88)  # a multiple of the axis
  model = build(config)
  params = jax.jit(model.init)(jax.random.key(0))
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  pixels, tokens = cases.pixels(config, 4), cases.tokens(config, LENGTHS)
  embed = jax.jit(lambda p, *batch: model.bind(p).embed_pair(*batch))
  want = embed(params, pixels, tokens)
  placed = jax.device_put(params, shardings(mesh, params, PARAMETER_RULES))
  kernel = placed["vision"]["blocks"]["mlp"]["gate"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 16, 44)
  batch = jax.device_put((pixels, tokens), batch_sharding(mesh))
  for a, b in zip(embed(placed, *batch), want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("name", VISTA_SHAPES)
def test_published_shapes_have_the_published_counts(name):
  config = VISTA_SHAPES[name]
  count = sum(leaf.size for leaf in jax.tree.leaves(build(config).abstract()))
  # Without our logit scale; the blocks' copies of the rotary positions are a file's.
  copies = config.vision.layers * 2 * config.vision.grid**2 * 64
  of_file = {"VISTA-base": 196.66e6, "VISTA-m3": 873.7e6}[name]
  assert abs(count - 1 + copies - of_file) < 1e-4 * of_file
  assert config.pair_context == {"VISTA-base": 316, "VISTA-m3": 7938}[name]
  assert VistaConfig.from_hf(config.to_hf()) == config


def test_rotary_positions_are_the_formulas():
  for config in CONFIGS.values():
    for ours, theirs in zip(
      rotary_tables(config.vision), cases.rotary(config.vision), strict=True
    ):
      np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_first_parameters_embed_and_are_a_function_of_the_key():
  model = build(cases.BASE)
  params = jax.jit(model.init)(jax.random.key(3))
  again = jax.jit(model.init)(jax.random.key(3))
  assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(again)))
  np.testing.assert_allclose(np.exp(params["logit_scale"]), 50, rtol=1e-6)
  out = params["vision"]["blocks"]["attention"]["out"]["kernel"]
  np.testing.assert_allclose(
    np.std(out, axis=(1, 2)), [0.02 / 2**0.5, 0.02 / 2], rtol=0.1
  )


def test_an_image_tower_with_more_patches_than_positions_is_refused():
  with pytest.raises(UserError, match=r"16 patches .* 17 positions"):
    cases.changed(cases.BASE, "text", table=17)
