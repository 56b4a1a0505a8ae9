"""Shapes of CLIP models: our dataclasses, Hugging Face's dicts, and the named shapes."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from gcl_jax.errors import UserError

# How Hugging Face names them. The two GELUs are up to 0.02 apart: never one for another.
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh")


class _Transformer:
  """What both towers' shapes have in common.

  A pruned tower (TinyCLIP's automatic inheritance) keeps the head width and loses
  channels between the layers, heads, and channels of the MLPs: `head_width` says what
  `width` no longer does. Where its layers differ, `layer_heads` and `layer_mlps` say what
  each has, None for a half that is gone, and `heads` and `mlp` are the most of any.
  """

  @property
  def head(self) -> int:
    """Channels of a head."""
    return self.head_width or self.width // self.heads

  @property
  def uneven(self) -> bool:
    """Whether layers differ in size."""
    return bool(self.layer_heads)

  @property
  def plain(self) -> bool:
    """Whether Hugging Face's `CLIPModel` has such a tower."""
    return not self.uneven and self.heads * self.head == self.width


@dataclasses.dataclass(frozen=True)
class VisionConfig(_Transformer):
  """The image tower: a pre-norm ViT that pools its class token."""

  width: int = 768
  layers: int = 12
  heads: int = 12
  mlp: int = 3072
  patch: int = 32
  image_size: int = 224
  act: str = "quick_gelu"
  eps: float = 1e-5
  head_width: int | None = None
  layer_heads: tuple[int | None, ...] = ()
  layer_mlps: tuple[int | None, ...] = ()

  @property
  def features(self) -> int:
    """Channels of what the tower gives to the projection."""
    return self.width

  @property
  def grid(self) -> int:
    """Patches a side; pixels left over at the right and below are not looked at."""
    return self.image_size // self.patch

  @property
  def positions(self) -> int:
    """Patches and the class token."""
    return self.grid**2 + 1


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
  """An image tower of convolutions: CLIP's ResNet, which ends in an attention pool.

  `width` is that of the first stage, `stages` are the blocks of each of the four; the
  pool's attention has `heads` heads over 32 times the width.
  """

  width: int = 64
  stages: tuple[int, int, int, int] = (3, 4, 6, 3)
  heads: int = 32
  image_size: int = 224
  plain = False

  @property
  def features(self) -> int:
    """Channels of what the tower gives to the projection."""
    return 32 * self.width

  @property
  def grid(self) -> int:
    """Cells a side that the pool looks at: the stem rounds up, all behind it down."""
    return (self.image_size + 1) // 32

  @property
  def positions(self) -> int:
    """The cells and their mean."""
    return self.grid**2 + 1


@dataclasses.dataclass(frozen=True)
class TextConfig(_Transformer):
  """The text tower: causal, pooled at the end-of-text token."""

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
  head_width: int | None = None
  layer_heads: tuple[int | None, ...] = ()
  layer_mlps: tuple[int | None, ...] = ()


# (our field, Hugging Face's key), for both towers and for each.
_SHARED = (
  ("width", "hidden_size"),
  ("layers", "num_hidden_layers"),
  ("heads", "num_attention_heads"),
  ("mlp", "intermediate_size"),
  ("act", "hidden_act"),
  ("eps", "layer_norm_eps"),
)
_VISION = (*_SHARED, ("patch", "patch_size"), ("image_size", "image_size"))
_TEXT = (
  *_SHARED,
  ("vocab_size", "vocab_size"),
  ("context", "max_position_embeddings"),
  ("bos_id", "bos_token_id"),
  ("eos_id", "eos_token_id"),
  ("pad_id", "pad_token_id"),
)
_TOKEN_IDS = ("bos_id", "eos_id", "pad_id")
# Of a model that `CLIPModel` does not have: `model_type`, and our own keys in a tower.
OWN_TYPE = "gcl_jax_clip"
_OWN_RESNET = "clip_resnet_vision_model"
_OWN = (
  ("head_width", "head_dim"),
  ("layer_heads", "layer_heads"),
  ("layer_mlps", "layer_intermediate_sizes"),
)


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """A CLIP model's shape. Absent keys of a Hugging Face config are these defaults.

  Attributes:
    vision, text: the towers.
    projection_dim: width of the embeddings.
    logit_scale_init: initial logarithm of the logit scale.
  """

  vision: VisionConfig | ResNetConfig = VisionConfig()
  text: TextConfig = TextConfig()
  projection_dim: int = 512
  logit_scale_init: float = 2.6592

  @property
  def plain(self) -> bool:
    """Whether Hugging Face's `CLIPModel` has this shape."""
    return self.vision.plain and self.text.plain

  @property
  def pair_context(self) -> int:
    """The most tokens of a text beside an image: as many as of a text alone."""
    return self.text.context

  @classmethod
  def from_hf(cls, fields: Mapping[str, Any]) -> CLIPConfig:
    """A `config.json` as a dict, Hugging Face's or ours; unknown keys are ignored.

    Old files carry `text_config_dict` beside `text_config` (and the same for vision):
    transformers expands it with the class defaults and lets it overwrite every field,
    so where it is there it alone counts.

    Raises:
      UserError: the fields describe no CLIP ViT that this module can run.
    """
    towers = {}
    for name in ("vision", "text"):
      part = fields.get(f"{name}_config_dict")
      part = fields.get(f"{name}_config") if part is None else part
      if part is not None and not isinstance(part, Mapping):
        raise UserError(f"{name}_config is {part!r}: a model config has a dict there.")
      towers[name] = part or {}
    if towers["vision"].get("num_channels", 3) != 3:
      channels = towers["vision"]["num_channels"]
      raise UserError(
        f"vision_config.num_channels is {channels!r}: images here have 3."
      )
    if towers["vision"].get("model_type") == _OWN_RESNET:
      vision = _resnet(towers["vision"])
    else:
      part = towers["vision"]
      vision = VisionConfig(**fields_of(part, _VISION, VisionConfig, "vision"))
    text = TextConfig(**fields_of(towers["text"], _TEXT, TextConfig, "text"))
    if vision.grid < 1 and isinstance(vision, ResNetConfig):
      raise UserError(f"vision_config.image_size is {vision.image_size}, under 31.")
    if vision.grid < 1:
      raise UserError(
        f"vision_config.patch_size is {vision.patch}, more than its image_size "
        f"{vision.image_size}."
      )
    top = {"projection_dim": "projection_dim", "logit_scale": "logit_scale_init_value"}
    width = number(fields, top["projection_dim"], cls.projection_dim, "config")
    scale = number(fields, top["logit_scale"], cls.logit_scale_init, "config")
    return cls(vision, text, width, scale)

  def to_hf(self) -> dict[str, Any]:
    """A `config.json` that `transformers.CLIPModel.from_pretrained` reads.

    Of a model that is not `plain`, one that says so by its `model_type`. `from_hf` gives
    this config back.
    """
    return {
      "architectures": ["CLIPModel" if self.plain else "CLIP"],
      "model_type": "clip" if self.plain else OWN_TYPE,
      "dtype": "float32",
      "projection_dim": self.projection_dim,
      "logit_scale_init_value": self.logit_scale_init,
      "text_config": self._tower(self.text, _TEXT, {"model_type": "clip_text_model"}),
      "vision_config": self._vision(),
    }

  def _vision(self) -> dict[str, Any]:
    if isinstance(self.vision, ResNetConfig):
      return {
        "model_type": _OWN_RESNET,
        "hidden_size": self.vision.width,
        "stage_layers": list(self.vision.stages),
        "num_attention_heads": self.vision.heads,
        "image_size": self.vision.image_size,
      }
    extra = {"model_type": "clip_vision_model", "num_channels": 3}
    return self._tower(self.vision, _VISION, extra)

  def _tower(self, tower, table, extra: dict[str, Any]) -> dict[str, Any]:
    own = {} if tower.plain else {theirs: getattr(tower, ours) for ours, theirs in _OWN}
    return {
      **extra,
      "projection_dim": self.projection_dim,
      "attention_dropout": 0.0,
      **{theirs: getattr(tower, ours) for ours, theirs in table},
      **{k: list(v) if isinstance(v, tuple) else v for k, v in own.items()},
    }


def _resnet(part: Mapping[str, Any]) -> ResNetConfig:
  where, defaults = "vision_config", ResNetConfig()
  stages = part.get("stage_layers", defaults.stages)
  whole = isinstance(stages, list | tuple) and all(type(n) is int for n in stages)
  if not whole or len(stages) != 4 or min(stages) < 1:
    raise UserError(f"{where}.stage_layers is {stages!r}: it must be four numbers.")
  width = number(part, "hidden_size", defaults.width, where)
  heads = number(part, "num_attention_heads", defaults.heads, where)
  if width % 2 or (32 * width) % heads:
    raise UserError(
      f"{where}: hidden_size {width} must be even, and 32 times it a multiple of "
      f"num_attention_heads {heads}."
    )
  size = number(part, "image_size", defaults.image_size, where)
  return ResNetConfig(width, tuple(stages), heads, size)


def fields_of(part, table, defaults, tower: str) -> dict[str, Any]:
  """Our fields of a tower from a Hugging Face dict, by a table of (ours, theirs).

  Raises:
    UserError: a value of another type, or sizes that cannot be.
  """
  where = f"{tower}_config"
  out = {}
  for ours, theirs in table:
    default = getattr(defaults, ours)
    if isinstance(default, str):
      out[ours] = default if part.get(theirs) is None else part[theirs]
    else:
      low = None if ours in _TOKEN_IDS else 1
      out[ours] = number(part, theirs, default, where, low)
  if "act" in out and out["act"] not in ACTIVATIONS:
    raise UserError(
      f"{where}.hidden_act is {out['act']!r}: it is one of {', '.join(ACTIVATIONS)}."
    )
  cut = part.get("head_dim") is not None or part.get("layer_heads")
  if cut and hasattr(defaults, "head_width"):
    return out | _own_fields(part, out, where)
  if out["width"] % out["heads"]:
    raise UserError(
      f"{where}: hidden_size {out['width']} is not a multiple of "
      f"num_attention_heads {out['heads']}."
    )
  return out


def _own_fields(part, plain: dict[str, Any], where: str) -> dict[str, Any]:
  """The fields of a tower that was pruned."""
  own: dict[str, Any] = {"head_width": number(part, "head_dim", 64, where)}
  # Without heads there is no attention; an MLP without channels still adds its bias.
  for (ours, theirs), low in zip(_OWN[1:], (1, 0), strict=True):
    sizes = part.get(theirs) or []
    whole = isinstance(sizes, list | tuple) and all(
      n is None or (type(n) is int and n >= low) for n in sizes
    )
    if not whole or len(sizes) not in (0, plain["layers"]):
      raise UserError(
        f"{where}.{theirs} is {sizes!r}: it must be a number from {low} on, or null, for "
        f"each of the {plain['layers']} layers."
      )
    own[ours] = tuple(sizes)
  if bool(own["layer_heads"]) != bool(own["layer_mlps"]):
    raise UserError(
      f"{where} must have both {_OWN[1][1]} and {_OWN[2][1]}, or neither."
    )
  for ours, most in (("layer_heads", "heads"), ("layer_mlps", "mlp")):
    largest = max((n or 0 for n in own[ours]), default=plain[most])
    if max(largest, 1) != plain[most]:
      raise UserError(
        f"{where}.{dict(_OWN)[ours]} has at most {largest}, but {dict(_SHARED)[most]} is "
        f"{plain[most]}."
      )
  return own


def number(part, key: str, default: int | float, where: str, low: int | None = 1):
  """`part[key]` as a number of the default's type; None and absent are the default."""
  value = part.get(key)
  if value is None:
    return default
  if isinstance(value, list | tuple) and value and all(v == value[0] for v in value):
    value = value[0]  # a square size written as a pair
  whole = isinstance(default, int)
  if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
    kind = "one whole number" if whole else "a number"
    raise UserError(f"{where}.{key} is {part[key]!r}: it must be {kind}.")
  if whole and low is not None and value < low:
    raise UserError(f"{where}.{key} is {value}: it must be at least {low}.")
  return value if whole else float(value)


def _vit(
  image: tuple[int, int, int, int, int],
  text: tuple[int, int, int],
  projection_dim: int,
  act: str,
) -> CLIPConfig:
  """From (width, layers, heads, patch, image_size) and (width, layers, heads)."""
  width, layers, heads, patch, size = image
  vision = VisionConfig(width, layers, heads, 4 * width, patch, size, act)
  width, layers, heads = text
  return CLIPConfig(
    vision, TextConfig(width, layers, heads, 4 * width, act=act), projection_dim
  )


def _resnet_clip(
  width: int, text: tuple[int, int, int], projection_dim: int, act: str
) -> CLIPConfig:
  """CLIP's ResNet of [3, 4, 6, 3] blocks, its pool's heads 64 wide."""
  plain = _vit((768, 12, 12, 32, 224), text, projection_dim, act)
  return dataclasses.replace(plain, vision=ResNetConfig(width, heads=width // 2))


_B, _L = (512, 12, 8), (768, 12, 12)
_NAMED = {
  "ViT-B/32": _vit((768, 12, 12, 32, 224), _B, 512, "quick_gelu"),
  "ViT-B/16": _vit((768, 12, 12, 16, 224), _B, 512, "quick_gelu"),
  "ViT-L/14": _vit((1024, 24, 16, 14, 224), _L, 768, "quick_gelu"),
  "ViT-L/14@336": _vit((1024, 24, 16, 14, 336), _L, 768, "quick_gelu"),
  "TinyCLIP-ViT-8M-16-Text-3M": _vit((256, 10, 4, 16, 224), (256, 3, 4), 512, "gelu"),
  "TinyCLIP-ViT-39M-16-Text-19M": _vit((512, 12, 8, 16, 224), (512, 6, 8), 512, "gelu"),
  "TinyCLIP-ViT-40M-32-Text-19M": _vit((512, 12, 8, 32, 224), (512, 6, 8), 512, "gelu"),
  "TinyCLIP-ViT-61M-32-Text-29M": _vit(
    (640, 12, 10, 32, 224), (512, 9, 8), 512, "gelu"
  ),
  "TinyCLIP-ResNet-19M-Text-19M": _resnet_clip(44, (512, 6, 8), 1024, "gelu"),
  "TinyCLIP-ResNet-30M-Text-29M": _resnet_clip(56, (512, 9, 8), 1024, "gelu"),
}
NAMES = tuple(_NAMED)


def named_config(name: str) -> CLIPConfig:
  """The shape of an OpenAI ViT or a TinyCLIP by its name (`NAMES`).

  Raises:
    UserError: no such name; says the nearest.
  """
  if name in _NAMED:
    return _NAMED[name]
  folded = {known.casefold(): known for known in NAMES}
  # A hub id names the same shape with an owner before and the data behind.
  wanted = str(name).casefold().removeprefix("wkcn/").removeprefix("openai/clip-")
  inside = [known for low, known in folded.items() if low in wanted]
  near = inside or [
    folded[low] for low in difflib.get_close_matches(wanted, folded, n=1, cutoff=0.5)
  ]
  hint = f"did you mean {near[-1]}? " if near else ""
  raise UserError(
    f"no model shape is named {name!r}: {hint}The names are {', '.join(NAMES)}; any "
    "other CLIP ViT is given by the fields of its Hugging Face config."
  )
