"""A small CLIP from scratch on a folder of pairs, for a machine without an accelerator.

    python -m gcl_jax.train --config=configs/small.py --config.data.path=data/flickr8k

2 million parameters at 96 px, a vocabulary learned from the captions: minutes on two
CPU cores for some thousand pictures. It is how the losses are compared on real pairs
where a pretrained model is not at hand; for a model to use, see configs/tinyclip.py.
"""

from gcl_jax.training.config import default_config


def get_config():
  """From scratch on pairs: twelve epochs of Flickr8k in about five minutes."""
  config = default_config()
  config.name = "small"
  config.steps = 520
  config.batch_size = 128

  config.model.hf.projection_dim = 128
  config.model.hf.vision_config = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": 96,
    "patch_size": 16,
    "hidden_act": "quick_gelu",
  }
  config.model.hf.text_config = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 32,
    "hidden_act": "quick_gelu",
  }
  config.model.hf.logit_scale_init_value = 2.6592
  config.tokenizer.vocab_size = 4096

  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 30
  config.optimizer.weight_decay = 0.1

  config.data.augment = "crop_flip"
  config.data.text_buckets = (16, 24, 32)
  config.eval.batch_size = 256
  config.checkpoint.every = 200
  return config
