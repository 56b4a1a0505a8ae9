"""What a run starts from: a model, its first parameters, and its processor."""

from __future__ import annotations

import dataclasses
import functools
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from gcl_jax.checkpoints import RunDescription
from gcl_jax.data import Source
from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings
from gcl_jax.models import CLIPConfig, Model, build, find_tokenizer, named_config
from gcl_jax.models.inherit import inherited
from gcl_jax.processing import Processor, Tokenizer, default_clip_processor
from gcl_jax.training.weights import read_processor, read_weights

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
      `model.name` and `model.hf`.
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
  fields = _fields(config)
  if config.tokenizer.path:
    words = _words(find_tokenizer(config.tokenizer.path))
  elif _elder(config):
    words = _words(read_processor(_elder(config)).tokenizer)
  else:
    entries = config.tokenizer.vocab_size
    words = {"vocab_size": entries, "eos_token_id": entries - 1}
    words |= {"bos_token_id": entries - 2, "pad_token_id": entries - 1}
  fields = _merged(fields, {"text_config": words})
  return _build(config, CLIPConfig.from_hf(fields), _fusion(config))


def _fusion(config: ConfigDict) -> FusionSettings:
  return FusionSettings(
    of=config.fusion.of,
    image_weight=config.fusion.image_weight,
    text_weight=config.fusion.text_weight,
    learned=config.fusion.learned,
  )


def _build(config: ConfigDict, shape: CLIPConfig, fusion: FusionSettings) -> Model:
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


def _elder(config: ConfigDict) -> str:
  """Whose tokenizer and image processor a model from scratch takes; "" for its own."""
  return config.init.inherit or config.distill.teacher


def _heir(config: ConfigDict, model: Model) -> Callable[[], Any]:
  larger = read_weights(config.init.inherit, config.tokenizer.path)
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
  fields = named_config(config.model.name).to_hf() if config.model.name else {}
  fields = _merged(fields, config.model.hf.to_dict())
  if config.model.image_size:
    size = {"vision_config": {"image_size": config.model.image_size}}
    fields = _merged(fields, size)
  return fields


def _from_scratch(
  config: ConfigDict, fusion: FusionSettings, source: Source
) -> tuple[Model, Processor]:
  fields = _fields(config)
  elder = _elder(config)
  if config.tokenizer.path:
    tokenizer = find_tokenizer(config.tokenizer.path)
  elif elder:
    tokenizer = read_processor(elder).tokenizer
  else:
    tokenizer = Tokenizer.train(
      _captions(source, config.seed),
      config.tokenizer.vocab_size,
      CLIPConfig.from_hf(fields).text.context,
    )
  shape = CLIPConfig.from_hf(_merged(fields, {"text_config": _words(tokenizer)}))
  processor = default_clip_processor(shape.vision.image_size, tokenizer)
  if elder:
    images = read_processor(elder, config.tokenizer.path).image
    processor = dataclasses.replace(processor, image=images)
  return _build(config, shape, fusion), processor


def _words(tokenizer: Tokenizer) -> dict[str, int]:
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
