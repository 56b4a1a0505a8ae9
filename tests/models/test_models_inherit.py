"""A small CLIP cut out of a larger one, against the rule on Hugging Face's own arrays."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from gcl_jax.errors import UserError
from gcl_jax.models import CLIPConfig, build
from gcl_jax.models.convert import from_hf, to_hf
from gcl_jax.models.inherit import inherited

LARGER = {
  "projection_dim": 10,
  "vision_config": {
    "hidden_size": 24,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 8,
  },
  "text_config": {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 30,
    "max_position_embeddings": 9,
    "eos_token_id": 29,
  },
}


def shape(**changes):
  fields = copy.deepcopy(LARGER)
  for path, value in changes.items():
    place, _, name = path.rpartition("__")
    (fields[place] if place else fields)[name] = value
  return CLIPConfig.from_hf(fields)


SMALLER = {
  "projection_dim": 6,
  "vision_config__hidden_size": 8,
  "vision_config__num_attention_heads": 2,
  "vision_config__num_hidden_layers": 3,
  "vision_config__intermediate_size": 12,
  "text_config__num_hidden_layers": 2,
}


def cut_as_published(tensors, larger, smaller, wanted):
  """Written over their keys: layers by whole steps, q k v by heads, all else leading."""
  cut = {}
  for key, like in wanted.items():
    source, tower = key, "vision" if "vision" in key else "text"
    if ".layers." in key:
      name, _, rest = key.partition(".layers.")
      layer, _, rest = rest.partition(".")
      step = getattr(larger, tower).layers // getattr(smaller, tower).layers
      source = f"{name}.layers.{int(layer) * step}.{rest}"
    array = tensors[source]
    if any(f".{name}_proj.weight" in key for name in "qkv"):
      heads, of = getattr(smaller, tower).heads, getattr(larger, tower).heads
      array = array.reshape(of, -1, array.shape[-1])[:heads, :, : like[1]]
      cut[key] = array.reshape(like)
    else:
      cut[key] = array[tuple(slice(size) for size in like)]
  return cut


def test_every_array_is_the_published_part_of_the_larger_one():
  larger, smaller = shape(), shape(**SMALLER)
  params = jax.tree.map(
    lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape).astype("f4"),
    build(larger).abstract(),
  )
  ours = inherited({**params, "fusion": {"image_weight": 1.0}}, larger, smaller)
  wanted = {key: x.shape for key, x in to_hf(ours, smaller).items()}
  cut = cut_as_published(to_hf(params, larger), larger, smaller, wanted)
  theirs = from_hf(cut, smaller, "the cut")
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_array_equal(x, y)
  # 7 to 3 layers by steps of two, the last one never.
  scale = params["vision"]["blocks"]["norm1"]["scale"]
  np.testing.assert_array_equal(
    ours["vision"]["blocks"]["norm1"]["scale"], scale[[0, 2, 4], :8]
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"vision_config__patch_size": 4}, "vision.patch is 4 here and 8"),
    ({"text_config__vocab_size": 31}, "text.vocab_size is 31 here and 30"),
    ({"text_config__hidden_act": "gelu"}, "text.act is gelu here and quick_gelu"),
    ({"vision_config__layer_norm_eps": 1e-6}, "vision.eps is 1e-06 here and 1e-05"),
    ({"text_config__layer_norm_eps": 1e-6}, "text.eps is 1e-06 here and 1e-05"),
    ({"vision_config__num_hidden_layers": 8}, "vision.layers is 8 here, more"),
    ({"projection_dim": 12}, "projection_dim is 12 here, more"),
    ({"text_config__num_attention_heads": 2}, "8 channels here and 4"),
  ],
)
def test_a_shape_that_is_no_part_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    inherited({}, shape(), shape(**changes))


def test_a_pruned_tower_is_not_cut():
  larger = shape()
  pruned = dataclasses.replace(
    larger, vision=dataclasses.replace(larger.vision, head_width=larger.vision.head * 2)
  )
  with pytest.raises(
    UserError, match="vision tower of one of the two is a ResNet or was"
  ):
    inherited({}, pruned, larger)
