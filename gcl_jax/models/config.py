"""The shape of a CLIP: towers, named variants, and Hugging Face's config.json."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gcl_jax.errors import UserError

ACTIVATIONS = ("quick_gelu", "gelu")
# The end-of-text id that OpenAI's old configs carry; it means: pool at the largest id.
LEGACY_EOS_ID = 2


@dataclass(frozen=True)
class VisionConfig:
  """A vision tower. Sizes in features; `patch` and `image_size` in pixels."""

  width: int = 768
  layers: int = 12
  heads: int = 12
  mlp: int = 3072
  patch: int = 32
  image_size: int = 224
  act: str = "quick_gelu"
  eps: float = 1e-5

  @property
  def positions(self) -> int:
    """One for the class token, one per patch."""
    return 1 + (self.image_size // self.patch) ** 2


@dataclass(frozen=True)
class TextConfig:
  """A text tower. `context` is the longest text in tokens."""

  width: int = 512
  layers: int = 12
  heads: int = 8
  mlp: int = 2048
  vocab_size: int = 49408
  context: int = 77
  act: str = "quick_gelu"
  eps: float = 1e-5
  bos_id: int = 49406
  eos_id: int = 49407
  pad_id: int = 1


@dataclass(frozen=True)
class CLIPConfig:
  """Both towers and the space they share."""

  vision: VisionConfig = VisionConfig()
  text: TextConfig = TextConfig()
  projection_dim: int = 512
  logit_scale_init: float = 2.6592

  def __post_init__(self):
    for name, tower in (("vision", self.vision), ("text", self.text)):
      if tower.width % tower.heads:
        raise UserError(
          f"the {name} tower's width {tower.width} does not divide into {tower.heads} "
          "heads: mend hidden_size or num_attention_heads."
        )
      if tower.act not in ACTIVATIONS:
        raise UserError(
          f"the {name} tower's hidden_act is {tower.act!r}: there are "
          f"{', '.join(ACTIVATIONS)}."
        )
    if self.vision.image_size % self.vision.patch:
      raise UserError(
        f"image_size {self.vision.image_size} is no multiple of patch_size "
        f"{self.vision.patch}."
      )

  @classmethod
  def from_hf(cls, fields: Mapping[str, Any]) -> CLIPConfig:
    """From the fields of a Hugging Face CLIP config.

    Fields left out take `CLIPConfig`'s defaults; fields that shape no weight are
    ignored. An old file's `vision_config_dict` and `text_config_dict`, completed with
    defaults, go over `vision_config` and `text_config`, as transformers reads them.

    Raises:
      UserError: a config of another model, or sizes that cannot be.
    """
    kind = fields.get("model_type", "clip")
    if kind != "clip":
      raise UserError(
        f"this is a {kind!r} model; CLIP models (model_type 'clip') are supported."
      )
    return cls(
      vision=_from_names(VisionConfig, _VISION_NAMES, _section(fields, "vision")),
      text=_from_names(TextConfig, _TEXT_NAMES, _section(fields, "text")),
      projection_dim=fields.get("projection_dim", cls.projection_dim),
      logit_scale_init=fields.get("logit_scale_init_value", cls.logit_scale_init),
    )

  def to_hf(self) -> dict[str, Any]:
    """The fields of a config.json that `CLIPModel.from_pretrained` reads."""
    vision = {hf: getattr(self.vision, ours) for ours, hf in _VISION_NAMES.items()}
    text = {hf: getattr(self.text, ours) for ours, hf in _TEXT_NAMES.items()}
    return {
      "architectures": ["CLIPModel"],
      "model_type": "clip",
      "dtype": "float32",
      "projection_dim": self.projection_dim,
      "logit_scale_init_value": self.logit_scale_init,
      "vision_config": {
        "model_type": "clip_vision_model",
        "projection_dim": self.projection_dim,
        **vision,
      },
      "text_config": {
        "model_type": "clip_text_model",
        "projection_dim": self.projection_dim,
        **text,
      },
    }


_TOWER_NAMES = {
  "width": "hidden_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "mlp": "intermediate_size",
  "act": "hidden_act",
  "eps": "layer_norm_eps",
}
_VISION_NAMES = {**_TOWER_NAMES, "patch": "patch_size", "image_size": "image_size"}
_TEXT_NAMES = {
  **_TOWER_NAMES,
  "vocab_size": "vocab_size",
  "context": "max_position_embeddings",
  "bos_id": "bos_token_id",
  "eos_id": "eos_token_id",
  "pad_id": "pad_token_id",
}


def _section(fields: Mapping[str, Any], tower: str) -> Mapping[str, Any]:
  # transformers completes the `_dict` with defaults before it overrides, so that a
  # partial one resets what it leaves out.
  old = fields.get(f"{tower}_config_dict")
  return old if old is not None else fields.get(f"{tower}_config") or {}


def _from_names(kind, names: Mapping[str, str], fields: Mapping[str, Any]):
  known = {ours: fields[hf] for ours, hf in names.items() if fields.get(hf) is not None}
  return kind(**known)


def _openai(
  width: int, layers: int, heads: int, patch: int, size: int, text: int, projection: int
) -> CLIPConfig:
  return CLIPConfig(
    VisionConfig(width, layers, heads, 4 * width, patch, size),
    TextConfig(text, 12, text // 64, 4 * text),
    projection,
  )


def _tinyclip(
  width: int, layers: int, patch: int, text: int, text_layers: int
) -> CLIPConfig:
  return CLIPConfig(
    VisionConfig(width, layers, width // 64, 4 * width, patch, 224, "gelu"),
    TextConfig(text, text_layers, text // 64, 4 * text, act="gelu"),
  )


_NAMED = {
  "ViT-B/32": _openai(768, 12, 12, 32, 224, 512, 512),
  "ViT-B/16": _openai(768, 12, 12, 16, 224, 512, 512),
  "ViT-L/14": _openai(1024, 24, 16, 14, 224, 768, 768),
  "ViT-L/14@336": _openai(1024, 24, 16, 14, 336, 768, 768),
  "TinyCLIP-ViT-8M-16-Text-3M": _tinyclip(256, 10, 16, 256, 3),
  "TinyCLIP-ViT-39M-16-Text-19M": _tinyclip(512, 12, 16, 512, 6),
  "TinyCLIP-ViT-40M-32-Text-19M": _tinyclip(512, 12, 32, 512, 6),
  "TinyCLIP-ViT-61M-32-Text-29M": _tinyclip(640, 12, 32, 512, 9),
}
NAMES = tuple(_NAMED)


def named_config(name: str) -> CLIPConfig:
  """The shape of a published model.

  Raises:
    UserError: an unknown name; the message says the nearest.
  """
  if name in _NAMED:
    return _NAMED[name]
  near = difflib.get_close_matches(name, NAMES, 1, cutoff=0.0)[0]
  raise UserError(
    f"there is no model named {name!r}: did you mean {near!r}? Names: "
    f"{', '.join(NAMES)}."
  )
