"""Trains a TinyCLIP: weights cut out of a larger CLIP, its affinities learned, and GCL.

    python -m gcl_jax.train --config=configs/tinyclip_distill.py \
      --config.data.path=data/flickr8k

The student is TinyCLIP's ViT-61M-32-Text-29M (variant `:61M`), three quarters of its
teacher, OpenCLIP's ViT-B/32 of LAION-2B, from whom it takes its first weights. In the
release its own student is the next one, ViT-40M-32-Text-19M (variant `:40M`), which takes
them from the published 61M. Other teachers and students:
`--config.distill.teacher=<folder, hub id or run> --config.init.inherit=<the same>
--config.model.name=...`; an empty `init.inherit` starts from random weights.

TinyCLIP itself (arXiv 2309.12314) learns the affinities of image and text alone, for six
epochs of 400 million pairs: `--config.distill.loss_weight=0
--config.distill.direction_weights="(0,1,0, 1,0,0, 0,0,0)"`.
"""

from gcl_jax.errors import UserError
from gcl_jax.training.paper import paper_recipe

_TEACHER = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
# Name of the student, and whose weights it cuts its own from.
_STUDENTS = {
  "61M": ("TinyCLIP-ViT-61M-32-Text-29M", _TEACHER),
  "40M": (
    "TinyCLIP-ViT-40M-32-Text-19M",
    "wkcn/TinyCLIP-ViT-61M-32-Text-29M-LAION400M",
  ),
}


def get_config(variant: str = "61M"):
  """Distillation of a TinyCLIP; `variant` is 61M or 40M."""
  if variant not in _STUDENTS:
    known = ", ".join(_STUDENTS)
    raise UserError(f"configs/tinyclip_distill.py:{variant}: there are {known}.")
  config = paper_recipe()
  config.name = f"tinyclip_distill_{variant}"
  config.model.name, config.init.inherit = _STUDENTS[variant]
  config.distill.teacher = _TEACHER
  config.distill.logit_scale = 50.0  # TinyCLIP's, of both
  config.temperature.logit_scale = 50.0
  config.temperature.mode = "fixed"
  config.optimizer.learning_rate = 1e-4  # TinyCLIP's
  config.optimizer.b2 = 0.98
  config.optimizer.clip_norm = 5.0
  return config
