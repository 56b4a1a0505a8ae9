"""The streaming engine's own: its tiles, its shortcut, and what it never holds."""

import re

import jax
import jax.numpy as jnp
import loss_cases
import numpy as np
import pytest
from loss_oracle import error

from gcl_jax.fusion import Mix
from gcl_jax.losses import contrastive_loss, engine, gcl_loss, tiles
from gcl_jax.losses.pairs import make_pairs
from gcl_jax.losses.tiles import Tile
from gcl_jax.sharding import make_mesh


def _value_and_gradients(case, scale, **options):
  def run(image, text, alpha, beta, scale):
    return gcl_loss(image, text, Mix(alpha, beta), logit_scale=scale, **options)[0]

  arrays = (case.image, case.text, case.alpha, case.beta, np.float32(scale))
  run = jax.jit(jax.value_and_grad(run, argnums=range(5)))
  return jax.tree.leaves(run(*map(jnp.asarray, arrays)))


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_one_exponential_is_as_good_as_two(scale, monkeypatch):
  case = loss_cases.clean(9, 5)
  want = _value_and_gradients(case, scale, form="dense")
  for near, branch in ((1e9, "one"), (-1.0, "two"), (tiles._NEAR, "as it comes")):
    monkeypatch.setattr(tiles, "_NEAR", near)
    jax.clear_caches()  # the limit is a constant of the compiled program
    if branch == "one" and scale == 100.0:
      continue  # that far apart it overflows: what the limit is for
    got = _value_and_gradients(case, scale, form="streaming", block_size=4)
    for x, y in zip(got, want, strict=True):
      assert error(x, y) <= 1e-5, branch


def test_the_limit_is_needed():
  """Log-sum-exps 200 apart in one tile: one exponential would be infinity times zero."""
  image = jnp.array([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
  text = image

  def run(form):
    def loss(image, text):
      return contrastive_loss(image, text, logit_scale=100.0, form=form)[0]

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(image, text)

  for x, y in zip(
    *(jax.tree.leaves(run(f)) for f in ("streaming", "dense")), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)


def test_what_is_missing_is_masked_before_the_exponential():
  """Anchors at −100 throughout: a missing candidate's exp(0 + 100) is infinite."""
  image = jnp.tile(jnp.array([[1.0, 0.0]]), (5, 1))
  options = {"has_image": jnp.arange(5) != 3, "has_text": jnp.arange(5) != 1}

  def run(form):
    def loss(image, text):
      options_of = {"form": form, "logit_scale": 100.0, **options}
      return contrastive_loss(image, text, block_size=2, **options_of)[0]

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(image, -image)

  for x, y in zip(
    *(jax.tree.leaves(run(f)) for f in ("streaming", "dense")), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_what_is_missing_may_stand_anywhere(order):
  """In whatever block: before whole pairs, after them, or among them."""
  case = loss_cases.messy()
  rows = [
    np.arange(8)[::-1],
    *np.random.default_rng(0).permuted([range(8)] * 2, axis=1),
  ]
  arrays = [x[rows[order]] for x in case[:5]]
  options = {name: x[rows[order]] for name, x in case.options.items()}
  case = loss_cases.Case(*arrays, options)
  want = _value_and_gradients(case, 20.0, form="dense", **options)
  got = _value_and_gradients(case, 20.0, form="streaming", block_size=2, **options)
  for x, y in zip(got, want, strict=True):
    assert error(x, y) <= 1e-5


def test_it_never_holds_more_than_a_tile():
  n, block = 96, 8
  array = jax.ShapeDtypeStruct((n, 5), jnp.float32)
  weight = jax.ShapeDtypeStruct((n,), jnp.float32)

  def run(image, text, alpha, beta):
    mix = Mix(alpha, beta)
    return gcl_loss(image, text, mix, logit_scale=9.0, block_size=block)[0]

  lowered = jax.jit(jax.grad(run, argnums=range(4))).lower(array, array, weight, weight)
  text = lowered.compile().as_text()
  assert f"[{block},{block}]" in text
  assert not re.search(r"\[(96|288),(96|288)\]", text)


def test_blocks_divide_evenly_and_never_exceed_the_rows():
  plan = engine.Plan(Tile(2, False, ((0, 1), (1, 0)), None), None, 512)
  assert [plan.size(n) for n in (1, 100, 512, 513, 600, 4096)] == [
    1,
    100,
    512,
    257,
    300,
    512,
  ]


def test_auto_sends_large_banks_round(monkeypatch):
  rows = np.ones((64, 4), np.float32)
  pairs = make_pairs(rows, rows, pair_ids=None, has_image=None, has_text=None)
  tile = Tile(2, False, ((0, 1), (1, 0)), None)

  def ring(form, mesh):
    options = {"form": form, "block_size": None, "batch_axes": ("data",), "mesh": mesh}
    return engine.make_plan(tile, None, pairs, **options).ring

  mesh = make_mesh()
  assert [ring(form, mesh) for form in ("auto", "streaming", "ring")] == [
    False,
    False,
    True,
  ]
  monkeypatch.setattr(engine, "_RING_ABOVE", 2 * rows.nbytes - 1)
  assert [ring(form, mesh) for form in ("auto", "streaming", "ring")] == [
    True,
    False,
    True,
  ]
  assert not ring("auto", None) and not ring("ring", None)


@pytest.mark.parametrize("form", loss_cases.FORMS)
def test_a_nan_that_is_there_is_seen(form):
  """A picture that is present and NaN may not pass for one without negatives."""
  case = loss_cases.clean(6)
  image = case.image.copy()
  image[5] = np.nan
  has_text = np.arange(6) < 5
  loss, _ = gcl_loss(
    image,
    case.text,
    case.fused,
    logit_scale=9.0,
    has_text=has_text,
    **loss_cases.FORMS[form],
  )
  assert np.isnan(loss)


def test_float32_where_float64_is_the_default():
  with jax.enable_x64(True):
    case = loss_cases.clean(5)
    loss, gradient = jax.value_and_grad(
      lambda x: contrastive_loss(x, case.text, logit_scale=9.0, block_size=2)[0]
    )(jnp.asarray(case.image))
  assert loss.dtype == gradient.dtype == jnp.float32
  want, _ = contrastive_loss(case.image, case.text, logit_scale=9.0)
  assert loss == pytest.approx(float(want), rel=1e-6)
