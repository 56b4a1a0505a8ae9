"""A model that is there already: a run's, a folder's or the hub's."""

from __future__ import annotations

from typing import Any, NamedTuple

from gcl_jax.checkpoints import is_run, read_description, read_run
from gcl_jax.fusion import FusionSettings
from gcl_jax.models import CLIPConfig, local_folder, read_pretrained
from gcl_jax.processing import Processor


class Weights(NamedTuple):
  """What a model's files hold; `params` are NumPy arrays, `fusion` among them if learned."""

  config: CLIPConfig
  fusion: FusionSettings
  params: Any
  processor: Processor


def read_weights(name: str) -> Weights:
  """Reads a model.

  Args:
    name: a run's folder (its newest checkpoint), a Hugging Face folder, or a hub id.

  Raises:
    UserError: nothing of the kind is there, or it does not fit together.
  """
  if is_run(name):
    model, params, processor, _ = read_run(name)
    return Weights(model.config, model.fusion, params, processor)
  folder = local_folder(name)
  processor = Processor.from_folder(folder)  # before the weights: quick to fail
  return Weights(*read_pretrained(folder), processor)


def read_processor(name: str) -> Processor:
  """The processor alone; arguments and errors as `read_weights`."""
  if is_run(name):
    return read_description(name).processor
  return Processor.from_folder(local_folder(name))
