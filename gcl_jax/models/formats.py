"""Which model a file of weights holds: a table of kinds, told by their keys.

A kind that is known and not supported is refused by its name. To support one is to give
its row a reader.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gcl_jax.errors import UserError
from gcl_jax.models.config import CLIPConfig
from gcl_jax.models.convert import from_tensors
from gcl_jax.models.native import native_config, native_layout
from gcl_jax.models.open_clip import (
  DESCRIPTION,
  open_clip_config,
  open_clip_images,
  part_of,
)
from gcl_jax.models.weights import Tensors
from gcl_jax.processing import ImageProcessor

_ENCODER = re.compile(
  r"^_?(image_encoder|text_encoder|logit_scale)(_without_ddp)?\.(?=.)"
)
_NAMED = 4  # keys that an error of an unknown layout shows
# Numbers that OpenAI's archives hold beside the weights; other scripted CLIPs do not.
_OPENAI = {"input_resolution", "context_length", "vocab_size"}


class Found(NamedTuple):
  """What lies there.

  Attributes:
    where: the file.
    tensors: under OpenCLIP's names, wherever they can be given those.
    keys: as they are in the file.
    scripted: whether the file is a TorchScript archive.
    described: the `open_clip_config.json` beside it, or {}.
  """

  where: Path
  tensors: Tensors
  keys: frozenset[str]
  scripted: bool
  described: Mapping[str, Any]


class Read(NamedTuple):
  """A model whose tensors have not been asked for yet."""

  config: CLIPConfig
  images: ImageProcessor
  params: Callable[[], dict[str, Any]]


class Format(NamedTuple):
  """A kind of file. `read` is None where it is refused."""

  name: str
  recognises: Callable[[Found], bool]
  read: Callable[[Found], Read] | None = None


def find(
  where: Path, tensors: Tensors, scripted: bool, described: Mapping[str, Any]
) -> Found:
  """Tensors of a file, with the wrappers of training scripts taken off their names."""
  return Found(
    where, tensors.renamed(_plain_name), frozenset(tensors), scripted, described
  )


def recognise(found: Found) -> Format:
  """The first kind of the table that this is.

  Raises:
    UserError: it is none, or one that is not supported.
  """
  kind = next((f for f in FORMATS if f.recognises(found)), None)
  if kind is None:
    some = ", ".join(sorted(found.keys)[:_NAMED]) or "nothing"
    raise UserError(
      f"{found.where} is of an unknown layout (it holds {some}, ...). Supported are CLIP, "
      "TinyCLIP and VISTA: OpenAI's .pt archives, OpenCLIP's files, TinyCLIP's .pt files, a "
      "VISTA's .pth beside its text encoder's files, and Hugging Face folders."
    )
  if kind.read is None:
    raise UserError(
      f"{found.where} holds {kind.name}, which is not supported: take a CLIP or a TinyCLIP."
    )
  return kind


def _plain_name(key: str) -> str:
  key = key.replace("module.", "")
  key = _ENCODER.sub("", key)
  # OpenCLIP's models whose text tower is a module of its own.
  inside = key.removeprefix("text.")
  return inside if inside.startswith(_TEXT_KEYS) else key


_TEXT_KEYS = ("transformer.resblocks.", "token_embedding.", "positional_embedding")
_TEXT_KEYS += ("ln_final.", "text_projection", "attn_mask")


def _has(*beginnings: str) -> Callable[[Found], bool]:
  """Whether a key, with or without wrappers, begins so."""
  return lambda found: any(
    key.startswith(beginnings) for key in (*found.tensors, *found.keys)
  )


def _image_tower(*names: str) -> Callable[[Found], bool]:
  """Whether OpenCLIP's description names a timm model like that, or any."""

  def recognises(found: Found) -> bool:
    vision = part_of(part_of(found.described, "model_cfg"), "vision_cfg")
    named = str(vision.get("timm_model_name") or "")
    return bool(named) and (not names or any(name in named for name in names))

  return recognises


def _either(*tests: Callable[[Found], bool]) -> Callable[[Found], bool]:
  return lambda found: any(test(found) for test in tests)


def _is_clip(found: Found) -> bool:
  return {"token_embedding.weight", "visual.conv1.weight"} <= set(found.tensors)


def _is_tinyclip(found: Found) -> bool:
  wrapped = any(_ENCODER.match(key.replace("module.", "")) for key in found.keys)
  named = found.where.name.startswith("TinyCLIP") and not found.described
  return _is_clip(found) and (wrapped or named)


def _is_openai(found: Found) -> bool:
  return _is_clip(found) and found.scripted and found.keys >= _OPENAI


def _read_tinyclip(found: Found) -> Read:
  if any("l0_module." in key for key in found.keys):
    raise UserError(
      f"{found.where} is a TinyCLIP in the middle of its pruning: it still has gates "
      "(l0_module). Take the pruned model that was published."
    )
  return _native(found, act="gelu", pruned=True)


def _read_openai(found: Found) -> Read:
  return _native(found, act="quick_gelu")


def _refuse_alone(found: Found) -> Read:
  raise UserError(
    f"{found.where} is the weights of a Hugging Face model, whose shape is in its "
    "config.json: name the folder that holds both."
  )


def _refuse_without_encoder(found: Found) -> Read:
  raise UserError(
    f"{found.where} is the weights of a VISTA (Visualized BGE), whose text encoder says how "
    "to read them: put them as a .pth beside its config.json and tokenizer files (of "
    "BAAI/bge-base-en-v1.5 or BAAI/bge-m3)."
  )


def _native(found: Found, **options: Any) -> Read:
  config = native_config(found.tensors.shapes, str(found.where), **options)
  size = config.vision.image_size
  return Read(config, ImageProcessor(size, size), lambda: _params(found, config))


def _read_open_clip(found: Found) -> Read:
  if not found.described:
    raise UserError(
      f"{found.where} does not say which activation its model has (quick_gelu or gelu): "
      f"put the {DESCRIPTION} that was published with it into the same folder."
    )
  where = str(found.where)
  config = open_clip_config(found.described, found.tensors.shapes, where)
  images = open_clip_images(found.described, config.vision.image_size, where)
  return Read(config, images, lambda: _params(found, config))


def _params(found: Found, config: CLIPConfig) -> dict[str, Any]:
  layout = native_layout(
    config,
    "the shape of its tensors",
    "Take the whole file that was published.",
  )
  return from_tensors(found.tensors, config, str(found.where), layout)


# First match.
FORMATS: tuple[Format, ...] = (
  Format(
    "a VISTA (Visualized BGE)",
    _has("bge_encoder.", "bge_embeddings."),
    _refuse_without_encoder,
  ),
  Format(
    "a CoCa",
    _either(
      _has("text_decoder.", "visual.attn_pool."),
      lambda found: bool(part_of(found.described, "model_cfg").get("multimodal_cfg")),
    ),
  ),
  Format(
    "a SigLIP",
    _either(_has("logit_bias", "vision_model.head.probe"), _image_tower("siglip")),
  ),
  Format(
    "an EVA-CLIP",
    _either(_has("visual.blocks.", "visual.rope."), _image_tower("eva")),
  ),
  Format(
    "a MobileCLIP",
    _either(_has("image_encoder.model."), _image_tower("mobileclip", "fastvit", "mci")),
  ),
  Format(
    "an OpenCLIP model with an image tower of timm",
    _either(_has("visual.trunk."), _image_tower()),
  ),
  Format(
    "an OpenCLIP model with a text tower of transformers",
    _has("text.transformer.encoder.", "text.transformer.embeddings."),
  ),
  Format("a Hugging Face CLIP", _has("vision_model.", "text_model."), _refuse_alone),
  Format("a TinyCLIP", _is_tinyclip, _read_tinyclip),
  Format("OpenAI's archive", _is_openai, _read_openai),
  Format("an OpenCLIP model", _is_clip, _read_open_clip),
)
