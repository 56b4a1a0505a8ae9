"""The kernels, interpreted here, against the dense form; and that they lower for a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import loss_cases
import numpy as np
import pytest
from loss_oracle import error

from gcl_jax.fusion import Mix
from gcl_jax.losses import contrastive_loss, gcl_loss, kernels
from gcl_jax.sharding import BATCH_AXES, make_mesh

WIDTH = 16


def _case(rows):
  """Random pairs with shared ids, and pairs that lack an image or a text."""
  rng = np.random.default_rng(3)
  options = {
    "pair_ids": rng.integers(0, rows, (rows, 2)).astype(np.int32),
    "has_text": rng.random(rows) > 0.2,
    "has_image": rng.random(rows) > 0.1,
  }
  return loss_cases.clean(rows, WIDTH)._replace(options=options)


def _run(case, kind, dtype="float32", **options):
  third = (case.fused,) if kind == "bank" else (case.alpha, case.beta)

  def run(image, text, scale, *third):
    fused = third[0] if kind == "bank" else Mix(*third)
    return gcl_loss(image, text, fused, logit_scale=scale, **case.options, **options)[0]

  banks = 2 + (kind == "bank")
  arrays = [jnp.asarray(x) for x in (case.image, case.text, *third)]
  arrays = [x.astype(dtype) if i < banks else x for i, x in enumerate(arrays)]
  arrays.insert(2, jnp.float32(20))
  run = jax.jit(jax.value_and_grad(run, argnums=tuple(range(len(arrays)))))
  return jax.tree.leaves(run(*arrays))


# Two blocks of two squares on and above the diagonal, the last rows padding.
@pytest.mark.parametrize(
  ("kind", "dtype", "limit"), [("mix", "float32", 1e-5), ("mix", "bfloat16", 2e-2)]
)
def test_one_device(kind, dtype, limit):
  case = _case(200)
  want = _run(case, kind, dtype, form="dense")
  got = _run(case, kind, dtype, kernel="pallas", block_size=128)
  assert [x.dtype for x in got] == [x.dtype for x in want]
  for x, y in zip(got, want, strict=True):
    assert error(x, y) <= limit


@pytest.mark.parametrize(
  ("kind", "form", "dtype", "limit"),
  [("bank", "streaming", "float32", 1e-5), ("mix", "ring", "bfloat16", 2e-2)],
)
def test_several_devices(kind, form, dtype, limit):
  mesh = make_mesh(devices=jax.devices()[:2])
  case = _case(160)
  want = _run(case, kind, dtype, form="dense")
  options = {"mesh": mesh, "batch_axes": BATCH_AXES, "form": form, "block_size": 64}
  got = _run(case, kind, dtype, kernel="pallas", **options)
  for x, y in zip(got, want, strict=True):
    assert error(x, y) <= limit


def test_whole_pairs_take_one_exponential():
  case = loss_cases.clean(70, WIDTH)
  arrays = tuple(map(jnp.asarray, (case.image, case.text)))

  def run(**options):
    def loss(image, text, scale):
      return contrastive_loss(image, text, logit_scale=scale, **options)[0]

    value = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return jax.tree.leaves(value(*arrays, jnp.float32(20)))

  want = run(form="dense")
  for x, y in zip(run(kernel="pallas", block_size=128), want, strict=True):
    assert error(x, y) <= 1e-5


def test_what_is_missing_is_masked_before_the_exponential():
  """Anchors at −100 throughout: a missing candidate's exp(0 + 100) is infinite."""
  image = jnp.tile(jnp.eye(WIDTH)[:1], (70, 1))
  there = {"has_image": jnp.arange(70) != 3, "has_text": jnp.arange(70) != 66}

  def run(**options):
    def loss(image, text):
      return contrastive_loss(image, text, logit_scale=100.0, **there, **options)[0]

    value = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return jax.tree.leaves(value(image, -image))

  for x, y in zip(run(kernel="pallas", block_size=64), run(form="dense"), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["mix", "bank"])
def test_they_lower_for_a_gpu(kind, monkeypatch):
  """To Triton's intermediate language, for what no interpreter sees."""
  made = kernels.kernel_tile

  def compiled(*arguments):
    return dataclasses.replace(made(*arguments), interpret=False)

  monkeypatch.setattr(kernels, "kernel_tile", compiled)
  bank = jax.ShapeDtypeStruct((512, 768), jnp.bfloat16)
  weight = jax.ShapeDtypeStruct((512,), jnp.float32)

  def run(image, text, fused, alpha, beta):
    fused = fused if kind == "bank" else Mix(alpha, beta)
    return gcl_loss(image, text, fused, logit_scale=9.0, kernel="pallas")[0]

  step = jax.jit(jax.grad(run, argnums=(0, 1)))
  traced = step.trace(bank, bank, bank, weight, weight)
  lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
  # Forward and backward, on the diagonal and above it; the backward in two versions.
  assert lowered.count("xla.gpu.triton") == 6


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"kernel": "cuda"}, "kernel='cuda' .* is not available: choose from xla, pallas"),
    ({"kernel": "pallas", "form": "dense"}, "the dense form has no tiles"),
    ({"kernel": "pallas"}, "a multiple of 16 numbers, not of 4"),
  ],
)
def test_what_is_refused(options, message):
  case = loss_cases.clean()
  with pytest.raises(ValueError, match=message):
    gcl_loss(*case[:3], logit_scale=1.0, **options)
