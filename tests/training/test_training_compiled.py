"""What is known of a step before it runs, and the share of the best that it reaches."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcl_jax.models import CLIPConfig, build, named_config
from gcl_jax.sharding import make_mesh
from gcl_jax.training.chips import chip_of
from gcl_jax.training.compiled import CompiledStep, Meter, report_step
from gcl_jax.training.flops import multiply_adds, pair_flops


def test_a_step_is_compiled_once_a_shape_and_reported_once():
  traced, reported = [], []

  def step(state, batch, constants):
    traced.append(batch["tokens"].shape)
    return state + batch["tokens"].sum(), {}

  compiled = CompiledStep(
    jax.jit(step), lambda program, seconds: reported.append(seconds)
  )
  state = jnp.int32(0)
  for width in (3, 5, 3):
    state, _ = compiled(state, {"tokens": jnp.ones((2, width), jnp.int32)}, {})
  assert traced == [(2, 3), (2, 5)]
  assert int(state) == 22
  assert len(reported) == 1
  assert compiled.compile_seconds > reported[0] > 0


# GFLOP of one forward pass: research on these shapes counts the same products.
@pytest.mark.parametrize(
  ("name", "giga"),
  [("ViT-B/32", 14.78), ("ViT-L/14", 175.33), ("TinyCLIP-ViT-8M-16-Text-3M", 3.96)],
)
def test_a_pair_costs_what_is_published(name, giga):
  model = build(CLIPConfig.from_hf(named_config(name).to_hf()))
  assert pair_flops(model, 77) / 3e9 == pytest.approx(giga, abs=0.006)
  assert pair_flops(model, 32) < pair_flops(model, 77)


def test_what_training_does_not_compute_does_not_count():
  model = build(CLIPConfig.from_hf(named_config("ViT-B/32").to_hf()))
  whole = pair_flops(model, 77)
  image, text = 3 * 8.82e9, 3 * 5.96e9
  assert pair_flops(model, 77, locked="image") == pytest.approx(image / 3 + text, 1e-3)
  assert pair_flops(model, 77, locked="text") == pytest.approx(image + text / 3, 1e-3)
  dropped = pair_flops(model, 77, patch_dropout=0.5)
  assert text + 0.45 * image < dropped < text + 0.6 * image < whole


def test_loops_branches_and_devices_are_counted():
  mesh = make_mesh()
  square = jnp.ones((4, 4))

  def loop(x):
    return jax.lax.scan(lambda c, _: (c @ c, None), x, length=3)[0]

  def branch(x):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x)

  sharded = jax.shard_map(
    lambda x: x @ x.T,
    mesh=mesh,
    in_specs=jax.P("data"),
    out_specs=jax.P("data"),
  )
  assert multiply_adds(loop, square) == 3 * 64
  assert multiply_adds(branch, square) == 2 * 64
  assert multiply_adds(sharded, jnp.ones((16, 4))) == 8 * (2 * 2 * 4)
  assert multiply_adds(jax.checkpoint(loop), square) == 3 * 64
  assert (
    multiply_adds(lambda x: jnp.einsum("abc,dc->abd", x, square), np.ones((2, 3, 4)))
    == 96
  )


def test_utilization_is_of_all_devices_and_of_the_width():
  model = build(CLIPConfig.from_hf(named_config("ViT-B/32").to_hf()))
  mesh = types.SimpleNamespace(
    size=4, devices=np.array([types.SimpleNamespace(device_kind="TPU v5 lite")])
  )
  meter = Meter(model, mesh, pairs=1000)
  meter.add({"tokens": np.zeros((1000, 77))})
  meter.add({"tokens": np.zeros((1000, 32))})
  done = 1000 * (pair_flops(model, 77) + pair_flops(model, 32))
  assert meter.utilization(0.5) == {"mfu": pytest.approx(done / 0.5 / (4 * 197e12))}
  assert meter.utilization(0.5) == {"mfu": 0.0}
  assert Meter(model, make_mesh(), 8).utilization(1.0) == {}


@pytest.mark.parametrize(
  ("kind", "tera"),
  [("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v6 lite", 918), ("NVIDIA H200", 989)],
)
def test_chips_are_known_by_their_kind(kind, tera):
  assert chip_of(kind).flops == tera * 1e12


def test_what_is_said_of_a_compiled_step(capsys):
  memory = types.SimpleNamespace(
    argument_size_in_bytes=2_000_000_000, temp_size_in_bytes=500_000_000
  )
  compiled = types.SimpleNamespace(memory_analysis=lambda: memory)
  model = build(CLIPConfig.from_hf(named_config("ViT-B/32").to_hf()))
  mesh = make_mesh()
  report_step(Meter(model, mesh, 8), mesh, 77)(compiled, 3.2)
  assert capsys.readouterr().err == (
    "step compiled in 3 s; a device holds 2.00 GB of state and batch and 0.50 GB of "
    "temporaries; 44.33 GFLOP a pair of 77 tokens; no MFU: the best of a cpu is not "
    "known\n"
  )
