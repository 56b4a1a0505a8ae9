"""The paper's recipe on TinyCLIP: fine-tune a pretrained model on plain pairs.

    python -m gcl_jax.train --config=configs/tinyclip.py --config.data.path=data/flickr8k

It starts from the published ViT-40M-32-Text-19M; a variant names another of the four
published ViTs: `configs/tinyclip.py:8M`, `:39M`, `:40M`, `:61M`. A folder on disk:
`--config.init.pretrained=<folder>`. From scratch:
`--config.init.pretrained="" --config.model.name=TinyCLIP-ViT-8M-16-Text-3M`.

From the paper (arXiv 2509.25638): the start from a pretrained model, the data (pairs
only), the loss over all six directions with equal weights, score fusion by addition.
Everything marked "ours" is not stated there.
"""

from gcl_jax.errors import UserError
from gcl_jax.training.config import default_config

_HUB = {
  "8M": "wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M",
  "39M": "wkcn/TinyCLIP-ViT-39M-16-Text-19M-YFCC15M",
  "40M": "wkcn/TinyCLIP-ViT-40M-32-Text-19M-LAION400M",
  "61M": "wkcn/TinyCLIP-ViT-61M-32-Text-29M-LAION400M",
}


def get_config(variant: str = "40M"):
  """Fine-tuning of a TinyCLIP; `variant` is 8M, 39M, 40M or 61M."""
  if variant not in _HUB:
    raise UserError(f"configs/tinyclip.py:{variant}: there are {', '.join(_HUB)}.")
  config = default_config()
  config.name = f"tinyclip_{variant}"
  config.init.pretrained = _HUB[variant]

  config.batch_size = 1024  # ours
  config.epochs = 1.0  # ours
  config.optimizer.learning_rate = 1e-5  # ours: UniIR's, for models of this family
  config.optimizer.warmup_steps = 0  # ours, as UniIR
  config.optimizer.weight_decay = 0.2  # ours: CLIP's
  config.optimizer.clip_norm = 1.0  # ours
  config.temperature.mode = "learned"  # ours: from the checkpoint, capped at 100
  config.data.augment = "none"  # ours
  return config
