"""OpenCLIP's `open_clip_config.json`: what it says of a model, and what is refused.

A field that changes the numbers is either understood here or refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gcl_jax.errors import UserError
from gcl_jax.models.config import CLIPConfig, ResNetConfig
from gcl_jax.models.native import Shapes, native_config
from gcl_jax.processing import ImageProcessor

DESCRIPTION = "open_clip_config.json"

# Fields without effect outside training, or read elsewhere.
_IDLE = {"patch_dropout", "output_tokens", "mlp_ratio", "pad_id", "eos_id", "eot_id"}
_IDLE |= {"tokenizer_kwargs", "hf_tokenizer_name", "hf_proj_type", "hf_pooler_type"}
_IDLE |= {"attn_pooler_queries", "attn_pooler_heads", "timm_pool", "timm_proj"}
_SIZES = {
  "vision_cfg": {"image_size", "layers", "width", "head_width", "patch_size"},
  "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers"},
}
# Fields that may hold one thing alone: what both towers here do.
_ONLY = {
  "vision_cfg": {"pool_type": "tok", "pos_embed_type": "learnable"},
  "text_cfg": {"pool_type": "argmax", "proj_type": "linear"},
}
_FILTERS = {"bicubic": 3, "bilinear": 2}


def open_clip_config(described: Mapping[str, Any], shapes: Shapes, where: str):
  """The shape of an OpenCLIP model: its description and its tensors, which must agree.

  Args:
    described: `open_clip_config.json`.
    shapes: of the tensors, by key.
    where: names the model in errors.

  Raises:
    UserError: a field means what is not supported, or says other than the tensors.
  """
  model = _part(described, "model_cfg", where)
  parts = {name: _part(model, name, where) for name in _SIZES}
  for name, part in parts.items():
    for field, value in part.items():
      idle = field in _SIZES[name] or field in _IDLE or not value
      if not idle and _ONLY[name].get(field) != value:
        raise UserError(
          f"{where}: {DESCRIPTION} has {name}.{field}={value!r}, which is not supported."
        )
  vision, text = parts["vision_cfg"], parts["text_cfg"]
  config = native_config(
    shapes,
    where,
    act="quick_gelu" if model.get("quick_gelu") else "gelu",
    vision_head=vision.get("head_width") or 64,
    text_heads=text.get("heads") or 8,
  )
  _compare(model, config, where)
  return config


def _part(described: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
  part = described.get(name)
  if not isinstance(part, Mapping):
    raise UserError(
      f"{where}: {DESCRIPTION} has no {name}: take the one that was published with the "
      "weights."
    )
  return part


def _compare(model: Mapping[str, Any], config: CLIPConfig, where: str) -> None:
  vision, text = config.vision, config.text
  resnet = isinstance(vision, ResNetConfig)
  found = {
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
      said = model[name].get(field)
      said = list(said) if isinstance(said, tuple) else said
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
    UserError: a way of resizing that is not supported.
  """
  settings = described.get("preprocess_cfg") or {}
  mode = settings.get("resize_mode") or "shortest"
  way = settings.get("interpolation") or "bicubic"
  if mode not in ("shortest", "squash") or way not in _FILTERS:
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
