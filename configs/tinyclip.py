"""The paper's recipe on TinyCLIP: fine-tune a pretrained model on plain pairs.

    python -m gcl_jax.train --config=configs/tinyclip.py --config.data.path=data/flickr8k

It starts from the published ViT-40M-32-Text-19M; a variant names another of the four
published ViTs: `configs/tinyclip.py:8M`, `:39M`, `:40M`, `:61M`. A folder on disk:
`--config.init.pretrained=<folder>`. The pruned models and the ResNets are files of the
release: `--config.init.pretrained=TinyCLIP-auto-ViT-45M-32-Text-18M-LAION400M.pt`, with
CLIP's vocabulary beside it or in `--config.tokenizer.path`. From scratch:
`--config.init.pretrained="" --config.model.name=TinyCLIP-ViT-8M-16-Text-3M`.

What is the paper's and what is ours: `gcl_jax/training/paper.py`.
"""

from gcl_jax.errors import UserError
from gcl_jax.training.paper import paper_recipe

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
  config = paper_recipe()
  config.name = f"tinyclip_{variant}"
  config.init.pretrained = _HUB[variant]
  return config
