"""The paper's recipe on VISTA, its headline model: fine-tune on plain pairs.

    python -m gcl_jax.train --config=configs/vista.py \\
        --config.init.pretrained=<folder> --config.data.path=data/flickr8k

The folder holds a published `.pth` (Visualized_base_en_v1.5.pth or Visualized_m3.pth, of
BAAI/bge-visualized) beside the files of its text encoder (config.json and tokenizer of
BAAI/bge-base-en-v1.5, or BAAI/bge-m3).

The paper starts before VISTA's second stage, whose weights were not published. To train
the first stage oneself, `configs/vista.py:stage1` begins from a text encoder and an
EVA-CLIP file, and keeps the encoder as it is:

    python -m gcl_jax.train --config=configs/vista.py:stage1 \\
        --config.init.pretrained=BAAI/bge-base-en-v1.5 \\
        --config.init.image_tower=EVA02_CLIP_B_psz16_s8B.pt --config.data.path=...

`configs/vista.py:small` is VISTA's form at a size for two CPU cores: MiniLM's text encoder
(22.6 million parameters, trained) and an image tower of 2 million from scratch.

    python -m gcl_jax.train --config=configs/vista.py:small --config.data.path=data/flickr8k

What is the paper's and what is ours: `gcl_jax/training/paper.py`.
"""

from gcl_jax.errors import UserError
from gcl_jax.training.paper import paper_recipe


def get_config(variant: str = "finetune"):
  """Fine-tuning of a VISTA; `variant` is finetune, stage1 or small."""
  if variant not in ("finetune", "stage1", "small"):
    raise UserError(f"configs/vista.py:{variant}: there are finetune, stage1, small.")
  config = paper_recipe()
  config.name = f"vista_{variant}"
  if variant == "stage1":
    config.optimizer.locked_tower = "text"  # VISTA's

  # VISTA's own: the temperature is 0.02 and stays so, the learning rate 2e-5.
  config.temperature.mode = "fixed"
  config.temperature.logit_scale = 50.0
  config.optimizer.learning_rate = 2e-5
  config.optimizer.weight_decay = 0.0

  # Ours: as configs/clip.py.
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  if variant == "small":
    _shrink(config)
  return config


def _shrink(config):
  config.init.pretrained = "sentence-transformers/all-MiniLM-L6-v2"
  config.model.hf.vision_config = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 512,
    "image_size": 96,
    "patch_size": 16,
    "projection_dim": 64,
  }
  config.model.dtype = "float32"
  config.model.remat = "pointwise"
  config.batch_size = 64
  config.steps = 300
  config.optimizer.learning_rate = 3e-4
  config.optimizer.multipliers = (("text/.*", 0.1),)  # it is trained, the tower is not
  config.optimizer.warmup_steps = 30
  config.data.augment = "crop_flip"
  config.data.text_buckets = (16, 24, 32)
  config.eval.batch_size = 128
  config.checkpoint.every = 100
