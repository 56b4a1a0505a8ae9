"""Generalized Contrastive Learning (arXiv 2509.25638) for CLIP-family retrievers.

One legend for the whole project: n local pairs (of one device), N global pairs, D the
embedding width, L tokens, W the width of a tower, S the side of an image in pixels.
`image`, `text` and `fused` are the three modalities, always in that order.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from gcl_jax._version import __version__

if TYPE_CHECKING:
  from gcl_jax.fusion import Mix, score_fusion
  from gcl_jax.losses import contrastive_loss, gcl_loss
  from gcl_jax.retrieval import load

# Resolved on first use, so that `import gcl_jax` is quick and touches no device.
_HOME = {
  "load": "gcl_jax.retrieval",
  "gcl_loss": "gcl_jax.losses",
  "contrastive_loss": "gcl_jax.losses",
  "score_fusion": "gcl_jax.fusion",
  "Mix": "gcl_jax.fusion",
}

__all__ = [
  "Mix",
  "__version__",
  "contrastive_loss",
  "gcl_loss",
  "load",
  "score_fusion",
]


def __getattr__(name: str):
  if name in _HOME:
    return getattr(importlib.import_module(_HOME[name]), name)
  raise AttributeError(f"module 'gcl_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted(__all__)
