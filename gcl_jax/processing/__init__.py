"""Pictures and texts to arrays, equal to Hugging Face's CLIP processors."""

from gcl_jax.processing.decode import ImageError, decode_image
from gcl_jax.processing.image import ImageProcessor
from gcl_jax.processing.processor import Processor, default_clip_processor
from gcl_jax.processing.tokenizer import Tokenizer

__all__ = [
  "ImageError",
  "ImageProcessor",
  "Processor",
  "Tokenizer",
  "decode_image",
  "default_clip_processor",
]
