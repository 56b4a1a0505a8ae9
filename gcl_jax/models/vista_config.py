"""Shapes of VISTA models: an EVA02 image tower whose patches a text encoder reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from gcl_jax.errors import UserError
from gcl_jax.models.config import fields_of, number

BERT, XLM_R = "bert", "xlm-roberta"
ENCODERS = (BERT, XLM_R)
# Ids of the start and the end token, and of padding, in the published vocabularies.
_TOKENS = {BERT: (101, 102, 0), XLM_R: (0, 2, 1)}
LOGIT_SCALE = 3.912023005428146  # ln 50: VISTA's temperature of 0.02


@dataclasses.dataclass(frozen=True)
class EvaConfig:
  """The image tower: EVA02, a pre-norm ViT with rotary positions and a gated MLP.

  Attributes:
    head: width of EVA-CLIP's own projection, which VISTA's file holds and does not use.
  """

  width: int = 768
  layers: int = 12
  heads: int = 12
  mlp: int = 2048
  patch: int = 16
  image_size: int = 224
  eps: float = 1e-6
  head: int = 512
  uneven: ClassVar[bool] = False  # its layers are alike

  @property
  def grid(self) -> int:
    """Patches a side."""
    return self.image_size // self.patch

  @property
  def positions(self) -> int:
    """Patches and the class token."""
    return self.grid**2 + 1


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """The text encoder: a post-norm BERT or XLM-RoBERTa that pools its first token.

  Attributes:
    kind: `bert` counts positions from 0, `xlm-roberta` from the one after padding.
    table: rows of the position table.
    types: rows of the token-type table, of which the first is added to every token.
    bos_id, eos_id: [CLS] and [SEP].
  """

  kind: str = BERT
  width: int = 768
  layers: int = 12
  heads: int = 12
  mlp: int = 3072
  vocab_size: int = 30522
  table: int = 512
  types: int = 2
  act: str = "gelu"
  eps: float = 1e-12
  bos_id: int = 101
  eos_id: int = 102
  pad_id: int = 0
  uneven: ClassVar[bool] = False

  @property
  def first_position(self) -> int:
    """Of a text alone. (Beside an image every kind counts from 0.)"""
    return 0 if self.kind == BERT else self.pad_id + 1

  @property
  def context(self) -> int:
    """The most tokens of a text alone."""
    return self.table - self.first_position


_EVA = (
  ("width", "hidden_size"),
  ("layers", "num_hidden_layers"),
  ("heads", "num_attention_heads"),
  ("mlp", "intermediate_size"),
  ("patch", "patch_size"),
  ("image_size", "image_size"),
  ("eps", "layer_norm_eps"),
  ("head", "projection_dim"),
)
_BERT = (
  ("width", "hidden_size"),
  ("layers", "num_hidden_layers"),
  ("heads", "num_attention_heads"),
  ("mlp", "intermediate_size"),
  ("vocab_size", "vocab_size"),
  ("table", "max_position_embeddings"),
  ("types", "type_vocab_size"),
  ("act", "hidden_act"),
  ("eps", "layer_norm_eps"),
  ("bos_id", "bos_token_id"),
  ("eos_id", "eos_token_id"),
  ("pad_id", "pad_token_id"),
)


@dataclasses.dataclass(frozen=True)
class VistaConfig:
  """A VISTA's shape.

  Attributes:
    vision, text: the image tower and the encoder that reads its patches.
    logit_scale_init: logarithm of the logit scale, which VISTA's files do not hold.

  Raises:
    UserError: the encoder has too few positions for the patches and a text.
  """

  model_type: ClassVar[str] = "vista"
  plain: ClassVar[bool] = False  # transformers has no such model

  vision: EvaConfig = EvaConfig()
  text: BertConfig = BertConfig()
  logit_scale_init: float = LOGIT_SCALE

  def __post_init__(self):
    if self.pair_context < 2:
      raise UserError(
        f"this image tower makes {self.vision.grid**2} patches of a picture, and the "
        f"text encoder has {self.text.table} positions: no text fits beside an image. "
        "They do not belong together."
      )

  @property
  def projection_dim(self) -> int:
    """Width of the embeddings: the text encoder's own."""
    return self.text.width

  @property
  def pair_context(self) -> int:
    """The most tokens of a text beside an image, [CLS] and [SEP] included."""
    return min(self.text.table - self.vision.grid**2, self.text.context)

  @classmethod
  def from_hf(cls, fields: Mapping[str, Any]) -> VistaConfig:
    """The inverse of `to_hf`; absent keys are the base model's.

    Raises:
      UserError: the fields describe no VISTA that this module can run.
    """
    parts = [fields.get(f"{tower}_config") or {} for tower in ("vision", "text")]
    scale = number(
      fields, "logit_scale_init_value", cls.logit_scale_init, "config", None
    )
    return cls(eva_from_hf(parts[0]), bert_from_hf(parts[1]), scale)

  def to_hf(self) -> dict[str, Any]:
    """Plain JSON values: `text_config` is a Hugging Face config of its own."""
    vision = {theirs: getattr(self.vision, ours) for ours, theirs in _EVA}
    return {
      "model_type": self.model_type,
      "logit_scale_init_value": self.logit_scale_init,
      "vision_config": vision,
      "text_config": bert_to_hf(self.text),
    }


def eva_from_hf(fields: Mapping[str, Any]) -> EvaConfig:
  """An image tower from Hugging Face's words for its sizes.

  Raises:
    UserError: sizes that are none, or do not divide.
  """
  _check_mapping(fields, "vision_config")
  vision = EvaConfig(**fields_of(fields, _EVA, EvaConfig, "vision"))
  if vision.image_size % vision.patch:
    raise UserError(
      f"vision_config.image_size is {vision.image_size}, no multiple of its patch_size "
      f"{vision.patch}."
    )
  if vision.width // vision.heads % 4:
    raise UserError(
      f"vision_config: heads of {vision.width // vision.heads} numbers, and rotary "
      "positions of rows and columns take a multiple of 4."
    )
  return vision


def _check_mapping(fields: Any, name: str) -> None:
  if not isinstance(fields, Mapping):
    raise UserError(f"{name} is {fields!r}: give its sizes by name.")


def bert_from_hf(fields: Mapping[str, Any]) -> BertConfig:
  """A text encoder from its Hugging Face config.json; unknown keys are ignored.

  Raises:
    UserError: it is neither BERT nor XLM-RoBERTa, or of a form that we cannot run.
  """
  _check_mapping(fields, "text_config")
  kind = fields.get("model_type", BERT)
  if kind not in ENCODERS:
    raise UserError(
      f"text_config.model_type is {kind!r}: VISTA's text encoder is one of "
      f"{', '.join(ENCODERS)}."
    )
  positions = fields.get("position_embedding_type") or "absolute"
  if positions != "absolute":
    raise UserError(
      f"text_config.position_embedding_type is {positions!r}: only absolute is known."
    )
  bos, eos, pad = _TOKENS[kind]
  # What transformers means where a BERT's config says nothing.
  defaults = BertConfig(kind, bos_id=bos, eos_id=eos, pad_id=pad)
  return BertConfig(kind, **fields_of(fields, _BERT, defaults, "text"))


def bert_to_hf(text: BertConfig) -> dict[str, Any]:
  """A config.json that `transformers.AutoModel` reads."""
  name = {BERT: "BertModel", XLM_R: "XLMRobertaModel"}[text.kind]
  return {
    "architectures": [name],
    "model_type": text.kind,
    "dtype": "float32",
    **{theirs: getattr(text, ours) for ours, theirs in _BERT},
  }


_M3_TEXT = BertConfig(
  XLM_R, 1024, 24, 16, 4096, 250002, 8194, 1, "gelu", 1e-5, *_TOKENS[XLM_R]
)
VISTA_SHAPES = {
  "VISTA-base": VistaConfig(),
  "VISTA-m3": VistaConfig(EvaConfig(1024, 24, 16, 2730, 14, head=768), _M3_TEXT),
}
