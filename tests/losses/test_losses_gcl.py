"""gcl_loss and contrastive_loss against numbers, limits and the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import loss_cases
import loss_oracle
import numpy as np
import pytest
from loss_oracle import DENOMINATORS, error

from gcl_jax.fusion import Mix
from gcl_jax.losses import contrastive_loss, gcl_loss
from gcl_jax.losses.denominators import DENOMINATORS as OURS

TOLERANCE = 1e-5

# N = 2 of the paper notes: e_i, e_t as below, e_it = normalise(e_i + e_t).
IMAGE = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
TEXT = np.array([[0.6, 0.8, 0], [0, 0.6, 0.8]], np.float32)
FUSED = loss_oracle.unit(IMAGE + TEXT).astype(np.float32)
GOLDEN = {
  ("literal", 2): 1.603608,
  ("self_masked", 2): 1.238516,
  ("clean", 2): 0.870328,
  ("target_only", 2): 0.409208,
  ("cross_only", 2): 1.117941,
  ("literal", 20): 4.229324,
  ("self_masked", 20): 2.248998,
  ("clean", 20): 0.721264,
  ("target_only", 20): 0.674308,
  ("cross_only", 20): 2.248912,
}


def test_the_denominators_are_the_five_of_the_design():
  assert set(OURS) == set(DENOMINATORS)


@pytest.mark.parametrize(("denominator", "scale"), GOLDEN)
def test_golden_values(denominator, scale):
  want = GOLDEN[denominator, scale]
  loss, _ = gcl_loss(IMAGE, TEXT, FUSED, logit_scale=scale, denominator=denominator)
  assert loss == pytest.approx(want, abs=2e-6)
  oracle, _ = loss_oracle.gcl(IMAGE, TEXT, FUSED, scale, denominator)
  assert oracle == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(("scale", "want"), [(2, 0.588149), (20, 2.009078)])
def test_golden_values_of_the_clip_loss(scale, want):
  loss, directions = contrastive_loss(IMAGE, TEXT, logit_scale=scale)
  assert loss == pytest.approx(want, abs=2e-6)
  assert directions.shape == (3, 3)
  assert np.flatnonzero(directions).tolist() == [1, 3]


@pytest.mark.parametrize(
  ("denominator", "size"),
  [
    ("literal", lambda n: 3 * n),
    ("self_masked", lambda n: 3 * n - 1),
    ("clean", lambda n: 3 * n - 2),
    ("target_only", lambda n: n),
    ("cross_only", lambda n: 2 * n),
  ],
)
def test_equal_embeddings_give_the_log_of_the_candidates(denominator, size):
  bank = jnp.zeros((2, 3)).at[:, 0].set(1)
  loss, _ = gcl_loss(bank, bank, bank, logit_scale=50, denominator=denominator)
  assert loss == pytest.approx(np.log(size(2)), rel=1e-6)


@pytest.mark.parametrize(
  ("denominator", "floor"),
  [
    ("literal", 3),
    ("self_masked", 2),
    ("clean", 1),
    ("target_only", 1),
    ("cross_only", 2),
  ],
)
def test_perfect_embeddings_reach_the_floor(denominator, floor):
  bank = jnp.eye(2, 3)
  loss, _ = gcl_loss(bank, bank, bank, logit_scale=100, denominator=denominator)
  assert loss == pytest.approx(np.log(floor), abs=1e-6)


def test_small_losses_keep_their_digits():
  """log(1 + 5 e^-30) at scale 30: a difference of two rounded logarithms gives 0."""
  bank = jnp.eye(6)
  loss, _ = contrastive_loss(bank, bank, logit_scale=30)
  assert loss == pytest.approx(5 * np.exp(-30), rel=1e-5)


@functools.cache
def _reference(denominator, kind, name, scale, weighted):
  """Oracle value, directions and gradients by central differences, float64."""
  case = getattr(loss_cases, name)()
  image, text, fused, alpha, beta = case.for_oracle()
  weights = loss_cases.WEIGHTS if weighted else None
  oracle = loss_oracle.gcl_function(
    len(image), denominator, weights, **case.oracle_options()
  )

  def run(image, text, *rest):
    bank = rest[0] if kind == "bank" else loss_oracle.mixed(image, text, *rest[:2])
    return oracle(image, text, bank, rest[-1])

  third = (fused,) if kind == "bank" else (alpha, beta)
  arrays = (image, text, *third, np.float64(scale))
  gradients = loss_oracle.central_differences(lambda *x: run(*x)[0], arrays)
  return *run(*arrays), gradients


@functools.cache
def _compiled(denominator, kind, name, weighted, form):
  """The same of our loss: arrays -> ((loss, directions), gradients)."""
  options = getattr(loss_cases, name)().options

  def run(image, text, *rest):
    return gcl_loss(
      image,
      text,
      rest[0] if kind == "bank" else Mix(*rest[:2]),
      logit_scale=rest[-1],
      denominator=denominator,
      direction_weights=loss_cases.WEIGHTS if weighted else None,
      **loss_cases.FORMS[form],
      **options,
    )

  arguments = range(4 if kind == "bank" else 5)
  return jax.jit(jax.value_and_grad(run, argnums=tuple(arguments), has_aux=True))


def _ours(form, denominator, kind, name, scale, weighted):
  case = getattr(loss_cases, name)()
  third = (case.fused,) if kind == "bank" else (case.alpha, case.beta)
  run = _compiled(denominator, kind, name, weighted, form)
  (loss, directions), gradients = run(case.image, case.text, *third, jnp.float32(scale))
  return loss, directions, gradients


@pytest.mark.parametrize("form", loss_cases.FORMS)
@pytest.mark.parametrize(
  ("denominator", "kind"),
  [
    ("self_masked", "bank"),
    ("self_masked", "mix"),
    ("literal", "mix"),
    ("clean", "bank"),
    ("cross_only", "bank"),
    ("target_only", "mix"),
  ],
)
def test_messy_batch_against_the_oracle(denominator, kind, form):
  """Missing modalities, NaN, padding, two id columns, uneven weights; and gradients."""
  arguments = (denominator, kind, "messy", 20, True)
  loss, directions, gradients = _ours(form, *arguments)
  want_loss, want_directions, want_gradients = _reference(*arguments)
  assert error(loss, want_loss) < TOLERANCE
  assert error(directions, want_directions) < TOLERANCE
  for got, want in zip(gradients, want_gradients, strict=True):
    assert error(got, want) < TOLERANCE
    assert not np.any(np.asarray(got)[want == 0]), "an absent entry has a gradient"


@pytest.mark.parametrize("form", loss_cases.FORMS)
@pytest.mark.parametrize("scale", [1, 20, 100])
def test_scales_against_the_oracle(scale, form):
  loss, _, gradients = _ours(form, "self_masked", "bank", "clean", scale, False)
  want_loss, _, want = _reference("self_masked", "bank", "clean", scale, False)
  assert error(loss, want_loss) < TOLERANCE
  for one, other in zip(gradients, want, strict=True):
    assert error(one, other) < TOLERANCE


def test_bfloat16_inputs_are_summed_in_float32():
  case = loss_cases.clean(32, 64)
  image, text, third = (jnp.asarray(x, jnp.bfloat16) for x in case[:3])
  run = jax.jit(
    jax.value_and_grad(
      lambda *x: gcl_loss(*x, third, logit_scale=100.0), argnums=(0, 1), has_aux=True
    )
  )
  (loss, directions), gradients = run(image, text)
  assert loss.dtype == directions.dtype == jnp.float32
  assert {g.dtype for g in gradients} == {jnp.dtype(jnp.bfloat16)}
  wide = [x.astype(jnp.float32) for x in (image, text, third)]
  want, _ = loss_oracle.gcl(*(np.asarray(x, np.float64) for x in wide), 100)
  assert error(loss, want) < TOLERANCE
  _, full = run(*wide[:2])
  for got, exact in zip(gradients, full, strict=True):
    # The softmax weights are rounded to bfloat16's eight bits, and so is the end.
    assert 0 < error(got, exact) <= 2.0**-8


def test_a_mix_of_bfloat16_rows_is_not_rounded():
  case = loss_cases.clean(32, 64)
  rows = [jnp.asarray(x, jnp.bfloat16) for x in case[:2]]
  loss, _ = gcl_loss(*rows, Mix(case.alpha, case.beta), logit_scale=100.0)
  wide = [np.asarray(x, np.float64) for x in (*rows, *case[3:5])]
  want, _ = loss_oracle.gcl(*wide[:2], loss_oracle.mixed(*wide), 100)
  assert error(loss, want) < TOLERANCE


def test_self_masked_is_supcon_over_three_views():
  """Khosla 2020, L_out: instance as class, three views, written over 3N rows."""
  case = loss_cases.clean(9)
  rows = np.concatenate(case[:3]).astype(np.float64)
  label = np.tile(np.arange(9), 3)
  logits = 12 * rows @ rows.T
  np.fill_diagonal(logits, -np.inf)
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  positive = (label[:, None] == label) & ~np.eye(27, dtype=bool)
  want = -np.mean(np.where(positive, log_p, 0).sum(1) / positive.sum(1))
  loss, _ = gcl_loss(*case[:3], logit_scale=12)
  assert loss == pytest.approx(want, rel=1e-6)


def test_contrastive_is_two_cross_entropies_and_target_only_over_two_directions():
  case = loss_cases.clean(9)
  logits = 12 * case.image.astype(np.float64) @ case.text.T
  rows = [
    np.diag(x - np.log(np.exp(x).sum(1, keepdims=True))) for x in (logits, logits.T)
  ]
  loss, directions = contrastive_loss(case.image, case.text, logit_scale=12)
  assert loss == pytest.approx(-np.mean(rows), rel=1e-6)
  only = np.zeros((3, 3))
  only[0, 1] = only[1, 0] = 1
  same, nine = gcl_loss(
    *case[:3], logit_scale=12, denominator="target_only", direction_weights=only
  )
  assert same == pytest.approx(float(loss), rel=1e-6)
  np.testing.assert_allclose(nine * only, directions, rtol=1e-6)
  assert np.count_nonzero(nine) == 6, "directions of weight 0 are reported too"


def test_contrastive_messy_batch_against_the_oracle():
  case = loss_cases.messy()
  image, text, *_ = case.for_oracle()

  def ours(image, text, scale):
    return contrastive_loss(image, text, logit_scale=scale, **case.options)

  (loss, directions), gradients = jax.jit(
    jax.value_and_grad(ours, argnums=(0, 1, 2), has_aux=True)
  )(jnp.asarray(case.image), jnp.asarray(case.text), jnp.float32(20))

  def oracle(image, text, scale):
    return loss_oracle.contrastive(image, text, scale, **case.oracle_options())

  want_loss, want_directions = oracle(image, text, 20.0)
  assert error(loss, want_loss) < TOLERANCE
  assert error(directions, want_directions) < TOLERANCE
  wants = loss_oracle.central_differences(
    lambda *x: oracle(*x)[0], (image, text, np.float64(20))
  )
  for got, want in zip(gradients, wants, strict=True):
    assert error(got, want) < TOLERANCE


def test_a_mix_is_the_bank_that_it_writes_out():
  case = loss_cases.clean()
  bank = loss_oracle.mixed(case.image, case.text, case.alpha, case.beta)
  mixed, _ = gcl_loss(case.image, case.text, Mix(case.alpha, case.beta), logit_scale=20)
  written, _ = gcl_loss(case.image, case.text, bank, logit_scale=20)
  assert mixed == pytest.approx(float(written), rel=1e-6)


@pytest.mark.parametrize("denominator", ["self_masked", "target_only"])
def test_the_order_of_pairs_does_not_matter(denominator):
  case = loss_cases.messy()
  order = np.random.default_rng(3).permutation(8)

  def run(rows):
    options = {name: value[rows] for name, value in case.options.items()}
    return gcl_loss(
      *(x[rows] for x in case[:3]), logit_scale=9, denominator=denominator, **options
    )

  loss, directions = run(np.arange(8))
  shuffled, same = run(order)
  assert shuffled == pytest.approx(float(loss), rel=1e-6)
  np.testing.assert_allclose(same, directions, rtol=1e-5)
