"""The paper's recipe on OpenAI's CLIP: fine-tune a pretrained model on plain pairs.

    python -m gcl_jax.train --config=configs/clip.py:L14 --config.data.path=data/flickr8k

Variants: `:B32` (the default), `:B16`, `:L14` (the paper's CLIP-SF), `:L14_336`. A
folder on disk: `--config.init.pretrained=<folder>`.

What is the paper's and what is ours: `gcl_jax/training/paper.py`.
"""

from gcl_jax.errors import UserError
from gcl_jax.training.paper import paper_recipe

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
  config = paper_recipe()
  config.name = f"clip_{variant}"
  config.init.pretrained = _HUB[variant]

  # Ours, on every machine: computes in bfloat16 (parameters stay float32) and computes
  # activations again in the backward pass, so that L/14 fits. Where bfloat16 is slow (a
  # CPU without it): --config.model.dtype=float32.
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  return config
