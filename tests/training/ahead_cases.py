"""A config whose model needs no data to be built."""

from gcl_jax.training.config import default_config


def tiny_config():
  """One layer a tower, pictures of 16 pixels, 32 pairs."""
  config = default_config()
  config.batch_size = 32
  tower = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
  tower["num_hidden_layers"] = 1
  config.model.hf = {
    "projection_dim": 8,
    "vision_config": {**tower, "image_size": 16, "patch_size": 8},
    "text_config": {**tower, "max_position_embeddings": 8},
  }
  config.tokenizer.vocab_size = 514
  return config
