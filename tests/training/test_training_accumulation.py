"""Gradients of parts, averaged: each part's loss is its own, wherever its rows lie."""

import jax
import numpy as np
import objective_cases as cases

from gcl_jax.sharding import make_mesh
from gcl_jax.training.accumulation import over_parts, put_parts
from gcl_jax.training.config import default_config
from gcl_jax.training.state import place_parameters

ROWS, PARTS = 64, 4
NOT_FROZEN = jax.tree.map(lambda _: False, cases.params())


def value_and_grad(devices):
  config = default_config()
  config.loss.form = "dense"
  objective, mesh = cases.objective(config, devices)
  return jax.value_and_grad(objective, has_aux=True), mesh


def test_it_is_the_mean_over_consecutive_parts_on_any_devices():
  run, mesh = value_and_grad(1)
  run = jax.jit(run)
  rows = cases.batch(ROWS)
  found = [
    run(cases.params(), {name: x[start : start + 16] for name, x in rows.items()}, {})
    for start in range(0, ROWS, 16)
  ]
  eight, mesh = value_and_grad(8)
  (loss, metrics), grads = jax.jit(over_parts(eight, PARTS, NOT_FROZEN))(
    place_parameters(cases.params(), mesh), put_parts(mesh, rows, PARTS), {}
  )
  losses = [float(value) for (value, _), _ in found]
  assert np.ptp(losses) > 0.01  # so that a mean over other parts would show
  np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-6)
  for name, value in metrics.items():
    combine = np.max if name == "fusion/largest_weight" else np.mean
    want = combine([float(each[name]) for (_, each), _ in found])
    np.testing.assert_allclose(value, want, rtol=1e-5, err_msg=name)
  cases.assert_near(
    grads, jax.tree.map(lambda *parts: np.mean(parts, axis=0), *[g for _, g in found])
  )


def test_a_part_is_split_over_all_devices():
  placed = put_parts(make_mesh(), {"place": np.arange(ROWS, dtype=np.int32)}, PARTS)
  np.testing.assert_array_equal(placed["place"], np.arange(ROWS).reshape(PARTS, 16))
  assert {shard.data.shape for shard in placed["place"].addressable_shards} == {(4, 2)}


def test_no_sum_is_kept_for_what_is_frozen():
  frozen = {**NOT_FROZEN, "text": {"token_embedding": {"embedding": True}}}

  def gradient(params, batch, constants):
    del constants
    grads = jax.tree.map(lambda p: p * 0 + batch["x"][0], params)
    grads["text"] = jax.tree.map(lambda p: p * 0, params["text"])
    return (batch["x"].sum(), {}), grads

  batch = {"x": np.float32([[1], [2], [6]])}
  traced = jax.make_jaxpr(over_parts(gradient, 3, frozen))(cases.params(), batch, {})
  (scan,) = [e for e in traced.eqns if e.primitive.name == "scan"]
  assert scan.params["num_carry"] == 2  # of the three parameters
  _, grads = over_parts(gradient, 3, frozen)(cases.params(), batch, {})
  np.testing.assert_allclose(grads["vision"]["patch_embedding"]["kernel"], 3.0)
  words = grads["text"]["token_embedding"]["embedding"]
  np.testing.assert_array_equal(words, np.zeros((50, 6)))


def test_one_part_is_the_batch_as_it_was():
  marker = object()
  assert over_parts(marker, 1, NOT_FROZEN) is marker
  placed = put_parts(make_mesh(), {"place": np.arange(16)}, 1)
  assert placed["place"].shape == (16,)
