"""What a run starts from: a model, its first parameters, and its processor."""

from __future__ import annotations

import dataclasses
import functools
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from gcl_jax.checkpoints import RunDescription, is_run
from gcl_jax.data import Source
from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings
from gcl_jax.models import (
  Config,
  Model,
  VistaConfig,
  build,
  config_from_dict,
  eva_from_hf,
  find_tokenizer,
  fitting_tokenizer,
  is_text_encoder,
  local_folder,
  own_tokenizer,
  read_towers,
  shape_of_name,
  with_size_of,
)
from gcl_jax.models.inherit import inherited
from gcl_jax.processing import (
  EncoderTokenizer,
  Processor,
  Tokenizer,
  default_clip_processor,
  default_vista_processor,
)
from gcl_jax.training.weights import read_processor, read_weights

_SCRATCH = "a model from scratch (config.tokenizer.path, or its elder's)"
_TOKENIZER_SAMPLE = 200_000  # captions that a vocabulary of our own is learned from


class Start(NamedTuple):
  """What a run starts from; the parameters are made, or read, when they are asked for."""

  model: Model
  processor: Processor
  params: Callable[[], Any]  # -> nested dict of float32 arrays


def make_start(
  config: ConfigDict, source: Source, stored: RunDescription | None, trained: bool
) -> Start:
  """The model, its processor and its first parameters, as the config says.

  Args:
    config: the run's. `init.pretrained` names what `models.read_model` reads, or
      another run's folder; "" starts from random weights in the shape of
      `model.name` and `model.hf`. Of a text encoder's folder a VISTA begins, whose
      image tower is `init.image_tower`, or drawn in the shape of
      `model.hf.vision_config`.
    source: the training records; a vocabulary of our own is learned from its captions.
    stored: the run that goes on; its shape and its processor are kept.
    trained: a checkpoint of it is there: nothing but its shape is needed, and what it
      once started from may be gone.

  Raises:
    UserError: nothing to start from, or what is there is not a CLIP.
  """
  fusion = _fusion(config)
  if stored and trained:
    model = _build(config, stored.model, fusion)
    zeros = functools.partial(
      jax.tree.map, lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.abstract()
    )
    return Start(model, stored.processor, zeros)
  if config.init.pretrained:
    return _pretrained(config, fusion)
  if stored:
    model, processor = _build(config, stored.model, fusion), stored.processor
  else:
    _refuse_tower(config)
    model, processor = _from_scratch(config, fusion, source)
  if config.init.inherit:
    return Start(model, processor, _heir(config, model))

  def draw():
    params = jax.jit(model.init)(jax.random.key(config.seed))
    positions = params["vision"]["position_embedding"]
    positions["embedding"] *= config.init.vision_positions
    return _with_scale(config, params)

  return Start(model, processor, draw)


def model_from_config(config: ConfigDict) -> Model:
  """The model of a config, without data: a vocabulary to be learned is taken as full,
  one on disk is read.

  Raises:
    UserError: as `make_start`.
  """
  if config.init.pretrained:
    return _pretrained(config, _fusion(config)).model
  _refuse_tower(config)
  fields, words = _fields(config), {}
  tokenizer = _given_tokenizer(config)
  if tokenizer is not None:
    words = _words(tokenizer)
  elif not _is_vista(fields):  # which brings its vocabulary
    entries = config.tokenizer.vocab_size
    words = {"vocab_size": entries, "eos_token_id": entries - 1}
    words |= {"bos_token_id": entries - 2, "pad_token_id": entries - 1}
  shape = config_from_dict(_merged(fields, {"text_config": words}))
  if tokenizer is not None:
    fitting_tokenizer(tokenizer, shape, _SCRATCH)
  return _build(config, shape, _fusion(config))


def _given_tokenizer(config: ConfigDict) -> Tokenizer | EncoderTokenizer | None:
  """What a model from scratch is to read by; None where nothing is named."""
  elder, named = _elder(config), config.tokenizer.path
  if elder:
    return read_processor(elder, named).tokenizer
  return find_tokenizer(named) if named else None


def _fusion(config: ConfigDict) -> FusionSettings:
  return FusionSettings(
    of=config.fusion.of,
    image_weight=config.fusion.image_weight,
    text_weight=config.fusion.text_weight,
    learned=config.fusion.learned,
  )


def _build(config: ConfigDict, shape: Config, fusion: FusionSettings) -> Model:
  if isinstance(shape, VistaConfig) and fusion != FusionSettings():
    raise UserError(
      "config.fusion weighs what score fusion adds, and a VISTA's encoder fuses by itself: "
      "leave config.fusion as it is."
    )
  return build(shape, fusion=fusion, dtype=config.model.dtype, remat=config.model.remat)


def _with_scale(config: ConfigDict, params: Any) -> Any:
  if not config.temperature.logit_scale:
    return params
  return {**params, "logit_scale": np.log(np.float32(config.temperature.logit_scale))}


def _pretrained(config: ConfigDict, fusion: FusionSettings) -> Start:
  name = config.init.pretrained
  if config.model.name:
    raise UserError(
      f"config.model.name={config.model.name!r} shapes a model from scratch, but "
      f"config.init.pretrained={name!r} has a shape of its own: leave the name empty, "
      'or set --config.init.pretrained="".'
    )
  if config.init.inherit:
    raise UserError(
      f"config.init.inherit={config.init.inherit!r} cuts the first weights of a model "
      f"from scratch, but config.init.pretrained={name!r} has them: set one of the two."
    )
  encoder = _text_encoder(name)
  if encoder is not None:
    return _begun(config, fusion, encoder)
  _refuse_tower(config)
  shape, its_fusion, params, processor = read_weights(name, config.tokenizer.path)
  if dataclasses.replace(its_fusion, learned=fusion.learned) != fusion:
    print(
      f"note: {name} fuses by {its_fusion}, this run by {fusion} (config.fusion)",
      file=sys.stderr,
    )
  weights = params.get("fusion") or {
    "image_weight": np.float32(fusion.image_weight),
    "text_weight": np.float32(fusion.text_weight),
  }
  params = {part: tree for part, tree in params.items() if part != "fusion"}
  if fusion.learned:
    params["fusion"] = weights
  start = functools.partial(_with_scale, config, params)
  return Start(_build(config, shape, fusion), processor, start)


def _refuse_tower(config: ConfigDict) -> None:
  if config.init.image_tower:
    raise UserError(
      f"config.init.image_tower={config.init.image_tower!r} is of a VISTA that begins from "
      f"a text encoder, and config.init.pretrained={config.init.pretrained!r} is none: "
      "name one there, or leave the image tower empty."
    )


def _text_encoder(name: str) -> Path | None:
  """The folder of a text encoder alone; None if it is something else."""
  if is_run(name) or Path(name).expanduser().is_file():
    return None
  folder = local_folder(name)
  return folder if is_text_encoder(folder) else None


def _begun(config: ConfigDict, fusion: FusionSettings, folder: Path) -> Start:
  """A VISTA of a trained text encoder."""
  tower, given = config.init.image_tower, config.model.hf.to_dict()
  fields = given.get("vision_config")
  if given.get("text_config"):
    raise UserError(
      "config.model.hf.text_config shapes a text encoder from scratch, but "
      f"config.init.pretrained={str(folder)!r} is one that is trained: leave it out."
    )
  if tower and (fields or config.model.image_size):
    raise UserError(
      f"config.init.image_tower={tower!r} has sizes of its own: leave "
      "config.model.hf.vision_config and config.model.image_size as they are, or the "
      "file out."
    )
  if not (tower or fields):
    raise UserError(
      f"config.init.pretrained={str(folder)!r} is a text encoder alone, from which a "
      "VISTA begins: name an EVA-CLIP file in config.init.image_tower, or give "
      "config.model.hf.vision_config for an image tower from scratch."
    )
  drawn = not tower
  if drawn:
    size = {"image_size": config.model.image_size} if config.model.image_size else {}
    tower = eva_from_hf(_merged(fields, size) if isinstance(fields, dict) else fields)
  words = own_tokenizer(folder, config.tokenizer.path)
  images = Processor.images_from_folder(folder)
  shape, params = read_towers(folder, tower, config.seed)
  if drawn:
    positions = params["vision"]["position_embedding"]
    positions["embedding"] *= np.float32(config.init.vision_positions)
  processor = Processor(images, fitting_tokenizer(words, shape, folder))
  start = functools.partial(_with_scale, config, params)
  return Start(_build(config, shape, fusion), with_size_of(processor, shape), start)


def _is_vista(fields: dict) -> bool:
  return fields.get("model_type") == VistaConfig.model_type


def _elder(config: ConfigDict) -> str:
  """Whose tokenizer and image processor a model from scratch takes; "" for its own."""
  return config.init.inherit or config.distill.teacher


def _heir(config: ConfigDict, model: Model) -> Callable[[], Any]:
  larger = read_weights(config.init.inherit, config.tokenizer.path)
  if any(isinstance(shape, VistaConfig) for shape in (larger.config, model.config)):
    raise UserError(
      f"config.init.inherit={config.init.inherit!r}: weights are inherited from CLIP to CLIP, "
      "and one of the two is a VISTA."
    )
  params = inherited(larger.params, larger.config, model.config)
  if "fusion" in model.abstract():
    params["fusion"] = {
      "image_weight": np.float32(config.fusion.image_weight),
      "text_weight": np.float32(config.fusion.text_weight),
    }
  return functools.partial(_with_scale, config, params)


def _fields(config: ConfigDict) -> dict:
  """The Hugging Face config of a model from scratch, without its vocabulary."""
  if not config.model.name and not len(config.model.hf):
    raise UserError(
      "nothing to start from: set config.init.pretrained to a folder or hub id, or "
      "config.model.name to a named shape."
    )
  fields = shape_of_name(config.model.name).to_hf() if config.model.name else {}
  fields = _merged(fields, config.model.hf.to_dict())
  if config.model.image_size:
    size = {"vision_config": {"image_size": config.model.image_size}}
    fields = _merged(fields, size)
  return fields


def _from_scratch(
  config: ConfigDict, fusion: FusionSettings, source: Source
) -> tuple[Model, Processor]:
  fields = _fields(config)
  elder, tokenizer = _elder(config), _given_tokenizer(config)
  if tokenizer is None and _is_vista(fields):
    raise UserError(
      "a VISTA from scratch needs the vocabulary of a text encoder: name a folder with "
      "its tokenizer files in config.tokenizer.path."
    )
  if tokenizer is None:
    tokenizer = Tokenizer.train(
      _captions(source, config.seed),
      config.tokenizer.vocab_size,
      config_from_dict(fields).text.context,
    )
  shape = config_from_dict(_merged(fields, {"text_config": _words(tokenizer)}))
  tokenizer = fitting_tokenizer(tokenizer, shape, _SCRATCH)
  default = default_vista_processor if _is_vista(fields) else default_clip_processor
  processor = default(shape.vision.image_size, tokenizer)
  if elder:
    images = read_processor(elder, config.tokenizer.path).image
    processor = dataclasses.replace(processor, image=images)
  return _build(config, shape, fusion), processor


def _words(tokenizer: Tokenizer | EncoderTokenizer) -> dict[str, int]:
  return {
    "vocab_size": tokenizer.vocab_size,
    "bos_token_id": tokenizer.bos_id,
    "eos_token_id": tokenizer.eos_id,
    "pad_token_id": tokenizer.pad_id,
  }


def _merged(base: dict, over: dict) -> dict:
  merged = dict(base)
  for name, value in over.items():
    both = isinstance(value, dict) and isinstance(merged.get(name), dict)
    merged[name] = _merged(merged[name], value) if both else value
  return merged


def _captions(source: Source, seed: int) -> Iterator[str]:
  """Every caption of up to so many records, a seeded sample where there are more."""
  indices = range(len(source))
  if len(source) > _TOKENIZER_SAMPLE:
    indices = sorted(random.Random(seed).sample(indices, _TOKENIZER_SAMPLE))
  for index in indices:
    yield from source[index]["texts"]
