"""The model against PyTorch's, and against itself by other ways of computing it."""

from __future__ import annotations

import re

import clip_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings, score_fusion
from gcl_jax.models import CLIPConfig, build, named_config
from gcl_jax.models.convert import from_hf
from gcl_jax.sharding import batch_sharding, make_mesh, path_of

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def small():
  """(config, model, parameters with no zero bias) of two small towers."""
  config = CLIPConfig.from_hf(cases.SMALL)
  torch_model = cases.torch_model(cases.SMALL)
  return config, build(config), cases.our_params(torch_model, config)


@pytest.fixture(scope="module")
def batch(small):
  """Eight images and eight texts of several lengths."""
  config, _, _ = small
  return cases.images(config, 8), cases.texts(config, (3, 15, 7, 9) * 2)


@pytest.fixture(scope="module")
def torch_gradient(small, batch):
  """PyTorch's gradient of `_score`, in our tree."""
  config, _, _ = small
  theirs = cases.torch_model(cases.SMALL)
  image, text = cases.torch_raw(theirs, *batch)
  torch.sum(image * text).backward()
  return from_hf(
    {
      key: (torch.zeros_like(p) if p.grad is None else p.grad).numpy()
      for key, p in theirs.named_parameters()
    },
    config,
    "gradients",
  )


def _score(model, params, pixels, tokens):
  bound = model.bind(params)
  return jnp.sum(bound.embed_image(pixels) * bound.embed_text(tokens))


def _assert_near(ours, expected):
  """Every leaf within 1e-4 of the expected one's largest number."""
  for (path, leaf), want in zip(
    jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True
  ):
    scale = max(np.abs(want).max(), 1e-2)
    assert np.abs(leaf - want).max() < 1e-4 * scale, path_of(path)


def _embed(config, params, pixels, tokens, **settings):
  """Both embeddings, compiled."""
  model = build(config, **settings)

  @jax.jit
  def embed(params, pixels, tokens):
    bound = model.bind(params)
    return bound.embed_image(pixels), bound.embed_text(tokens)

  return embed(params, pixels, tokens)


@pytest.mark.parametrize("name", cases.PLAIN)
def test_named_shapes_equal_pytorch(name):
  fields = cases.changed(named_config(name).to_hf(), num_hidden_layers=2)
  # A small vocabulary: nothing else depends on it, and the table is most of the model.
  fields["text_config"].update(
    vocab_size=300, bos_token_id=cases.BOS, eos_token_id=cases.EOS
  )
  theirs, config = cases.torch_model(fields), CLIPConfig.from_hf(fields)
  pixels, tokens = cases.images(config, 1), cases.texts(config, (4, 76))
  image, text = cases.torch_embeddings(theirs, pixels, tokens)
  ours = _embed(config, cases.our_params(theirs, config), pixels, tokens)
  for rows, expected in zip(ours, (image, text), strict=True):
    assert rows.shape == expected.shape and rows.dtype == jnp.float32
    assert cases.unit_gap(rows, expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.PLAIN)
def test_named_shapes_at_full_depth_equal_pytorch(name):
  fields = named_config(name).to_hf()
  fields["text_config"].update(
    vocab_size=300, bos_token_id=cases.BOS, eos_token_id=cases.EOS
  )
  theirs, config = cases.torch_model(fields), CLIPConfig.from_hf(fields)
  pixels, tokens = cases.images(config, 2), cases.texts(config, (4, 76))
  image, text = cases.torch_embeddings(theirs, pixels, tokens)
  ours = _embed(config, cases.our_params(theirs, config), pixels, tokens)
  gaps = [cases.unit_gap(*both) for both in zip(ours, (image, text), strict=True)]
  print(name, gaps)
  assert max(gaps) < TOLERANCE


@pytest.mark.parametrize(
  ("act", "eps"), [("quick_gelu", 1e-5), ("gelu", 0.05), ("gelu_pytorch_tanh", 1e-5)]
)
def test_activations_and_epsilon_equal_pytorch(act, eps):
  fields = cases.changed(cases.SMALL, hidden_act=act, layer_norm_eps=eps)
  theirs, config = cases.torch_model(fields), CLIPConfig.from_hf(fields)
  pixels, tokens = cases.images(config), cases.texts(config, (3, 15))
  image, text = cases.torch_embeddings(theirs, pixels, tokens)
  ours = _embed(config, cases.our_params(theirs, config), pixels, tokens)
  np.testing.assert_allclose(ours[0], image, atol=2e-5)  # raw, not only the direction
  np.testing.assert_allclose(ours[1], text, atol=2e-5)


@pytest.mark.parametrize("eos_token_id", [2, cases.EOS])
def test_end_of_text_rules_equal_pytorch(eos_token_id):
  # Rows where the rules differ: a token beyond the end of text's, none at all, twice.
  fields = cases.changed(cases.SMALL)
  fields["text_config"].update(eos_token_id=eos_token_id, vocab_size=302)
  theirs, config = cases.torch_model(fields), CLIPConfig.from_hf(fields)
  tokens = cases.texts(config, (5, 9, 12, 15, 4), pad=7)
  tokens[0, 2] = 301
  tokens[1, 9] = 11
  tokens[2, 14] = cases.EOS
  tokens[3, 6] = 2
  _, text = cases.torch_embeddings(theirs, cases.images(config), tokens)
  model, params = build(config), cases.our_params(theirs, config)
  ours = jax.jit(lambda p, t: model.bind(p).embed_text(t))(params, tokens)
  np.testing.assert_allclose(ours, text, atol=2e-5)


def test_pixels_that_no_patch_covers_are_left_out_as_in_pytorch():
  fields = cases.changed(cases.SMALL)
  fields["vision_config"].update(image_size=37, patch_size=8)
  theirs, config = cases.torch_model(fields), CLIPConfig.from_hf(fields)
  pixels, tokens = cases.images(config), cases.texts(config, (3,))
  image, _ = cases.torch_embeddings(theirs, pixels, tokens)
  model, params = build(config), cases.our_params(theirs, config)
  ours = jax.jit(lambda p, x: model.bind(p).embed_image(x))(params, pixels)
  np.testing.assert_allclose(ours, image, atol=2e-5)


def test_a_large_mean_costs_the_norms_no_digits():
  theirs, config = cases.torch_model(cases.SMALL), CLIPConfig.from_hf(cases.SMALL)
  with torch.no_grad():  # as a trained ViT's few large channels
    theirs.vision_model.embeddings.position_embedding.weight.add_(300)
  pixels, tokens = cases.images(config), cases.texts(config, (3,))
  image, _ = cases.torch_embeddings(theirs, pixels, tokens)
  model, params = build(config), cases.our_params(theirs, config)
  ours = jax.jit(lambda p, x: model.bind(p).embed_image(x))(params, pixels)
  assert cases.unit_gap(ours, image) < 3e-4


def test_padding_changes_nothing(small):
  config, model, params = small
  embed = jax.jit(lambda tokens: model.bind(params).embed_text(tokens))
  full = cases.texts(config, (3, 7, 7), pad=0)
  long = embed(full)
  np.testing.assert_allclose(embed(full[:, :8]), long, atol=2e-6)
  other = np.where(np.arange(16) > np.array([[3], [7], [7]]), 5, full)
  np.testing.assert_array_equal(embed(other), long)


def test_wrong_sizes_are_refused(small):
  _, model, params = small
  with pytest.raises(ValueError, match=r"\(2, 40, 40, 3\).*\(B, 32, 32, 3\)"):
    model.bind(params).embed_image(jnp.zeros((2, 40, 40, 3)))
  with pytest.raises(ValueError, match=r"\(B, 16\)"):
    model.bind(params).embed_text(jnp.zeros((2, 17), jnp.int32))


def test_init_draws_as_clip_does(small):
  config, model, _ = small
  init = jax.jit(model.init)
  params = init(jax.random.key(0))
  shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
  assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.abstract())
  torch_params = cases.torch_model(cases.SMALL).state_dict()
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(
    tensor.numel() for tensor in torch_params.values()
  )
  width, layers = 48, 2
  inner = width**-0.5 * (2 * layers) ** -0.5
  expected = {
    "vision/class_embedding": width**-0.5,
    "vision/patch_embedding/kernel": 0.02,
    "vision/position_embedding/embedding": 0.02,
    "vision/blocks/attention/query/kernel": inner,
    "vision/blocks/attention/key/kernel": inner,
    "vision/blocks/attention/value/kernel": inner,
    "vision/blocks/attention/out/kernel": width**-0.5,
    "vision/blocks/mlp/fc1/kernel": (2 * width) ** -0.5,
    "vision/blocks/mlp/fc2/kernel": inner,
    "image_projection/kernel": width**-0.5,
    "text_projection/kernel": config.text.width**-0.5,
    "text/token_embedding/embedding": 0.02,
    "text/position_embedding/embedding": 0.02,
    "text/blocks/attention/out/kernel": config.text.width**-0.5,
  }
  flat = {path_of(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(params)}
  for path, std in expected.items():
    spread = 4 / np.sqrt(2 * flat[path].size)  # four standard errors
    assert np.std(flat[path]) == pytest.approx(std, rel=spread), path
  for path, leaf in flat.items():
    if path.endswith("bias"):
      assert not np.any(leaf), path
    if path.endswith("scale") and path != "logit_scale":
      assert np.all(leaf == 1), path
  assert flat["logit_scale"] == np.float32(2.6592)
  kernel = flat["vision/blocks/attention/query/kernel"]
  assert not np.array_equal(kernel[0], kernel[1])  # layers differ
  other = init(jax.random.key(1))["vision"]["class_embedding"]
  assert not np.array_equal(other, flat["vision/class_embedding"])


def test_gradients_equal_pytorchs(small, batch, torch_gradient):
  _, model, params = small
  ours = jax.jit(jax.grad(lambda p: _score(model, p, *batch)))(params)
  _assert_near(ours, torch_gradient)


def test_remat_keeps_less_and_gives_the_same_gradients(small, batch, torch_gradient):
  config, _, params = small
  images, _ = cases.torch_embeddings(cases.torch_model(cases.SMALL), *batch)
  saved = {}
  for remat in ("none", "pointwise", "dots", "full", "full,none", "none,full"):
    other = build(config, remat=remat)

    def score(text, other=other):
      return jnp.sum(images * other.bind({**params, "text": text}).embed_text(batch[1]))

    kept = jax.eval_shape(lambda text, f=score: jax.vjp(f, text)[1], params["text"])
    saved[remat] = sum(leaf.size for leaf in jax.tree.leaves(kept))
    if remat in ("pointwise", "dots", "full"):
      _assert_near(jax.jit(jax.grad(score))(params["text"]), torch_gradient["text"])
  assert saved["full"] < 0.7 * saved["dots"] < 0.7 * 0.7 * saved["none"], saved
  assert saved["dots"] < saved["pointwise"] < 0.8 * saved["none"], saved
  assert saved["full,none"] == saved["none"]  # the image tower's comes first
  assert saved["none,full"] == saved["full"]


def test_half_precision_stays_near_and_gives_float32(small, batch, torch_gradient):
  config, _, params = small
  exact = cases.torch_embeddings(cases.torch_model(cases.SMALL), *batch)
  ours = _embed(config, params, *batch, dtype="bfloat16")
  for rows, expected in zip(ours, exact, strict=True):
    assert rows.dtype == jnp.float32
    assert 1e-5 < cases.unit_gap(rows, expected) < 0.03
  half = build(config, dtype="bfloat16")
  bound = half.bind(params)  # the last norms are in float32, too
  assert jax.eval_shape(bound.vision, batch[0]).dtype == jnp.float32
  assert jax.eval_shape(bound.text, batch[1]).dtype == jnp.float32

  def score(text):
    embedded = half.bind({**params, "text": text}).embed_text(batch[1])
    return jnp.sum(exact[0] * embedded)

  gradient = jax.jit(jax.grad(score))(params["text"])
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
  ours, want = (
    np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    for tree in (gradient, torch_gradient["text"])
  )
  assert np.linalg.norm(ours - want) < 0.05 * np.linalg.norm(want)


def test_a_sharded_batch_needs_no_collective_and_gives_the_same(small, batch):
  _, model, params = small
  mesh = make_mesh()
  pixels, tokens = batch
  put = jax.device_put((pixels, tokens), batch_sharding(mesh))
  everywhere = jax.device_put(params, NamedSharding(mesh, P()))

  @jax.jit
  def embed(params, pixels, tokens):
    return model.bind(params).embed_pair(pixels, tokens)

  compiled = embed.lower(everywhere, *put).compile()
  collectives = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
  assert not re.findall(collectives, compiled.as_text())
  ours, alone = compiled(everywhere, *put), embed(params, pixels, tokens)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(alone), strict=True):
    assert len(a.sharding.device_set) == 8
    np.testing.assert_allclose(a, b, atol=2e-6)


def test_parameters_may_be_split_over_the_mesh(small, batch, torch_gradient):
  _, model, params = small
  images, _ = cases.torch_embeddings(cases.torch_model(cases.SMALL), *batch)
  mesh = make_mesh(data=4, fsdp=2)
  specs = jax.tree.map(
    lambda leaf: NamedSharding(mesh, P(None, "fsdp") if leaf.ndim == 3 else P()),
    params["text"],
  )

  def score(text, images, tokens):
    return jnp.sum(images * model.bind({**params, "text": text}).embed_text(tokens))

  put = jax.device_put((images, batch[1]), batch_sharding(mesh))
  gradient = jax.jit(jax.grad(score), out_shardings=specs)(
    jax.device_put(params["text"], specs), *put
  )
  kernel = gradient["blocks"]["mlp"]["fc1"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (3, 16, 80)
  _assert_near(gradient, torch_gradient["text"])


def test_pairs_are_fused_as_the_settings_say(small):
  config, model, params = small
  pixels, tokens = cases.images(config), cases.texts(config, (3, 15))
  raw = _embed(config, params, pixels, tokens)
  has_text = jnp.array([True, False])
  fixed = FusionSettings(of="unit", image_weight=0.5, text_weight=2.0)
  learned = FusionSettings(of="raw", image_weight=0.5, text_weight=2.0, learned=True)
  weights = {"image_weight": jnp.float32(3.0), "text_weight": jnp.float32(0.25)}
  cases_of = (
    (fixed, params, (0.5, 2.0)),
    (learned, {**params, "fusion": weights}, (3.0, 0.25)),
  )
  for settings, tree, (image_weight, text_weight) in cases_of:
    model = build(config, fusion=settings)

    @jax.jit
    def embed_pair(tree, model=model):
      return model.bind(tree).embed_pair(pixels, tokens, has_text=has_text)

    ours = embed_pair(tree)
    expected = score_fusion(
      *raw,
      image_weight=image_weight,
      text_weight=text_weight,
      of=settings.of,
      has_text=has_text,
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-6)


def test_learned_fusion_weights_are_parameters_with_gradients(small):
  config, _, params = small
  settings = FusionSettings(image_weight=0.5, text_weight=2.0, learned=True)
  model = build(config, fusion=settings)
  fresh = jax.jit(lambda key: model.init(key)["fusion"])(jax.random.key(0))
  assert {name: float(w) for name, w in fresh.items()} == {
    "image_weight": 0.5,
    "text_weight": 2.0,
  }
  pixels, tokens = cases.images(config), cases.texts(config, (3, 15))

  def alpha(weights):
    bound = model.bind({**params, "fusion": weights})
    return jnp.sum(bound.embed_pair(pixels, tokens)[2].alpha)

  assert all(float(g) != 0 for g in jax.jit(jax.grad(alpha))(fresh).values())
  assert "fusion" not in build(config).abstract()


def test_the_handle_is_hashable_and_equal_by_what_it_was_built_from(small):
  config, model, _ = small
  assert build(config) == model and hash(build(config)) == hash(model)
  assert build(config, dtype="bfloat16") != model
  assert jax.tree.leaves(model) == [model]  # not a pytree: a leaf, or a static argument
  abstract = model.abstract()
  abstract.clear()
  assert model.abstract()


def test_unknown_dtype_and_remat_are_named():
  with pytest.raises(UserError, match=r"model\.dtype is 'half'.*bfloat16"):
    build(CLIPConfig(), dtype="half")
  with pytest.raises(UserError, match=r"model\.remat is 'some'.*dots"):
    build(CLIPConfig(), remat="some")
  with pytest.raises(UserError, match=r"model\.remat is 'full,dots,none'"):
    build(CLIPConfig(), remat="full,dots,none")


def test_a_tower_that_sees_some_patches_equals_pytorch_on_them(small, batch):
  config, model, params = small
  pixels, _ = batch
  patches = config.vision.grid**2
  kept = np.stack([np.random.default_rng(k).permutation(patches) for k in range(8)])
  embed = jax.jit(
    lambda kept: model.bind(params).embed_image(pixels, kept_patches=kept)
  )
  # Positions go with their patches: all of them in any order are the whole image.
  whole = model.bind(params).embed_image(pixels)
  assert cases.unit_gap(embed(kept), whole) < TOLERANCE
  kept = kept[:, :5]
  theirs = cases.torch_model(cases.SMALL)
  tower = theirs.vision_model
  with torch.no_grad():
    x = tower.embeddings(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    rows = torch.from_numpy(np.concatenate([np.zeros((8, 1), int), 1 + kept], axis=1))
    x = torch.gather(x, 1, rows[:, :, None].expand(-1, -1, x.shape[2]))
    x = tower.encoder(inputs_embeds=tower.pre_layrnorm(x)).last_hidden_state
    want = theirs.visual_projection(tower.post_layernorm(x[:, 0])).numpy()
  assert cases.unit_gap(embed(kept), want) < TOLERANCE
  assert cases.unit_gap(want, whole) > 100 * TOLERANCE
