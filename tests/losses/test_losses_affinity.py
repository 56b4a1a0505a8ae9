"""Affinity mimicking against its formula, its oracle, a mesh, and what it never holds."""

import jax
import jax.numpy as jnp
import loss_cases
import loss_oracle
import numpy as np
import pytest
from loss_oracle import error, unit

from gcl_jax.fusion import Mix
from gcl_jax.losses import affinity_loss
from gcl_jax.sharding import batch_sharding, make_mesh

TOLERANCE = 1e-5
WEIGHTS = np.array([[9, 1, 0.5], [2, np.inf, 0], [0.25, 3, -4]], np.float32)


def teacher_of(case, width=7):
  """Three banks of another width; NaN where the case has nothing."""
  rng = np.random.default_rng(11)
  banks = [unit(rng.normal(size=(len(case.image), width))) for _ in range(3)]
  has_image = case.options.get("has_image", True)
  has_text = case.options.get("has_text", True)
  for bank, there in zip(
    banks, (has_image, has_text, has_image & has_text), strict=True
  ):
    bank[~np.broadcast_to(there, len(bank))] = np.nan
  return [bank.astype(np.float32) for bank in banks]


def options_of(case):
  return {k: v for k, v in case.options.items() if k != "pair_ids"}


def run(case, kind, scale, place=lambda x: x, **options):
  """Loss, directions and gradients of the embeddings and the scale."""
  third = (case.fused,) if kind == "bank" else (case.alpha, case.beta)
  teacher = [place(jnp.asarray(x)) for x in teacher_of(case)]
  present = {k: place(jnp.asarray(v)) for k, v in options_of(case).items()}

  def ours(image, text, *rest):
    fused = rest[0] if kind == "bank" else Mix(*rest[:2])
    return affinity_loss(
      image,
      text,
      fused,
      *teacher,
      logit_scale=rest[-1],
      teacher_scale=15.0,
      direction_weights=WEIGHTS,
      **present,
      **options,
    )

  arrays = [place(jnp.asarray(x)) for x in (case.image, case.text, *third)]
  places = tuple(range(len(arrays) + 1))
  function = jax.jit(jax.value_and_grad(ours, argnums=places, has_aux=True))
  (loss, directions), gradients = function(*arrays, jnp.float32(scale))
  return [loss, directions, *gradients]


@pytest.mark.parametrize("kind", ["bank", "mix"])
@pytest.mark.parametrize("form", loss_cases.FORMS)
@pytest.mark.parametrize("name", ["clean", "messy"])
def test_value_and_gradients_against_the_oracle(name, form, kind):
  case = getattr(loss_cases, name)()
  loss, directions, *gradients = run(case, kind, 20.0, **loss_cases.FORMS[form])
  image, text, fused, alpha, beta = case.for_oracle()
  teacher = [np.nan_to_num(x.astype(np.float64)) for x in teacher_of(case)]
  who = options_of(case)

  def oracle(image, text, *rest):
    fused = rest[0] if kind == "bank" else loss_oracle.mixed(image, text, *rest[:2])
    return loss_oracle.affinity(
      (image, text, fused), teacher, rest[-1], 15.0, WEIGHTS, **who
    )

  third = (fused,) if kind == "bank" else (alpha, beta)
  arrays = (image, text, *third, np.float64(20))
  want, wanted_directions = oracle(*arrays)
  assert error(loss, want) < TOLERANCE
  assert error(directions, wanted_directions) < TOLERANCE
  wants = loss_oracle.central_differences(lambda *x: oracle(*x)[0], arrays)
  for got, want in zip(gradients, wants, strict=True):
    assert error(got, want) < TOLERANCE
    assert not np.any(np.asarray(got)[want == 0])


def test_two_pairs_by_hand():
  """The student knows nothing, so it pays ln 2, whatever the teacher thinks."""
  student = np.array([[1, 0], [1, 0]], np.float32)
  teacher = np.eye(2, dtype=np.float32)
  loss, directions = affinity_loss(
    *(student,) * 3, *(teacher,) * 3, logit_scale=3.0, teacher_scale=2.0
  )
  assert loss == pytest.approx(np.log(2), rel=1e-6)
  np.testing.assert_allclose(directions, np.log(2) * (1 - np.eye(3)), rtol=1e-6)
  # The teacher's own affinities cost their entropy, and nothing is to be learned.
  chance = 1 / (1 + np.exp(-2.0))
  entropy = -chance * np.log(chance) - (1 - chance) * np.log(1 - chance)

  def own(bank):
    return affinity_loss(
      *(bank,) * 3, *(teacher,) * 3, logit_scale=2.0, teacher_scale=2.0
    )[0]

  loss, gradient = jax.value_and_grad(own)(jnp.asarray(teacher))
  assert loss == pytest.approx(entropy, rel=1e-6)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_the_teacher_is_frozen():
  case = loss_cases.clean()
  banks = (case.image, case.text, case.fused)

  def of_teacher(*teacher):
    return affinity_loss(*banks, *teacher, logit_scale=9.0, teacher_scale=9.0)[0]

  for gradient in jax.grad(of_teacher, argnums=(0, 1, 2))(*banks):
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("form", ["dense", "streaming", "ring"])
@pytest.mark.parametrize("kind", ["bank", "mix"])
def test_eight_devices_are_one(form, kind):
  case = loss_cases.sixteen()
  want = run(case, kind, 100.0, form="dense")
  mesh = make_mesh(data=4, fsdp=2)
  got = run(
    case,
    kind,
    100.0,
    place=lambda x: jax.device_put(x, batch_sharding(mesh)),
    mesh=mesh,
    batch_axes=("data", "fsdp"),
    form=form,
    block_size=None if form == "dense" else 3,
  )
  for x, y in zip(got, want, strict=True):
    assert error(x, y) < TOLERANCE


def test_no_affinity_is_materialised():
  rows = 256
  bank = jax.ShapeDtypeStruct((rows, 8), jnp.float32)

  def both(*banks):
    return affinity_loss(*banks, logit_scale=9.0, teacher_scale=9.0, block_size=16)[0]

  text = jax.jit(jax.value_and_grad(both)).lower(*(bank,) * 6).as_text()
  assert f"{rows}x{rows}x" not in text
  assert "16x16x" in text


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"teacher_image": np.ones((5, 4))}, "teacher_image"),
    ({"teacher_text": np.ones((6, 3))}, r"teacher_text has shape \(6, 3\)"),
    ({"direction_weights": np.ones(3)}, "direction_weights"),
    ({"teacher_scale": np.ones(2)}, "teacher_scale"),
    ({"form": "sparse"}, "form"),
  ],
)
def test_what_does_not_fit_is_refused(change, message):
  case = loss_cases.clean()
  given = {
    "teacher_image": case.image,
    "teacher_text": case.text,
    "teacher_fused": case.fused,
    "teacher_scale": 9.0,
  }
  with pytest.raises(ValueError, match=message):
    affinity_loss(
      case.image, case.text, case.fused, **{**given, **change}, logit_scale=9.0
    )
