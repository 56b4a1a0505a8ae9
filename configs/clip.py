"""The paper's recipe on OpenAI's CLIP: fine-tune a pretrained model on plain pairs.

    python -m gcl_jax.train --config=configs/clip.py:L14 --config.data.path=data/flickr8k

Variants: `:B32` (the default), `:B16`, `:L14` (the paper's CLIP-SF), `:L14_336`. A
folder on disk: `--config.init.pretrained=<folder>`.

From the paper (arXiv 2509.25638): the start from a pretrained model, the data (pairs
only), the loss over all six directions with equal weights, score fusion by addition.
Everything marked "ours" is not stated there.
"""

from gcl_jax.errors import UserError
from gcl_jax.training.config import default_config

_HUB = {
  "B32": "openai/clip-vit-base-patch32",
  "B16": "openai/clip-vit-base-patch16",
  "L14": "openai/clip-vit-large-patch14",
  "L14_336": "openai/clip-vit-large-patch14-336",
}


def get_config(variant: str = "B32"):
  """Fine-tuning of a CLIP; `variant` is B32, B16, L14 or L14_336."""
  if variant not in _HUB:
    raise UserError(f"configs/clip.py:{variant}: there are {', '.join(_HUB)}.")
  config = default_config()
  config.name = f"clip_{variant}"
  config.init.pretrained = _HUB[variant]

  config.model.dtype = "bfloat16"  # ours; float32 on CPU
  config.model.remat = "full"  # ours: what the backward pass recomputes
  config.batch_size = 1024  # ours
  config.epochs = 1.0  # ours
  config.optimizer.learning_rate = 1e-5  # ours: UniIR's
  config.optimizer.warmup_steps = 0  # ours, as UniIR
  config.optimizer.weight_decay = 0.2  # ours: CLIP's
  config.optimizer.clip_norm = 1.0  # ours
  config.temperature.mode = "learned"  # ours: from the checkpoint, capped at 100
  config.data.augment = "none"  # ours
  return config
