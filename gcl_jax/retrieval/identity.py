"""What tells whether two embedders give the same vectors."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gcl_jax.fusion import ENCODER
from gcl_jax.retrieval.embedder import Embedder
from gcl_jax.sharding import path_of


def identity(embedder: Embedder) -> dict[str, Any]:
  """Digests of the weights and of the processor's files, the fusion, the width."""
  by_itself, settings = embedder.fuses_by_itself, embedder.model.fusion
  return {
    "weights": _digest_of_params(embedder.params),
    "processor": _digest_of_processor(embedder.processor),
    "fusion": {"of": ENCODER} if by_itself else settings.to_dict(),
    "dimension": int(embedder.model.config.projection_dim),
  }


def _digest_of_params(params: Any) -> str:
  digest = hashlib.sha256()
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = np.ascontiguousarray(leaf)
    digest.update(f"{path_of(key_path)} {array.dtype} {array.shape}\n".encode())
    digest.update(array.reshape(-1).view(np.uint8))
  return digest.hexdigest()


def _digest_of_processor(processor: Any) -> str:
  digest = hashlib.sha256()
  with tempfile.TemporaryDirectory(prefix="gcl_jax_") as here:
    processor.save(here)
    for file in sorted(Path(here).iterdir()):
      digest.update(file.name.encode() + b"\n" + file.read_bytes())
  return digest.hexdigest()
