"""Configs: what transformers makes of the same dict, and what is refused."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import clip_cases as cases
import jax
import pytest
import transformers

from gcl_jax.errors import UserError
from gcl_jax.models import NAMES, CLIPConfig, build, named_config

# research/models.md sections 1 and 2: counted on CLIPModel.
PARAMETERS = {
  "ViT-B/32": 151_277_313,
  "ViT-B/16": 149_620_737,
  "ViT-L/14": 427_616_513,
  "ViT-L/14@336": 427_944_193,
  "TinyCLIP-ViT-8M-16-Text-3M": 23_446_017,
  "TinyCLIP-ViT-39M-16-Text-19M": 83_101_185,
  "TinyCLIP-ViT-40M-32-Text-19M": 84_205_569,
  "TinyCLIP-ViT-61M-32-Text-29M": 115_382_145,
}


def _of_transformers(fields) -> CLIPConfig:
  return CLIPConfig.from_hf(transformers.CLIPConfig.from_dict(fields).to_dict())


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"text_config": None, "vision_config": {}},
    cases.SMALL,
    {"text_config": {"hidden_size": 256}, "vision_config": {"num_beams": 4}},
    {"projection_dim": 64, "text_config": {"projection_dim": 999}},
    {"text_config": {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}},
    # A partial _dict resets what it does not name.
    {
      "text_config": {"hidden_size": 1024, "eos_token_id": 2, "vocab_size": 9},
      "text_config_dict": {"num_hidden_layers": 24, "vocab_size": 11},
      "vision_config": {"hidden_size": 1024, "patch_size": 14},
      "vision_config_dict": {"num_attention_heads": 4, "hidden_act": "gelu"},
    },
    {"text_config": {"hidden_size": 1024}, "text_config_dict": None},
    {"vision_config_dict": {"hidden_size": 640, "num_attention_heads": 10}},
    {"vision_config": {"image_size": [64, 64], "patch_size": [16, 16]}},
  ],
)
def test_the_same_as_transformers_makes_of_it(fields):
  assert CLIPConfig.from_hf(fields) == _of_transformers(fields)


def test_defaults_are_transformers_defaults():
  defaults = transformers.CLIPConfig()
  config = CLIPConfig.from_hf({})
  assert config == CLIPConfig()
  assert config.text.eos_id == defaults.text_config.eos_token_id
  assert config.text.eps == defaults.text_config.layer_norm_eps
  assert config.vision.act == defaults.vision_config.hidden_act
  assert config.logit_scale_init == defaults.logit_scale_init_value


@pytest.mark.parametrize("name", [n for n in NAMES if named_config(n).plain])
def test_named_shapes(name):
  config = named_config(name)
  shapes = jax.tree.leaves(build(config).abstract())
  assert sum(leaf.size for leaf in shapes) == PARAMETERS[name]
  there = json.loads(json.dumps(config.to_hf()))
  assert CLIPConfig.from_hf(there) == config == _of_transformers(there)
  assert config.vision.act == ("gelu" if "Tiny" in name else "quick_gelu")


@pytest.mark.parametrize(
  ("wrong", "near"),
  [
    ("vit-b/32", "ViT-B/32"),
    ("ViT-L14", "ViT-L/14"),
    ("ViT-L/14-336", "ViT-L/14"),
    ("openai/clip-vit-base-patch16", None),
    ("TinyCLIP-ViT-40M-32", "TinyCLIP-ViT-40M-32-Text-19M"),
    (
      "wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M",
      "TinyCLIP-ViT-8M-16-Text-3M",
    ),
    ("resnet", None),
  ],
)
def test_an_unknown_name_gets_the_nearest(wrong, near):
  with pytest.raises(UserError) as error:
    named_config(wrong)
  message = str(error.value)
  assert repr(wrong) in message and all(name in message for name in NAMES)
  if near:
    assert f"did you mean {near}?" in message


@pytest.mark.parametrize(
  ("tower", "fields", "says"),
  [
    (
      "vision",
      {"hidden_act": "relu"},
      r"vision_config\.hidden_act.*'relu'.*quick_gelu",
    ),
    ("text", {"hidden_size": 100, "num_attention_heads": 3}, r"100 is not a multiple"),
    ("vision", {"num_channels": 4}, r"num_channels is 4"),
    ("vision", {"image_size": [224, 336]}, r"image_size is \[224, 336\]"),
    ("vision", {"patch_size": 300}, r"patch_size is 300"),
    ("text", {"num_hidden_layers": 0}, r"num_hidden_layers is 0"),
    ("text", {"hidden_size": "512"}, r"hidden_size is '512'"),
    ("text", {"eos_token_id": [2, 3]}, r"eos_token_id is \[2, 3\]"),
    ("text", {"layer_norm_eps": "small"}, r"layer_norm_eps is 'small'"),
  ],
)
def test_what_is_no_clip_vit_is_refused(tower, fields, says):
  with pytest.raises(UserError, match=says):
    CLIPConfig.from_hf({f"{tower}_config": fields})


def test_a_tower_that_is_no_dict_is_refused():
  with pytest.raises(UserError, match="text_config is 'large'"):
    CLIPConfig.from_hf({"text_config": "large"})


@pytest.mark.parametrize(
  "tower, fields, match",
  [
    ("text", {"layer_heads": [1, 2]}, "layer_heads is .* 12 layers"),
    ("text", {"layer_heads": [1.5] * 12}, "layer_heads is"),
    ("text", {"layer_heads": [8] * 12}, "must have both layer_heads and"),
    ("text", {"head_dim": "wide"}, "head_dim is 'wide'"),
    (
      "text",
      {"layer_heads": [None, 7] * 6, "layer_intermediate_sizes": [2048] * 12},
      "layer_heads has at most 7, but num_attention_heads is 8",
    ),
    (
      "text",
      {"layer_heads": [0, 8] * 6, "layer_intermediate_sizes": [2048] * 12},
      "layer_heads is .* from 1 on, or null",
    ),
    ("vision", {"model_type": "clip_resnet_vision_model", "stage_layers": [3]}, "four"),
    (
      "vision",
      {"model_type": "clip_resnet_vision_model", "image_size": 30},
      "under 31",
    ),
    ("vision", {"model_type": "clip_resnet_vision_model", "hidden_size": 7}, "even"),
  ],
)
def test_what_no_pruned_tower_or_resnet_can_be(tower, fields, match):
  with pytest.raises(UserError, match=match):
    CLIPConfig.from_hf({f"{tower}_config": fields})


def test_a_pruned_tower_goes_to_json_and_back():
  heads, mlps = (8, None) * 6, (2048, 0) * 6
  fields = {"head_dim": 64, "layer_heads": heads, "layer_intermediate_sizes": mlps}
  config = CLIPConfig.from_hf({"text_config": {**fields, "hidden_size": 300}})
  assert (config.text.layer_heads, config.text.layer_mlps) == (heads, mlps)
  assert config.text.head == 64 and not config.plain and config.vision.plain
  assert config.to_hf()["model_type"] == "gcl_jax_clip"
  assert CLIPConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_the_config_of_a_tinyclips_distillation():
  path = Path(__file__).parents[2] / "configs" / "tinyclip_distill.py"
  get_config = runpy.run_path(str(path))["get_config"]
  configs = {variant: get_config(variant) for variant in ("61M", "40M")}
  for variant, config in configs.items():
    assert variant in config.name
    assert named_config(config.model.name).text.act == "gelu"
  large, small = (named_config(c.model.name) for c in configs.values())
  # The second student is cut out of the first.
  assert configs["61M"].model.name in configs["40M"].init.inherit
  assert (small.vision.layers, small.vision.patch) == (large.vision.layers, 32)
  assert small.vision.width < large.vision.width and small.text.layers == 6
  assert configs["61M"].init.inherit == configs["61M"].distill.teacher
  assert get_config().to_dict() == configs["61M"].to_dict()
  with pytest.raises(UserError, match=r"tinyclip_distill\.py:8M: there are 61M, 40M"):
    get_config("8M")
