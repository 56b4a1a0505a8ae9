"""The losses where something is missing, degenerate, repeated or wrong; by hand."""

import jax
import jax.numpy as jnp
import loss_cases
import numpy as np
import pytest

from gcl_jax.fusion import Mix
from gcl_jax.losses import contrastive_loss, gcl_loss
from gcl_jax.losses.denominators import DENOMINATORS, excess
from gcl_jax.losses.dense import masked_logsumexp

# Unit vectors at known angles: image·text = 0, image·fused = .6, text·fused = .8.
X, Y = np.array([[1, 0]], np.float32), np.array([[0, 1]], np.float32)
XY = np.array([[0.6, 0.8]], np.float32)


def _loss_of_one(denominator):
  """N = 1 by hand: the six ℓ of similarities i·t = 0, i·it = .6, t·it = .8, s = 5."""
  s_it, s_if, s_tf, own = 0.0, 3.0, 4.0, 5.0
  same = {(0, 1): s_it, (0, 2): s_if, (1, 2): s_tf}
  total = 0.0
  for a in range(3):
    first, second = (same[tuple(sorted((a, m)))] for m in range(3) if m != a)
    for positive, other in ((first, second), (second, first)):
      terms = [positive]
      if denominator in ("self_masked", "literal", "cross_only"):
        terms.append(other)
      if denominator == "literal":
        terms.append(own)
      total += np.log(np.sum(np.exp(terms))) - positive
  return total / 6


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_one_pair(denominator):
  loss, _ = gcl_loss(X, Y, XY, logit_scale=5.0, denominator=denominator)
  assert loss == pytest.approx(_loss_of_one(denominator), rel=1e-6, abs=1e-7)


def test_one_pair_has_no_contrastive_loss():
  loss, directions = contrastive_loss(X, Y, logit_scale=5.0)
  assert loss == 0
  assert not np.any(directions)


def test_two_pairs():
  """Images e1, e2; texts and fused the same; s = 2."""
  bank = jnp.eye(2, 3)
  # Any anchor: its other views at similarity 1, every view of the other pair at 0.
  e = np.exp(2.0)
  want = {
    "self_masked": np.log((2 * e + 3) / e),
    "literal": np.log((3 * e + 3) / e),
    "clean": np.log((e + 3) / e),
    "cross_only": np.log((2 * e + 2) / e),
    "target_only": np.log((e + 1) / e),
  }
  for denominator, value in want.items():
    loss, directions = gcl_loss(
      bank, bank, bank, logit_scale=2.0, denominator=denominator
    )
    assert loss == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(directions, value * (1 - np.eye(3)), rtol=1e-6)


def test_ids_are_not_transitive():
  """0 ~ 1 by photograph, 1 ~ 2 by caption: 0 and 2 are negatives, 1 has none."""
  ids = np.array([[5, 1], [5, 2], [6, 2]])
  bank = jnp.eye(3)
  _, directions = contrastive_loss(bank, bank, logit_scale=1.0, pair_ids=ids)
  # Anchors 0 and 2: one negative at 0; anchor 1: nothing but its positive.
  want = 2 / 3 * np.log((np.e + 1) / np.e)
  assert directions[0, 1] == pytest.approx(want, rel=1e-6)


def test_repeated_pairs_are_not_negatives():
  """Two pairs, each twice, views orthogonal: two negatives, not three."""
  bank = jnp.eye(2)[jnp.array([0, 1, 0, 1])]
  ids = np.array([4, 9, 4, 9])
  loss, _ = contrastive_loss(bank, bank, logit_scale=1.0, pair_ids=ids)
  assert loss == pytest.approx(np.log((np.e + 2) / np.e), rel=1e-6)
  loss, _ = contrastive_loss(bank, bank, logit_scale=1.0)
  assert loss == pytest.approx(np.log((2 * np.e + 2) / np.e), rel=1e-6)


@pytest.mark.parametrize("form", loss_cases.FORMS)
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_no_negatives_at_all(denominator, form):
  """Every pair shares an id: six times the loss of one pair, and finite gradients."""
  banks = [jnp.asarray(np.repeat(x, 5, axis=0)) for x in (X, Y, XY)]
  options = {"denominator": denominator, "pair_ids": jnp.zeros(5, jnp.int32)}

  def run(*banks):
    return gcl_loss(*banks, logit_scale=5.0, **options, **loss_cases.FORMS[form])[0]

  loss, gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))(*banks)
  assert loss == pytest.approx(_loss_of_one(denominator), rel=1e-6, abs=1e-7)
  assert all(np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.parametrize("form", loss_cases.FORMS)
def test_padding_changes_nothing(form):
  case = loss_cases.clean(5)
  rows = [case.image, case.text, case.alpha, case.beta]
  ids = np.arange(5)

  def run(rows, ids, there):
    return gcl_loss(
      *rows[:2],
      Mix(*rows[2:]),
      logit_scale=30.0,
      pair_ids=ids,
      has_image=there,
      has_text=there,
      **loss_cases.FORMS[form],
    )

  run = jax.jit(jax.value_and_grad(run, has_aux=True))
  (loss, directions), gradients = run(rows, ids, np.ones(5, bool))
  for junk in (0.0, np.nan, np.inf, -np.inf):
    padded = [
      np.concatenate([x, np.full((3, *x.shape[1:]), junk, x.dtype)]) for x in rows
    ]
    # The padding's ids are those of real rows: they must not hide negatives.
    (same, also), more = run(padded, np.concatenate([ids, [0, 1, 1]]), np.arange(8) < 5)
    assert same == pytest.approx(float(loss), rel=1e-6)
    np.testing.assert_allclose(also, directions, rtol=1e-6)
    for got, want in zip(more, gradients, strict=True):
      np.testing.assert_allclose(got[:5], want, rtol=1e-5, atol=1e-6)
      np.testing.assert_array_equal(got[5:], 0)


def test_an_image_without_text_is_a_candidate_and_no_anchor():
  """Two pairs of which the second has no text: image 1 is a negative for text 0."""
  image, text = jnp.eye(2), jnp.eye(2).at[1].set(jnp.nan)
  has_text = jnp.array([True, False])
  fused = jnp.eye(2).at[1].set(jnp.nan)
  loss, directions = gcl_loss(
    image, text, fused, logit_scale=1.0, denominator="target_only", has_text=has_text
  )
  # Towards texts and fused there is one candidate, towards images there are two.
  two = np.log((np.e + 1) / np.e)
  want = np.zeros((3, 3))
  want[1, 0] = want[2, 0] = two
  np.testing.assert_allclose(directions, want, atol=1e-6)
  assert loss == pytest.approx(two / 3, rel=1e-6)


@jax.jit
def _with_gradients(banks, weights, has_image, has_text):
  def run(banks):
    return gcl_loss(
      *banks,
      logit_scale=20.0,
      direction_weights=weights,
      has_image=has_image,
      has_text=has_text,
    )

  return jax.value_and_grad(run, has_aux=True)(banks)


@pytest.mark.parametrize("why", ["padding", "weights", "no_pairs"])
def test_the_loss_is_zero_where_nothing_counts(why):
  weights, has_image, has_text = np.ones((3, 3)), np.ones(4, bool), np.ones(4, bool)
  if why == "padding":
    has_image[:] = has_text[:] = False
  elif why == "weights":
    weights = 7 * np.eye(3)
  else:
    has_image[::2] = has_text[1::2] = False
  (loss, directions), gradients = _with_gradients(
    loss_cases.clean(4)[:3], weights, has_image, has_text
  )
  assert loss == 0
  assert np.any(directions) == (why == "weights")
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, 0)


def test_directions_are_means_without_gradient():
  case = loss_cases.clean()

  def run(*banks):
    return gcl_loss(*banks, logit_scale=20.0)

  loss, directions = run(*case[:3])
  assert np.sum(directions) / 6 == pytest.approx(float(loss), rel=1e-6)
  assert not np.any(np.diag(directions))
  gradients = jax.jit(jax.grad(lambda *x: run(*x)[1].sum(), argnums=(0, 1, 2)))(
    *case[:3]
  )
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, 0)


def test_uneven_weights_weigh_directions():
  case = loss_cases.clean()
  _, even = gcl_loss(*case[:3], logit_scale=20.0)
  loss, directions = gcl_loss(
    *case[:3], logit_scale=20.0, direction_weights=loss_cases.WEIGHTS
  )
  np.testing.assert_array_equal(directions, even)
  weights = np.where(np.eye(3), 0, loss_cases.WEIGHTS)
  want = np.sum(weights * np.asarray(even)) / np.sum(weights)
  assert loss == pytest.approx(want, rel=1e-6)


def test_nothing_is_normalised():
  case = loss_cases.clean()
  loss, _ = gcl_loss(*case[:3], logit_scale=20.0)
  doubled, _ = gcl_loss(*(2 * x for x in case[:3]), logit_scale=5.0)
  assert doubled == pytest.approx(float(loss), rel=1e-6)


def test_excess_is_finite_at_both_ends():
  far = jnp.array([-jnp.inf, -80.0, 0.0, 90.0, 300.0])
  value, slope = jax.vmap(jax.value_and_grad(lambda x: excess(x[None], jnp.zeros(()))))(
    far
  )
  np.testing.assert_allclose(
    value, [0, np.exp(-80.0), np.log(2), 90, 300], rtol=1e-6, atol=0
  )
  np.testing.assert_allclose(slope, [0, np.exp(-80.0), 0.5, 1, 1], rtol=1e-5)


def test_no_nan_is_made_even_to_be_thrown_away():
  """An anchor without negatives under `jax_debug_nans`, operation by operation."""
  mask = jnp.array([[True, False], [False, False]])
  with jax.disable_jit(), jax.debug_nans(True):
    value, slope = jax.value_and_grad(
      lambda x: jnp.sum(jnp.exp(masked_logsumexp(x, mask)))
    )(jnp.zeros((2, 2)))
  assert value == 1
  np.testing.assert_array_equal(slope, [[1, 0], [0, 0]])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"form": "tiled"}, "choose from auto, dense, streaming, ring"),
    ({"block_size": 0}, "block_size=0"),
    ({"denominator": "selfmasked"}, "self_masked, literal"),
    ({"direction_weights": np.ones(3)}, r"\(3, 3\)"),
    ({"pair_ids": np.arange(3)}, "pair_ids"),
    ({"pair_ids": np.arange(4.0)}, "not integers"),
    ({"has_image": np.ones((4, 1), bool)}, "has_image"),
    ({"has_text": np.ones(5, bool)}, "has_text"),
    ({"logit_scale": np.ones(4)}, "logit_scale"),
    ({"text": np.ones((4, 3))}, "text has shape"),
    ({"fused": np.ones((1, 4))}, "fused has shape"),
    ({"fused": Mix(np.ones(4), np.ones(3))}, "fused.beta"),
    ({"image": np.ones(4)}, r"\(N, D\)"),
  ],
)
def test_wrong_arguments(change, message):
  case = loss_cases.clean(4)
  arguments = {
    "image": case.image,
    "text": case.text,
    "fused": case.fused,
    "logit_scale": 20.0,
  }
  with pytest.raises(ValueError, match=message):
    gcl_loss(**(arguments | change))
