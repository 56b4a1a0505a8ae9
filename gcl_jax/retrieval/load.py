"""`gcl_jax.load`: an `Embedder` from wherever a model lies."""

from __future__ import annotations

import os

from jax.sharding import Mesh

from gcl_jax.errors import UserError
from gcl_jax.models import build, read_model, refuse_other_words
from gcl_jax.retrieval.embedder import Embedder


def load(
  source: str | os.PathLike,
  *,
  step: int | None = None,
  tokenizer: str = "",
  dtype: str = "float32",
  mesh: Mesh | None = None,
  batch_size: int = 64,
) -> Embedder:
  """A model ready to embed.

  Args:
    source: a run's folder (`--workdir` of a training), a CLIP folder of Hugging Face's
      or OpenCLIP's, the id of one on the hub, or a file of weights: OpenAI's `.pt`,
      OpenCLIP's with `open_clip_config.json` beside it, TinyCLIP's `.pt`; or a VISTA's
      `.pth` beside its text encoder's files.
    step: of a run, which checkpoint; None is the newest.
    tokenizer: of a model that has none of its own: a folder, a hub id or a file with
      CLIP's vocabulary; "" looks beside the weights.
    dtype: in which the model computes; a run keeps its own.
    mesh: by default one of all local devices.
    batch_size: the most documents at once, over all devices.

  Raises:
    UserError: nothing of the kind is there, a file is missing or does not fit, or the
      hub cannot be reached; says how to mend it.
  """
  from gcl_jax.checkpoints import is_run, read_run  # Orbax: slow to import

  if is_run(source):
    model, params, processor, config = read_run(source, step)
    refuse_other_words(processor.tokenizer, tokenizer, source)
  elif step is not None:
    raise UserError(f"{source} is not a run's folder: it has no step {step}.")
  else:
    config, fusion, params, processor = read_model(source, tokenizer)
    model = build(config, fusion=fusion, dtype=dtype)
  return Embedder(
    model, params, processor, mesh=mesh, batch_size=batch_size, config=config
  )
