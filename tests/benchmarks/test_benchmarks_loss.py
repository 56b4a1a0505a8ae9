"""The loss benchmark: what it counts, what it times, and that the dense form is ours."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import loss
from gcl_jax.fusion import fuse
from gcl_jax.losses import gcl_loss


def test_the_dense_form_is_the_same_loss():
  image, text, mix, scale = loss._arguments(12, 8, "float32", None)
  want, _ = gcl_loss(image, text, mix, logit_scale=scale)
  got = loss.dense(image, text, fuse(image, text, mix), scale)
  assert got == pytest.approx(float(want), rel=1e-6)


def test_work_is_that_of_the_equations():
  n, d = 4096, 512
  assert loss.work("dense", n, d, 512, 1) == (27 * n * n * d, 18 * n * n)
  products, exponentials = loss.work("streaming", n, d, 64, 1)
  # Towards small blocks: 8 D products and 13.5 exponentials a pair of pairs.
  assert products == pytest.approx(8 * n * n * d, rel=0.01)
  assert exponentials == pytest.approx(13.5 * n * n, rel=0.01)
  assert loss.work("streaming", n, d, 512, 8)[0] == 12 * n * n * d
  assert loss.work("streaming_banks", n, d, 512, 8)[0] == 27 * n * n * d


def test_rows(capsys):
  rows = loss.measure(64, 8, loss.FORMS, repeats=1, block_size=8)
  forms = [row["form"] for row in rows]
  assert forms == ["dense", "streaming", "streaming_banks", "ring"]
  for row in json.loads(json.dumps(rows)):
    assert row["n"] == 64 and row["devices"] == jax.device_count() == 8
    assert row["ms"] > 0 and row["temp_bytes"] > 0 and row["ratio_to"] == "dense"
  assert rows[0]["ratio"] == 1
  assert len(loss.table(rows).splitlines()) == 6


def test_gradients_reach_the_mix():
  image, text, mix, scale = loss._arguments(8, 4, "float32", None)
  run = jax.grad(lambda mix: loss.FORMS["dense"](image, text, mix, scale))
  assert all(jnp.any(x != 0) for x in run(mix))
