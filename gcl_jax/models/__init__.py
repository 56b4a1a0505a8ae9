"""CLIP and TinyCLIP: shapes, the flax.nnx model, Hugging Face folders in and out."""

from gcl_jax.models.clip import CLIP, Model, build
from gcl_jax.models.config import (
  NAMES,
  CLIPConfig,
  TextConfig,
  VisionConfig,
  named_config,
)
from gcl_jax.models.huggingface import local_folder, read_pretrained, write_pretrained

__all__ = [
  "CLIP",
  "NAMES",
  "CLIPConfig",
  "Model",
  "TextConfig",
  "VisionConfig",
  "build",
  "local_folder",
  "named_config",
  "read_pretrained",
  "write_pretrained",
]
