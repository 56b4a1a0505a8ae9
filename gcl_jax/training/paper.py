"""The paper's recipe: what the fine-tunings of every pretrained family have in common.

From the paper (arXiv 2509.25638): the start from a pretrained model, the data (pairs
only), the loss over all six directions with equal weights, score fusion by addition.
Everything marked "ours" is not stated there.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from gcl_jax.training.config import default_config


def paper_recipe() -> ConfigDict:
  """A run's fields for the fine-tuning of a pretrained model on plain pairs."""
  config = default_config()
  config.batch_size = 1024  # ours
  config.epochs = 1.0  # ours
  config.optimizer.learning_rate = 1e-5  # ours: UniIR's, for models of this family
  config.optimizer.warmup_steps = 0  # ours, as UniIR
  config.optimizer.weight_decay = 0.2  # ours: CLIP's
  config.optimizer.clip_norm = 1.0  # ours
  config.temperature.mode = "learned"  # ours: from the checkpoint, capped at 100
  config.data.augment = "none"  # ours
  return config
