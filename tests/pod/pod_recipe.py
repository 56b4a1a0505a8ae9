"""A recipe for the tests of several processes: the demo, as small as it can be."""

import importlib.util
from pathlib import Path

_DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.py"


def get_config():
  """One layer a tower, pictures of 32 pixels, 30 steps over 100 scenes."""
  spec = importlib.util.spec_from_file_location("demo", _DEMO)
  demo = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(demo)
  config = demo.get_config()
  config.name = "pod"
  config.steps, config.batch_size = 30, 16
  tower = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
  }
  config.model.hf.projection_dim = 32
  config.model.hf.vision_config.update(tower | {"image_size": 32})
  config.model.hf.text_config.update(tower)
  config.tokenizer.vocab_size = 618
  config.optimizer.warmup_steps = 3
  config.data.scenes_train_size = 100
  config.data.scenes_image_size = 32
  # So cut that the longest texts of two processes often fall in different buckets.
  config.data.text_buckets = (22, 24)
  config.data.threads = config.data.prefetch = 1
  config.eval.before = False
  config.eval.max_items = 24
  config.checkpoint.every = 5
  config.log.every = 1
  config.log.tensorboard = False
  return config
