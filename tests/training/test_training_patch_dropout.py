"""Which patches are dropped, and that neither devices nor microbatches move the draw."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import objective_cases as cases

from gcl_jax.sharding import put_batch
from gcl_jax.training.config import default_config
from gcl_jax.training.patch_dropout import kept_count, kept_patches
from gcl_jax.training.run import _rows
from gcl_jax.training.state import place_parameters

PATCHES, DROPOUT = 16, 0.5


@functools.partial(jax.jit, static_argnames="seed")
def draw(step, places, seed=0):
  return kept_patches(seed, step, places, PATCHES, DROPOUT)


def test_distinct_patches_uniformly_drawn_by_place_step_and_seed():
  places = jnp.arange(2000, dtype=jnp.int32)
  kept = np.asarray(draw(3, places))
  assert kept.shape == (2000, 8)
  assert kept.min() == 0 and kept.max() == PATCHES - 1
  assert all(len(set(row)) == 8 for row in kept)
  counts = np.bincount(kept.ravel(), minlength=PATCHES)
  # A thousand each, give or take five deviations of sqrt(2000 / 4).
  assert np.abs(counts - 1000).max() < 5 * 500**0.5
  together = [len(set(a) & set(b)) for a, b in itertools.pairwise(kept)]
  assert 3.8 < np.mean(together) < 4.2  # of 8 in 16: neighbours are independent
  # A row's patches are its own, whoever holds it and beside whom.
  order = np.random.default_rng(0).permutation(2000)
  np.testing.assert_array_equal(draw(3, places[order]), kept[order])
  assert (np.asarray(draw(4, places)) != kept).any(axis=1).mean() > 0.99
  assert (np.asarray(draw(3, places, seed=1)) != kept).any(axis=1).mean() > 0.99


def test_at_least_one_patch_is_kept():
  assert [kept_count(49, dropout) for dropout in (0.0, 0.5, 0.75, 0.999)] == [
    49,
    24,
    12,
    1,
  ]


def gradient(devices, microbatches, dropout=DROPOUT):
  """step -> loss and gradients."""
  config = default_config()
  config.model.patch_dropout, config.microbatches = dropout, microbatches
  config.loss.form = "dense"
  objective, mesh = cases.objective(config, devices)
  params = place_parameters(cases.params(), mesh)
  rows = put_batch(mesh, cases.batch(32))
  run = jax.jit(jax.value_and_grad(objective, has_aux=True))
  return lambda step: run(params, rows, {"step": jnp.int32(step)})


def test_devices_and_microbatches_change_nothing():
  one, eight = gradient(1, 1), gradient(8, 2)
  ((loss, _), want), ((same, _), got) = one(5), eight(5)
  np.testing.assert_allclose(same, loss, rtol=1e-6)
  cases.assert_near(got, want)
  (other, _), _ = one(6)
  assert abs(float(other) - float(loss)) > 1e-4  # another step, other patches


def test_rows_are_told_their_place_in_the_global_batch():
  config = default_config()
  rows = {**cases.batch(4), "index": np.arange(4)}
  del rows["place"]
  ours = np.array([4, 5, 6, 7])
  assert "place" not in _rows(rows, None, config, ours)
  config.model.patch_dropout = 0.5
  place = _rows(rows, None, config, ours)["place"]
  np.testing.assert_array_equal(place, ours)
  assert place.dtype == np.int32
