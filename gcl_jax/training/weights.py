"""A model that is there already: a run's, a folder's or the hub's."""

from __future__ import annotations

from typing import Any, NamedTuple

from gcl_jax.checkpoints import is_run, read_description, read_run
from gcl_jax.fusion import FusionSettings
from gcl_jax.models import (
  Config,
  read_model,
  read_without_weights,
  refuse_other_words,
)
from gcl_jax.processing import Processor


class Weights(NamedTuple):
  """What a model's files hold; `params` are NumPy arrays, `fusion` among them if learned."""

  config: Config
  fusion: FusionSettings
  params: Any
  processor: Processor


def read_weights(name: str, tokenizer: str = "") -> Weights:
  """Reads a model.

  Args:
    name: a run's folder (its newest checkpoint), or what `models.read_model` reads.
    tokenizer: the vocabulary of weights that come without one.

  Raises:
    UserError: nothing of the kind is there, or it does not fit together.
  """
  if is_run(name):
    refuse_other_words(read_description(name).processor.tokenizer, tokenizer, name)
    model, params, processor, _ = read_run(name)
    return Weights(model.config, model.fusion, params, processor)
  return Weights(*read_model(name, tokenizer))


def read_processor(name: str, tokenizer: str = "") -> Processor:
  """The processor alone; arguments and errors as `read_weights`."""
  if is_run(name):
    processor = read_description(name).processor
    refuse_other_words(processor.tokenizer, tokenizer, name)
    return processor
  return read_without_weights(name, tokenizer)[2]


def read_shape(name: str, tokenizer: str = "") -> tuple[Config, FusionSettings]:
  """The shape and how it fuses; arguments and errors as `read_weights`."""
  if is_run(name):
    stored = read_description(name)
    return stored.model, stored.fusion
  return read_without_weights(name, tokenizer)[:2]
