"""CLIP and TinyCLIP: shapes, the flax.nnx model, files of every kind in and out."""

from gcl_jax.models.clip import CLIP, Model, build
from gcl_jax.models.config import (
  NAMES,
  CLIPConfig,
  ResNetConfig,
  TextConfig,
  VisionConfig,
  named_config,
)
from gcl_jax.models.huggingface import local_folder, read_pretrained, write_pretrained
from gcl_jax.models.pretrained import Pretrained, find_tokenizer, read_model

__all__ = [
  "CLIP",
  "NAMES",
  "CLIPConfig",
  "Model",
  "Pretrained",
  "ResNetConfig",
  "TextConfig",
  "VisionConfig",
  "build",
  "find_tokenizer",
  "local_folder",
  "named_config",
  "read_model",
  "read_pretrained",
  "write_pretrained",
]
