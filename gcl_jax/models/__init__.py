"""CLIP, TinyCLIP and VISTA: shapes, the flax.nnx models, files of every kind in and out."""

from gcl_jax.models.clip import CLIP
from gcl_jax.models.config import (
  NAMES,
  CLIPConfig,
  ResNetConfig,
  TextConfig,
  VisionConfig,
  named_config,
)
from gcl_jax.models.huggingface import local_folder
from gcl_jax.models.model import (
  Config,
  Model,
  build,
  config_from_dict,
  shape_of_name,
)
from gcl_jax.models.pretrained import (
  Pretrained,
  find_tokenizer,
  fitting_tokenizer,
  own_tokenizer,
  read_model,
  read_pretrained,
  read_without_weights,
  refuse_other_words,
  with_size_of,
  write_pretrained,
)
from gcl_jax.models.vista import Vista
from gcl_jax.models.vista_config import VISTA_SHAPES, VistaConfig, eva_from_hf
from gcl_jax.models.vista_files import PTH, is_text_encoder, read_towers, write_vista

__all__ = [
  "CLIP",
  "NAMES",
  "PTH",
  "VISTA_SHAPES",
  "CLIPConfig",
  "Config",
  "Model",
  "Pretrained",
  "ResNetConfig",
  "TextConfig",
  "VisionConfig",
  "Vista",
  "VistaConfig",
  "build",
  "config_from_dict",
  "eva_from_hf",
  "find_tokenizer",
  "fitting_tokenizer",
  "is_text_encoder",
  "local_folder",
  "named_config",
  "own_tokenizer",
  "read_model",
  "read_pretrained",
  "read_towers",
  "read_without_weights",
  "refuse_other_words",
  "shape_of_name",
  "with_size_of",
  "write_pretrained",
  "write_vista",
]
