"""Pictures and texts to arrays, equal to Hugging Face's processors and tokenizers."""

from gcl_jax.processing.decode import ImageError, decode_image
from gcl_jax.processing.encoder_tokenizer import EncoderTokenizer
from gcl_jax.processing.image import ImageProcessor
from gcl_jax.processing.processor import (
  Processor,
  default_clip_processor,
  default_vista_processor,
  has_tokenizer,
  read_tokenizer,
)
from gcl_jax.processing.tokenizer import Tokenizer

__all__ = [
  "EncoderTokenizer",
  "ImageError",
  "ImageProcessor",
  "Processor",
  "Tokenizer",
  "decode_image",
  "default_clip_processor",
  "default_vista_processor",
  "has_tokenizer",
  "read_tokenizer",
]
