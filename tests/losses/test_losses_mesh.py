"""The losses over eight devices: the global batch's value and gradients."""

import os
import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import loss_cases
import loss_oracle
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from loss_oracle import DENOMINATORS, error

from gcl_jax.fusion import Mix
from gcl_jax.losses import contrastive_loss, gcl_loss, intra_modal_separation_loss

AXES = ("data", "fsdp", "tensor")


def _mesh(*shape):
  devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
  return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def _run(
  case, kind, mesh, denominator, form, scales, place=lambda x: x, dtype="float32"
):
  """Loss, directions and gradients at each of the scales."""
  third = (case.fused,) if kind == "bank" else (case.alpha, case.beta)
  options = jax.tree.map(lambda x: place(jnp.asarray(x)), case.options)

  def run(image, text, *rest):
    return gcl_loss(
      image,
      text,
      rest[0] if kind == "bank" else Mix(*rest[:2]),
      logit_scale=rest[-1],
      denominator=denominator,
      direction_weights=loss_cases.WEIGHTS,
      mesh=mesh,
      batch_axes=("data", "fsdp"),
      form=form,
      block_size=None if form == "dense" else 2,
      **options,
    )

  arrays = [place(jnp.asarray(x)) for x in (case.image, case.text, *third)]
  arrays = [x.astype(dtype) if x.ndim == 2 else x for x in arrays]
  places = tuple(range(len(arrays) + 1))
  run = jax.jit(jax.value_and_grad(run, argnums=places, has_aux=True))
  for scale in scales:
    (loss, directions), gradients = run(*arrays, jnp.float32(scale))
    yield [loss, directions, *gradients]


def _collectives(form, kind):
  """StableHLO's collectives of value and gradient on 8 devices, and those of the value."""
  n, width, mesh = 48, 5, _mesh(8, 1, 1)
  split = NamedSharding(mesh, P("data"))

  def array(shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=split)

  third = (array((n, width)),) if kind == "bank" else (array((n,)), array((n,)))

  def run(image, text, scale, has_text, ids, *third):
    return gcl_loss(
      image,
      text,
      third[0] if kind == "bank" else Mix(*third),
      logit_scale=scale,
      has_text=has_text,
      pair_ids=ids,
      mesh=mesh,
      form=form,
    )[0]

  arrays = (
    array((n, width)),
    array((n, width)),
    jax.ShapeDtypeStruct((), "float32"),
    array((n,), "bool"),
    array((n, 2), "int32"),
    *third,
  )
  differentiable = (0, 1, 2, *range(5, len(arrays)))
  both = jax.jit(jax.value_and_grad(run, argnums=differentiable)).lower(*arrays)
  return _count(both.as_text()), _count(jax.jit(run).lower(*arrays).as_text()), both


def _count(text):
  found = re.findall(
    r"stablehlo\.(all_gather|all_reduce|reduce_scatter|collective_permute)", text
  )
  return dict(Counter(found))


@pytest.mark.parametrize("kind", ["bank", "mix"])
def test_gathered_once_and_reduced_once(kind):
  """All gathers in the forward; a sum of 18 floats there, of one in the backward."""
  both, value, lowered = _collectives("streaming", kind)
  # image, text, fused (or alpha and beta), ids, presence; then lse and its cotangent,
  # which the value alone does not need.
  banks = 3 if kind == "bank" else 4
  assert value == {"all_gather": banks + 2, "all_reduce": 1}
  assert both == {"all_gather": banks + 4, "all_reduce": 2}
  reduced = re.findall(
    r"all_reduce.*?-> tensor<([^>]*)>", lowered.as_text(), flags=re.DOTALL
  )
  assert sorted(reduced) == ["2x3x3xf32", "f32"]
  compiled = lowered.compile().as_text()
  assert not re.search(r"reduce-scatter|all-to-all|collective-permute", compiled)


@pytest.mark.parametrize("kind", ["bank", "mix"])
def test_a_ring_gathers_nothing(kind):
  both, value, _ = _collectives("ring", kind)
  guests = (3 if kind == "bank" else 4) + 2
  assert value == {"collective_permute": guests, "all_reduce": 1}
  # Sent round once more, with the log-sum-exps and their cotangents.
  assert both == {"collective_permute": 2 * guests + 2, "all_reduce": 2}


def _reference(case, kind, denominator, scale=20):
  image, text, fused, alpha, beta = case.for_oracle()
  oracle = loss_oracle.gcl_function(
    16, denominator, loss_cases.WEIGHTS, **case.oracle_options()
  )

  def run(image, text, *rest):
    bank = rest[0] if kind == "bank" else loss_oracle.mixed(image, text, *rest[:2])
    return oracle(image, text, bank, rest[-1])

  third = (fused,) if kind == "bank" else (alpha, beta)
  arrays = (image, text, *third, np.float64(scale))
  gradients = loss_oracle.central_differences(lambda *x: run(*x)[0], arrays)
  return [*run(*arrays), *gradients]


@pytest.mark.parametrize(
  ("denominator", "kind", "shape", "sharded", "form", "scale"),
  [
    ("self_masked", "bank", (8, 1, 1), True, "dense", 20),
    ("self_masked", "bank", (4, 1, 1), True, "streaming", 1),
    ("self_masked", "mix", (8, 1, 1), True, "streaming", 20),
    ("self_masked", "mix", (2, 1, 1), True, "ring", 100),
    ("literal", "bank", (2, 2, 2), True, "ring", 1),
    ("literal", "mix", (1, 1, 8), True, "streaming", 100),
    ("clean", "mix", (2, 4, 1), True, "streaming", 100),
    ("clean", "bank", (2, 4, 1), True, "dense", 1),
    ("cross_only", "mix", (4, 2, 1), False, "ring", 20),
    ("cross_only", "bank", (1, 2, 1), False, "streaming", 100),
    ("target_only", "bank", (4, 2, 1), True, "streaming", 100),
    ("target_only", "mix", (8, 1, 1), True, "ring", 1),
  ],
)
def test_devices_agree_with_the_float64_oracle(
  denominator, kind, shape, sharded, form, scale
):
  case = loss_cases.sixteen()
  mesh = _mesh(*shape)
  sharding = NamedSharding(mesh, P(("data", "fsdp")))
  place = (lambda x: jax.device_put(x, sharding)) if sharded else (lambda x: x)
  (many,) = _run(case, kind, mesh, denominator, form, [scale], place)
  for got, want in zip(many, _reference(case, kind, denominator, scale), strict=True):
    assert error(got, want) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 4, 1)])
@pytest.mark.parametrize("form", ["streaming", "ring"])
@pytest.mark.parametrize("kind", ["bank", "mix"])
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_every_scale_and_type_on_every_number_of_devices(
  denominator, kind, form, shape
):
  mesh, scales = _mesh(*shape), (1, 20, 100)
  case = loss_cases.sixteen()
  banks = (x.astype(jnp.bfloat16).astype(np.float32) for x in case[:3])
  rounded = case._replace(**dict(zip(case._fields, banks, strict=False)))
  for of, dtype, limit in ((case, "float32", 1e-5), (rounded, "bfloat16", 2e-2)):
    many = _run(of, kind, mesh, denominator, form, scales, dtype=dtype)
    # The dense form's own error on these inputs, where it is the larger one.
    alone = _run(of, kind, None, denominator, "dense", scales)
    for scale, made, dense in zip(scales, many, alone, strict=True):
      wants = _reference(of, kind, denominator, scale)
      for got, other, want in zip(made, dense, wants, strict=True):
        assert error(got, want) <= max(limit, 2 * error(other, want)), (dtype, scale)


def test_two_processes_of_two_devices_agree_with_the_float64_oracle(tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
  script = Path(__file__).with_name("process_of_two.py")
  root = str(script.parents[2])
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
  processes = [
    subprocess.Popen(
      [sys.executable, str(script), port, str(number), str(tmp_path)],
      env={**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
      | {"XLA_FLAGS": flags},
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  errors = [process.communicate(timeout=180)[1] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
  wants = _reference(loss_cases.sixteen(), "mix", "self_masked")
  for form in ("streaming", "ring"):
    with np.load(tmp_path / f"{form}.npz") as saved:
      made = [saved[f"arr_{i}"] for i in range(len(wants))]
    for got, want in zip(made, wants, strict=True):
      assert error(got, want) <= 1e-5


def test_without_an_outer_jit():
  case = loss_cases.clean(8)
  alone, nine = gcl_loss(*case[:3], logit_scale=20.0)
  many, same = gcl_loss(*case[:3], logit_scale=20.0, mesh=_mesh(8, 1, 1))
  assert many == pytest.approx(float(alone), rel=1e-6)
  np.testing.assert_allclose(same, nine, rtol=1e-6)


@pytest.mark.parametrize("form", ["dense", "streaming", "ring"])
@pytest.mark.parametrize("name", ["contrastive", "separation"])
def test_the_other_losses_agree_with_the_float64_oracle(name, form):
  case = loss_cases.sixteen()
  features = np.random.default_rng(5).normal(size=(16, 3)).astype(np.float32)
  features[~case.options["has_text"]] = np.nan

  def run(image, text, scale):
    options = {"logit_scale": scale, "mesh": _mesh(8, 1, 1), **case.options}
    options["form"] = form
    if name == "contrastive":
      return contrastive_loss(image, text, **options)[0]
    return intra_modal_separation_loss(image, text, features, **options)

  def oracle(image, text, scale):
    options = case.oracle_options()
    if name == "contrastive":
      return loss_oracle.contrastive(image, text, scale, **options)[0]
    return loss_oracle.separation(image, text, features, scale, **options)

  loss, gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))(
    case.image, case.text, jnp.float32(20)
  )
  arrays = (*case.for_oracle()[:2], np.float64(20))
  assert error(loss, oracle(*arrays)) <= 1e-5
  wants = loss_oracle.central_differences(oracle, arrays)
  for got, want in zip(gradients, wants, strict=True):
    assert error(got, want) <= 1e-5


def test_a_device_holds_the_logits_of_its_own_rows_only():
  n, width, mesh = 48, 5, _mesh(8, 1, 1)
  sharding = NamedSharding(mesh, P("data"))
  bank = jax.ShapeDtypeStruct((n, width), jnp.float32, sharding=sharding)

  def run(image, text, fused):
    return gcl_loss(image, text, fused, logit_scale=20.0, mesh=mesh, form="dense")[0]

  lowered = jax.jit(jax.grad(run, argnums=(0, 1, 2))).lower(bank, bank, bank)
  text = lowered.compile().as_text()
  assert "[6,48]" in text
  assert not re.search(r"\[(48|144),(48|144)", text)
  written = lowered.as_text()
  assert "stablehlo.all_gather" in written
  assert "stablehlo.reduce_scatter" in written


@pytest.mark.parametrize(
  ("n", "axes", "message"),
  [
    (12, ("data",), "12 pairs are not divisible over 8 devices"),
    (8, ("batch",), "the mesh has axes"),
    (8, (), "the mesh has axes"),
  ],
)
def test_a_mesh_that_does_not_fit(n, axes, message):
  case = loss_cases.clean(n)
  with pytest.raises(ValueError, match=message):
    gcl_loss(*case[:3], logit_scale=20.0, mesh=_mesh(8, 1, 1), batch_axes=axes)


def test_explicit_axes_are_refused():
  mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Explicit,))
  case = loss_cases.clean(8)
  with pytest.raises(ValueError, match=r"AxisType\.Auto"):
    gcl_loss(*case[:3], logit_scale=20.0, mesh=mesh)


@pytest.mark.parametrize("form", ["streaming", "dense"])
def test_inside_a_shard_map_of_the_callers_negatives_are_local(form):
  case, mesh = loss_cases.clean(16), _mesh(8, 1, 1)

  def local(image, text, alpha, beta, scale):
    options = {"logit_scale": scale, "form": form, "block_size": 1}
    loss = gcl_loss(image, text, Mix(alpha, beta), **options)[0]
    return jax.lax.pmean(loss, "data")

  rows = (P("data"),) * 4
  mapped = jax.shard_map(local, mesh=mesh, in_specs=(*rows, P()), out_specs=P())

  def one_by_one(*arrays):
    parts = [
      gcl_loss(
        *(x[i : i + 2] for x in arrays[:2]),
        Mix(*(x[i : i + 2] for x in arrays[2:4])),
        logit_scale=arrays[4],
        form="dense",
      )[0]
      for i in range(0, 16, 2)
    ]
    return sum(parts) / 8

  arrays = (case.image, case.text, case.alpha, case.beta, jnp.float32(20))
  arrays = tuple(map(jnp.asarray, arrays))
  got = jax.jit(jax.value_and_grad(mapped, argnums=range(5)))(*arrays)
  want = jax.jit(jax.value_and_grad(one_by_one, argnums=range(5)))(*arrays)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert error(x, y) <= 1e-5


def test_every_denominator_is_tested_over_devices():
  marks = test_devices_agree_with_the_float64_oracle.pytestmark
  assert {case[0] for case in marks[0].args[1]} == set(DENOMINATORS)
