"""The embedded default: a small CLIP learns procedural scenes, on any machine.

    python -m gcl_jax.train --config=configs/demo.py

No download and no file; about two minutes on two CPU cores. `logit_scale` is fixed
at 100, where pretrained CLIP models have it: that is where plain contrastive training
leaves a modality gap, and where the loss shows its effect. Variants, to compare:

    python -m gcl_jax.train --config=configs/demo.py:contrastive
    python -m gcl_jax.train --config=configs/demo.py:literal      (or another denominator)
"""

from gcl_jax.errors import UserError
from gcl_jax.training.config import default_config

_LOSSES = ("self_masked", "literal", "clean", "cross_only", "target_only")


def get_config(variant: str = "self_masked"):
  """The demo; `variant` is a denominator of the loss, or contrastive."""
  if variant not in (*_LOSSES, "contrastive"):
    raise UserError(
      f"configs/demo.py:{variant}: the variants are contrastive, {', '.join(_LOSSES)}."
    )
  config = default_config()
  config.name = "demo" if variant == "self_masked" else f"demo_{variant}"
  config.steps = 300
  config.batch_size = 128

  config.model.hf.projection_dim = 128
  config.model.hf.vision_config = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": 64,
    "patch_size": 16,
    "hidden_act": "quick_gelu",
  }
  config.model.hf.text_config = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 24,
    "hidden_act": "quick_gelu",
  }
  config.tokenizer.vocab_size = 640
  config.init.vision_positions = 10.0

  if variant == "contrastive":
    config.loss.name = "contrastive"
  else:
    config.loss.denominator = variant
  config.temperature.mode = "fixed"
  config.temperature.logit_scale = 100.0

  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 30
  config.optimizer.weight_decay = 0.05
  config.optimizer.clip_norm = 1.0

  config.data.source = "scenes"
  config.data.text_buckets = (20, 24)
  config.eval.batch_size = 256
  config.checkpoint.every = 100
  return config
