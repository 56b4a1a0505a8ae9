"""LoRA's factors: their shapes, their first values, and the sum with the matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_cases import SMALL

from gcl_jax.errors import UserError
from gcl_jax.models import CLIPConfig, build
from gcl_jax.models.lora import first_factors, lora_shapes, merge_lora

ALL = ("query", "key", "value", "out", "mlp")


def shapes():
  return build(CLIPConfig.from_hf(SMALL)).abstract()


def random_params(tree, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), tree)


def test_factors_stand_beside_the_matrices_that_are_named():
  factors = lora_shapes(shapes(), 4, {"vision": ALL, "text": ("query",)})
  found = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(factors)
  }
  assert len(found) == 2 * (6 + 1)
  assert found["vision/blocks/mlp/fc1/a"] == (2, 48, 4)
  assert found["vision/blocks/mlp/fc1/b"] == (2, 4, 96)
  assert found["text/blocks/attention/query/a"] == (3, 32, 4)


def test_each_layer_gets_the_product_of_its_own_factors():
  base = random_params(shapes())
  tree = lora_shapes(shapes(), 4, {"vision": ("mlp",), "text": ()})
  factors = random_params(tree, seed=1)
  merged = merge_lora({**base, "lora": factors}, 8.0)
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  fc1 = factors["vision"]["blocks"]["mlp"]["fc1"]
  before = base["vision"]["blocks"]["mlp"].pop("fc1")
  after = merged["vision"]["blocks"]["mlp"].pop("fc1")
  assert after["bias"] is before["bias"]
  for layer in range(2):
    product = fc1["a"][layer].astype(np.float64) @ fc1["b"][layer]
    want = before["kernel"][layer] + 8.0 / 4 * product
    np.testing.assert_allclose(after["kernel"][layer], want, rtol=1e-5, atol=1e-5)
  del base["vision"]["blocks"]["mlp"]["fc2"], merged["vision"]["blocks"]["mlp"]["fc2"]
  same = jax.tree.map(lambda a, b: a is b, base, merged)
  assert all(jax.tree.leaves(same))  # nothing else was touched


def test_first_factors_are_seeded_and_change_no_bit():
  base = random_params(shapes())
  tree = lora_shapes(shapes(), 4, {"vision": ALL, "text": ALL})
  factors = first_factors(tree, seed=3)
  merged = merge_lora({**base, "lora": factors}, 16.0)
  jax.tree.map(np.testing.assert_array_equal, merged, base)
  a = factors["vision"]["blocks"]["mlp"]["fc2"]["a"]
  assert a.dtype == np.float32
  assert a.std() == pytest.approx(96**-0.5, rel=0.1)
  again, other = first_factors(tree, seed=3), first_factors(tree, seed=4)
  jax.tree.map(np.testing.assert_array_equal, again, factors)
  assert (other["vision"]["blocks"]["mlp"]["fc2"]["a"] != a).all()


def test_the_gradient_of_the_sum_reaches_both_factors():
  rng = np.random.default_rng(0)
  draw = {"kernel": (2, 5, 6), "a": (2, 5, 3), "b": (2, 3, 6), "cotangent": (2, 5, 6)}
  w, a, b, g = (rng.standard_normal(shape, np.float32) for shape in draw.values())

  def total(factors):
    params = {"vision": {"kernel": w}, "lora": {"vision": factors}}
    return jnp.sum(merge_lora(params, 6.0)["vision"]["kernel"] * g)

  gradient = jax.grad(total)({"a": a, "b": b})
  np.testing.assert_allclose(gradient["a"], 2 * g @ b.swapaxes(1, 2), rtol=1e-5)
  np.testing.assert_allclose(gradient["b"], 2 * a.swapaxes(1, 2) @ g, rtol=1e-5)


def test_parameters_without_factors_are_returned_as_they_are():
  params = {"vision": {"kernel": np.ones(2)}}
  assert merge_lora(params, 16.0) is params


@pytest.mark.parametrize(
  ("rank", "matrices", "message"),
  [
    (4, {"vision": ("fc1",)}, "no matrix 'fc1': name some of query, key, value, out"),
    (
      33,
      {"text": ("out",)},
      "rank is 33, but the text tower's attention/out is 32 x 32",
    ),
    (4, {"vision": (), "text": ()}, "no matrix of a tower that is trained is named"),
  ],
)
def test_what_cannot_be_is_refused(rank, matrices, message):
  with pytest.raises(UserError) as error:
    lora_shapes(shapes(), rank, matrices)
  assert message in str(error.value)
