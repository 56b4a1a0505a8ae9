"""A model by whatever name a user gives it, and the data that it was trained on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from ml_collections import ConfigDict

from gcl_jax.errors import UserError

if TYPE_CHECKING:
  from gcl_jax.retrieval import Embedder


class Opened(NamedTuple):
  """What a command line works with.

  Attributes:
    embedder: the model, ready to embed.
    data: a run's own config.data, completed by defaults; of anything else the defaults.
    is_run: whether the checkpoint is a run's.
    step: the run's step that was chosen; None of anything else.
    notes: lines that stand below a table of its results.
  """

  embedder: Embedder
  data: ConfigDict
  is_run: bool
  step: int | None
  notes: list[str]


def open_model(
  checkpoint: str | os.PathLike, step: str = "latest", *, batch_size: int = 64
) -> Opened:
  """Loads a model as `--checkpoint` and `--step` name it.

  Args:
    checkpoint: a run's folder, a Hugging Face folder, or a hub id.
    step: of a run: latest, best, or a number.
    batch_size: the most documents at once, over all devices.

  Raises:
    UserError: no name, nothing of the kind there, no such step.
  """
  if not checkpoint:
    raise UserError(
      "name a model: --checkpoint=<a run's folder, a HF folder, a hub id>"
    )
  from gcl_jax.checkpoints import is_run, read_description
  from gcl_jax.evaluation import choose_step
  from gcl_jax.retrieval import load
  from gcl_jax.training.check import describe_loss
  from gcl_jax.training.config import default_config

  data = default_config().data
  if not is_run(checkpoint):
    return Opened(load(checkpoint, batch_size=batch_size), data, False, None, [])
  stored = read_description(checkpoint).config
  for name in data:
    if name in stored.data:
      with data.ignore_type():
        data[name] = stored.data[name]
  chosen = choose_step(checkpoint, step, stored.eval.best)
  embedder = load(checkpoint, step=chosen, batch_size=batch_size)
  return Opened(embedder, data, True, chosen, [describe_loss(stored)])
