"""First values: what each path gets, whatever the devices and the fusion."""

from __future__ import annotations

import clip_cases as cases
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gcl_jax.fusion import FusionSettings
from gcl_jax.models import CLIPConfig, build
from gcl_jax.models.initial import initial_params
from gcl_jax.sharding import make_mesh, map_with_path


@pytest.fixture(scope="module")
def model():
  return build(CLIPConfig.from_hf(cases.SMALL))


@pytest.fixture(scope="module")
def params(model):
  return jax.jit(model.init)(jax.random.key(0))


def _assert_same_draw(ours, expected):
  # Another program may round the same numbers another way.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), ours, expected
  )


def test_every_deviation_is_transformers(params):
  # Of the modules that transformers itself has just drawn, layers taken together.
  theirs = cases.our_params(
    cases.torch_model(cases.SMALL), CLIPConfig.from_hf(cases.SMALL)
  )
  compared = []

  def compare(path, ours, drawn):
    if drawn.ndim > 1 and "bias" not in path and "scale" not in path:
      assert ours.std() == pytest.approx(drawn.std(), rel=6 / drawn.size**0.5), path
      assert abs(ours.mean()) < 5 * ours.std() / ours.size**0.5, path
      compared.append(path)

  paths = map_with_path(lambda path, _: path, params)
  jax.tree.map(compare, paths, params, theirs)
  assert len(compared) == 18


def test_no_number_is_used_twice(params):
  starts = set()
  large = [np.ravel(leaf) for leaf in jax.tree.leaves(params) if np.std(leaf) > 0]
  for leaf in large:
    ratios = leaf[1:] / leaf[:-1]  # whatever the deviation
    starts |= set(zip(ratios.tolist(), ratios[1:].tolist(), strict=False))
  assert len(starts) > 0.999 * sum(leaf.size - 2 for leaf in large)


def test_born_split_over_a_mesh_it_is_the_same(model, params):
  mesh = make_mesh(data=4, fsdp=2)
  specs = jax.tree.map(
    lambda leaf: NamedSharding(mesh, P(None, "fsdp") if leaf.ndim == 3 else P()),
    model.abstract(),
  )
  split = jax.jit(model.init, out_shardings=specs)(jax.random.key(0))
  kernel = split["vision"]["blocks"]["mlp"]["fc1"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 24, 96)
  _assert_same_draw(split, params)


def test_learned_fusion_weights_change_no_other_value(params):
  settings = FusionSettings(image_weight=0.5, text_weight=2.0, learned=True)
  model = build(CLIPConfig.from_hf(cases.SMALL), fusion=settings)
  learned = jax.jit(model.init)(jax.random.key(0))
  weights = {name: float(value) for name, value in learned.pop("fusion").items()}
  assert weights == {"image_weight": 0.5, "text_weight": 2.0}
  _assert_same_draw(learned, params)


def test_a_parameter_without_a_rule_is_our_bug(model):
  shapes = {
    **model.abstract(),
    "head": {"weight": jax.ShapeDtypeStruct((2,), "float32")},
  }
  with pytest.raises(ValueError, match="head/weight"):
    jax.eval_shape(
      lambda key: initial_params(model.config, model.fusion, shapes, key),
      jax.random.key(0),
    )
