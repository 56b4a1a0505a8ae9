"""The losses: pure functions of unit embeddings, a scale and who is who."""

from gcl_jax.losses.affinity import affinity_loss
from gcl_jax.losses.gcl import contrastive_loss, gcl_loss
from gcl_jax.losses.separation import intra_modal_separation_loss

__all__ = [
  "affinity_loss",
  "contrastive_loss",
  "gcl_loss",
  "intra_modal_separation_loss",
]
