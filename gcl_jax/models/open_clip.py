"""OpenCLIP's `open_clip_config.json`: what it says of a model, and what is refused.

A field that changes the numbers is either understood here or refused by its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gcl_jax.errors import UserError
from gcl_jax.models.config import CLIPConfig, ResNetConfig
from gcl_jax.models.native import Shapes, native_config
from gcl_jax.processing import ImageProcessor

DESCRIPTION = "open_clip_config.json"

# Fields that are sizes; that are read, or have no effect outside training; and that may
# hold one thing alone, which is what both towers here do.
_SIZES = {
  "model_cfg": {"embed_dim"},
  "vision_cfg": {"image_size", "layers", "width", "head_width", "patch_size"},
  "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers"},
}
_FREE = {
  "model_cfg": {"quick_gelu", "vision_cfg", "text_cfg", "custom_text", "output_dict"}
  | {"init_logit_scale", "nonscalar_logit_scale", "cast_dtype"},
  "vision_cfg": {
    "patch_dropout",
    "output_tokens",
    "mlp_ratio",
    "timm_pool",
    "timm_proj",
  }
  | {"attn_pooler_queries", "attn_pooler_heads"},
  "text_cfg": {"output_tokens", "mlp_ratio", "pad_id", "eos_id", "eot_id"}
  | {"tokenizer_kwargs", "hf_tokenizer_name", "hf_proj_type", "hf_pooler_type"},
}
_ONLY = {
  "model_cfg": {},
  "vision_cfg": {"pool_type": "tok", "pos_embed_type": "learnable"},
  "text_cfg": {"pool_type": "argmax", "proj_type": "linear"},
}
_LISTS = {"image_size": 2, "patch_size": 2, "layers": 4}  # a square's sides, a ResNet's
_FILTERS = {"bicubic": 3, "bilinear": 2}


def part_of(described: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  """A part of a description that nobody has looked at yet; {} where it is none."""
  part = described.get(name)
  return part if isinstance(part, Mapping) else {}


def open_clip_config(
  described: Mapping[str, Any], shapes: Shapes, where: str
) -> CLIPConfig:
  """The shape of an OpenCLIP model: its description and its tensors, which must agree.

  Args:
    described: `open_clip_config.json`.
    shapes: of the tensors, by key.
    where: names the model in errors.

  Raises:
    UserError: a field cannot be, means what is not supported, or says other than the
      tensors.
  """
  model = _part(described, "model_cfg", where)
  vision, text = (_part(model, name, where) for name in ("vision_cfg", "text_cfg"))
  for name, part in (("model_cfg", model), ("vision_cfg", vision), ("text_cfg", text)):
    _check_fields(name, part, where)
  head, heads = vision.get("head_width") or 64, text.get("heads") or 8
  _check_heads(shapes, head, heads, where)
  config = native_config(
    shapes,
    where,
    act="quick_gelu" if model.get("quick_gelu") else "gelu",
    vision_head=head,
    text_heads=heads,
  )
  config = _at_said_size(config, vision)
  _compare(model, config, where)
  return config


def _part(described: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
  part = described.get(name)
  if isinstance(part, Mapping):
    return part
  wrong = f"no {name}" if part is None else f"{name}={part!r}, which has no fields"
  raise UserError(
    f"{where}: {DESCRIPTION} has {wrong}: take the one that was published with the weights."
  )


def _check_fields(name: str, part: Mapping[str, Any], where: str) -> None:
  """Whether every field of a part is understood, and can be."""
  for field, value in part.items():
    wrong = ""
    if field in _SIZES[name]:
      if value is not None and not _is_size(value, _LISTS.get(field)):
        wrong = "no size: sizes are whole numbers from 1 on"
    elif field == "quick_gelu":
      if value is not None and not isinstance(value, bool):
        wrong = "neither true nor false"
    elif value and field not in _FREE[name] and _ONLY[name].get(field) != value:
      wrong = "not supported"
    if wrong:
      raise UserError(
        f"{where}: {DESCRIPTION} has {name}.{field}={value!r}, which is {wrong}."
      )


def _is_size(value: Any, count: int | None) -> bool:
  """Whether it is a positive whole number or, where there may be, a list of `count`."""
  several = isinstance(value, list | tuple) and len(value) == count
  return all(type(n) is int and n > 0 for n in (value if several else (value,)))


def _check_heads(shapes: Shapes, head: int, heads: int, where: str) -> None:
  """Before they divide anything; what the tensors lack is for others to say."""
  convolution = shapes.get("visual.layer1.0.conv1.weight")
  width = 32 if convolution else 1
  width *= ((convolution or shapes.get("visual.conv1.weight")) or (0,))[0]
  channels = (shapes.get("token_embedding.weight") or (0,))[-1]
  for field, value, of in (
    ("vision_cfg.head_width", head, width),
    ("text_cfg.heads", heads, channels),
  ):
    if of % value:
      raise UserError(
        f"{where}: {DESCRIPTION} has {field}={value}, which does not divide the {of} "
        "channels of its tensors: take both from the same model."
      )


def _at_said_size(config: CLIPConfig, vision: Mapping[str, Any]) -> CLIPConfig:
  """With the description's image size, where it has as many patches as the tensors.

  Pixels that are left over are not looked at, so the tensors do not tell them.
  """
  said = vision.get("image_size")
  said = said[0] if isinstance(said, list | tuple) and said[0] == said[1] else said
  if not isinstance(said, int):
    return config
  larger = dataclasses.replace(config.vision, image_size=said)
  if larger.grid != config.vision.grid:
    return config
  return dataclasses.replace(config, vision=larger)


def _compare(model: Mapping[str, Any], config: CLIPConfig, where: str) -> None:
  vision, text = config.vision, config.text
  resnet = isinstance(vision, ResNetConfig)
  found = {
    "model_cfg": {"embed_dim": config.projection_dim},
    "vision_cfg": {
      "image_size": vision.image_size,
      "width": vision.width,
      "layers": list(vision.stages) if resnet else vision.layers,
      **({} if resnet else {"patch_size": vision.patch}),
    },
    "text_cfg": {
      "context_length": text.context,
      "vocab_size": text.vocab_size,
      "width": text.width,
      "layers": text.layers,
    },
  }
  for name, sizes in found.items():
    for field, size in sizes.items():
      said = (model if name == "model_cfg" else model[name]).get(field)
      square = [size, size] if isinstance(size, int) else size
      if said is not None and said not in (size, square):
        raise UserError(
          f"{where}: {DESCRIPTION} says {name}.{field} {said}, but its tensors are of "
          f"{size}: take both from the same model."
        )


def open_clip_images(
  described: Mapping[str, Any], image_size: int, where: str
) -> ImageProcessor:
  """How OpenCLIP prepares this model's images: its own mean, deviation and resizing.

  Raises:
    UserError: a way of preparing them that is not supported.
  """
  settings = {}
  if described.get("preprocess_cfg") is not None:
    settings = _part(described, "preprocess_cfg", where)
  if settings.get("mode") not in (None, "RGB"):
    raise UserError(
      f"{where}: {DESCRIPTION} has preprocess_cfg.mode={settings['mode']!r}, which is not "
      "supported."
    )
  mode = settings.get("resize_mode") or "shortest"
  way = settings.get("interpolation") or "bicubic"
  # Not in the dict itself: the file may have a list there.
  if mode not in ("shortest", "squash") or way not in tuple(_FILTERS):
    raise UserError(
      f"{where}: {DESCRIPTION} resizes by {mode!r} and {way!r}; supported are 'shortest' and "
      f"'squash', by {' and '.join(_FILTERS)}."
    )
  fields = {
    "size": image_size
    if mode == "shortest"
    else {"height": image_size, "width": image_size},
    "crop_size": image_size,
    "resample": _FILTERS[way],
  }
  for ours, theirs in (("image_mean", "mean"), ("image_std", "std")):
    if settings.get(theirs) is not None:
      fields[ours] = settings[theirs]
  return ImageProcessor.from_dict(fields, f"{where} ({DESCRIPTION})")
