"""The separation term against its formula, its oracle and numbers by hand."""

import jax
import jax.numpy as jnp
import loss_cases
import loss_oracle
import numpy as np
import pytest
from loss_oracle import error

from gcl_jax.losses import intra_modal_separation_loss

TOLERANCE = 1e-5


def _features(case):
  """Lengths differ (the cosine ignores them); NaN where there is no text."""
  rng = np.random.default_rng(5)
  n = len(case.image)
  features = rng.normal(size=(n, 3)) * rng.uniform(0.1, 9, (n, 1))
  features[~case.options.get("has_text", np.ones(n, bool))] = np.nan
  return features.astype(np.float32)


@pytest.mark.parametrize("form", loss_cases.FORMS)
@pytest.mark.parametrize("featured", [False, True])
@pytest.mark.parametrize("name", ["clean", "messy"])
def test_value_and_gradients_against_the_oracle(name, featured, form):
  case = getattr(loss_cases, name)()
  features = _features(case) if featured else None

  def ours(image, text, scale):
    return intra_modal_separation_loss(
      image,
      text,
      features,
      logit_scale=scale,
      **loss_cases.FORMS[form],
      **case.options,
    )

  loss, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(
    jnp.asarray(case.image), jnp.asarray(case.text), jnp.float32(20)
  )

  def oracle(image, text, scale):
    return loss_oracle.separation(image, text, features, scale, **case.oracle_options())

  image, text, *_ = case.for_oracle()
  assert error(loss, oracle(image, text, 20.0)) < TOLERANCE
  wants = loss_oracle.central_differences(oracle, (image, text, np.float64(20)))
  for got, want in zip(gradients, wants, strict=True):
    assert error(got, want) < TOLERANCE
    assert not np.any(np.asarray(got)[want == 0])


@pytest.mark.parametrize(
  ("cosine", "exponent"), [(1.0, 0.0), (0.0, 1.2), (-1.0, 2.4), (0.5, 0.6)]
)
def test_two_pairs_by_hand(cosine, exponent):
  """v0·v1 = .6, v·t = 1, s = 2: the negative's logit is 2 · (1 − cos) · .6."""
  image = np.array([[1, 0], [0.6, 0.8]], np.float32)
  features = np.array([[3, 0], [cosine, np.sqrt(1 - cosine**2)]], np.float32)
  loss = intra_modal_separation_loss(image, image, features, logit_scale=2.0)
  want = np.log(np.exp(2) + np.exp(exponent)) - 2
  assert loss == pytest.approx(want, rel=1e-6)


def test_features_are_frozen():
  case = loss_cases.clean()
  gradient = jax.grad(
    lambda f: intra_modal_separation_loss(case.image, case.text, f, logit_scale=20.0)
  )(_features(case))
  np.testing.assert_array_equal(gradient, 0)


def test_nothing_counts():
  case = loss_cases.clean(3)
  loss, gradient = jax.value_and_grad(
    lambda image: intra_modal_separation_loss(
      image, case.text, logit_scale=20.0, has_text=np.zeros(3, bool)
    )
  )(case.image)
  assert loss == 0
  np.testing.assert_array_equal(gradient, 0)


def test_one_pair():
  loss = intra_modal_separation_loss(*loss_cases.clean(1)[:2], logit_scale=20.0)
  assert loss == 0


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"text_features": np.ones((4, 3))}, "text_features"),
    ({"text_features": np.ones(5)}, "text_features"),
    ({"form": "tiled"}, "choose from auto, dense"),
    ({"logit_scale": np.ones(1)}, "logit_scale"),
  ],
)
def test_wrong_arguments(change, message):
  case = loss_cases.clean(5)
  arguments = {"image": case.image, "text": case.text, "logit_scale": 20.0}
  with pytest.raises(ValueError, match=message):
    intra_modal_separation_loss(**(arguments | change))
