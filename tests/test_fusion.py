"""Score fusion: what UniIR's CLIP_SF computes, and where it could divide by zero."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings, Mix, fuse, score_fusion


def _raw(n=5, width=4, seed=0):
  rng = np.random.default_rng(seed)
  image = 10 * rng.normal(size=(n, width))
  text = 7 * rng.normal(size=(n, width))
  return image.astype(np.float32), text.astype(np.float32)


def _unit(rows):
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("of", ["raw", "unit"])
@pytest.mark.parametrize("weights", [(1, 1), (0.3, 2.0), (-1.0, 0.5), (0, 1)])
def test_fused_is_the_normalised_weighted_sum(of, weights):
  image, text = _raw()
  unit_image, unit_text, mix = score_fusion(
    image, text, image_weight=weights[0], text_weight=weights[1], of=of
  )
  np.testing.assert_allclose(unit_image, _unit(image), rtol=1e-6)
  np.testing.assert_allclose(unit_text, _unit(text), rtol=1e-6)
  parts = (image, text) if of == "raw" else (_unit(image), _unit(text))
  want = _unit(weights[0] * parts[0] + weights[1] * parts[1])
  np.testing.assert_allclose(fuse(unit_image, unit_text, mix), want, atol=2e-6)


def test_by_hand():
  """Lengths 3 and 4 at a right angle: raw 3/5, 4/5; unit 1/√2 each."""
  image, text = jnp.array([[3.0, 0]]), jnp.array([[0, 4.0]])
  mix = score_fusion(image, text)[2]
  np.testing.assert_allclose(np.ravel(mix), [0.6, 0.8], rtol=1e-6)
  mix = score_fusion(image, text, of="unit")[2]
  np.testing.assert_allclose(np.ravel(mix), [math.sqrt(0.5)] * 2, rtol=1e-6)


@pytest.mark.parametrize("of", ["raw", "unit"])
@pytest.mark.parametrize("junk", [0.0, np.nan, np.inf])
def test_a_document_without_a_modality_is_the_other_one(of, junk):
  image, text = _raw()
  has_image = np.array([1, 0, 1, 0, 1], bool)
  has_text = np.array([1, 1, 0, 0, 1], bool)
  image[~has_image] = junk
  text[~has_text] = junk

  def run(image, text, weight):
    unit_image, unit_text, mix = score_fusion(
      image,
      text,
      image_weight=weight,
      of=of,
      has_image=has_image,
      has_text=has_text,
    )
    return fuse(unit_image, unit_text, mix), (unit_image, unit_text, mix)

  fused, (unit_image, unit_text, mix) = run(image, text, -3.0)
  np.testing.assert_array_equal(fused[1], unit_text[1])
  np.testing.assert_array_equal(fused[2], unit_image[2])
  np.testing.assert_array_equal(fused[3], 0)
  np.testing.assert_array_equal(np.array(mix)[:, 1:4], [[0, 1, 0], [1, 0, 0]])
  np.testing.assert_array_equal(unit_image[~has_image], 0)
  np.testing.assert_array_equal(unit_text[~has_text], 0)
  gradients = jax.grad(lambda *x: jnp.sum(run(*x)[0] ** 3), argnums=(0, 1, 2))(
    image, text, -3.0
  )
  np.testing.assert_array_equal(gradients[0][~has_image], 0)
  np.testing.assert_array_equal(gradients[1][~has_text], 0)
  for gradient in gradients:
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient != 0)


@pytest.mark.parametrize("of", ["raw", "unit"])
def test_opposite_and_zero_embeddings_stay_finite(of):
  image = jnp.array([[2.0, 0], [0, 0], [0, 3], [0, 0]])
  text = jnp.array([[-2.0, 0], [0, 0], [0, 0], [5, 0]])

  def run(image, text):
    unit_image, unit_text, mix = score_fusion(image, text, of=of)
    return fuse(unit_image, unit_text, mix), (unit_image, unit_text)

  fused, (unit_image, unit_text) = run(image, text)
  np.testing.assert_allclose(fused, [[0, 0], [0, 0], [0, 1], [1, 0]], atol=1e-6)
  np.testing.assert_array_equal(unit_image[1], 0)
  np.testing.assert_array_equal(unit_text[1], 0)
  for gradient in jax.grad(lambda *x: jnp.sum(run(*x)[0]), argnums=(0, 1))(image, text):
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("of", ["raw", "unit"])
def test_gradients_are_those_of_the_formula(of):
  """Central differences in float64 NumPy, of embeddings and learned weights."""
  image, text = _raw()
  towards = np.random.default_rng(1).normal(size=image.shape)

  def oracle(image, text, image_weight, text_weight):
    if of == "unit":
      image, text = _unit(image), _unit(text)
    return np.sum(towards * _unit(image_weight * image + text_weight * text))

  def ours(image, text, image_weight, text_weight):
    unit_image, unit_text, mix = score_fusion(
      image, text, image_weight=image_weight, text_weight=text_weight, of=of
    )
    return jnp.sum(towards * fuse(unit_image, unit_text, mix))

  arrays = [np.float64(x) for x in (image, text, 0.7, 1.2)]
  gradients = jax.grad(ours, argnums=(0, 1, 2, 3))(
    *(jnp.asarray(x, jnp.float32) for x in arrays)
  )
  for position, got in enumerate(gradients):
    want = np.zeros(np.shape(got))
    for index in np.ndindex(want.shape):
      step = np.zeros_like(want)
      step[index] = 1e-6
      above, below = (
        oracle(*(x + sign * step if i == position else x for i, x in enumerate(arrays)))
        for sign in (1, -1)
      )
      want[index] = (above - below) / 2e-6
    np.testing.assert_allclose(got, want, atol=1e-5 * np.max(np.abs(want)))


def test_bfloat16_in_float32_out():
  image, text = (jnp.asarray(x, jnp.bfloat16) for x in _raw())
  unit_image, unit_text, mix = score_fusion(image, text)
  for array in (unit_image, unit_text, *mix, fuse(unit_image, unit_text, mix)):
    assert array.dtype == jnp.float32
  norms = np.linalg.norm(fuse(unit_image, unit_text, mix), axis=1)
  np.testing.assert_allclose(norms, 1, atol=1e-6)


def test_mix_passes_through_jit():
  image, text = _raw()
  mix = jax.jit(score_fusion)(image, text)[2]
  assert isinstance(mix, Mix)
  np.testing.assert_allclose(mix, score_fusion(image, text)[2], rtol=1e-6)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"of": "sum"}, "of='sum'"),
    ({"text_raw": np.ones((5, 3))}, "must be"),
    ({"has_text": np.ones(4, bool)}, "has_text"),
    ({"has_image": np.ones((5, 4), bool)}, "has_image"),
  ],
)
def test_wrong_arguments(arguments, message):
  image, text = _raw()
  with pytest.raises(ValueError, match=message):
    score_fusion(**({"image_raw": image, "text_raw": text} | arguments))


def test_settings_survive_json():
  settings = FusionSettings(of="unit", image_weight=0.25, text_weight=2, learned=True)
  written = json.loads(json.dumps(settings.to_dict()))
  assert FusionSettings.from_dict(written) == settings
  assert FusionSettings.from_dict({}) == FusionSettings("raw", 1.0, 1.0, False)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"of": "sum"}, "raw, unit"),
    ({"image_weight": "1"}, "fusion.image_weight"),
    ({"text_weight": float("nan")}, "fusion.text_weight"),
    ({"text_weight": True}, "fusion.text_weight"),
    ({"learned": 1}, "fusion.learned"),
    ({"alpha": 1}, "unknown fusion settings alpha"),
  ],
)
def test_settings_that_cannot_be(fields, message):
  with pytest.raises(UserError, match=message):
    FusionSettings.from_dict(fields)
