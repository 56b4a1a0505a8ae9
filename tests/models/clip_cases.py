"""PyTorch's CLIP beside ours: models to compare, inputs, and the comparison."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import transformers

from gcl_jax.models import NAMES, CLIPConfig, named_config
from gcl_jax.models.convert import from_hf

# Named shapes that `CLIPModel` has.
PLAIN = [name for name in NAMES if named_config(name).plain]
BOS, EOS = 298, 299
SMALL = {
  "projection_dim": 32,
  "vision_config": {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
  },
  "text_config": {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 16,
    "vocab_size": 300,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
  },
}


def changed(fields: dict[str, Any], **both: Any) -> dict[str, Any]:
  """A copy of a Hugging Face config with these fields in both towers."""
  fields = copy.deepcopy(fields)
  for tower in ("vision_config", "text_config"):
    fields[tower].update(both)
  return fields


def torch_model(fields: dict[str, Any], seed: int = 0) -> transformers.CLIPModel:
  """A `CLIPModel` whose biases and norms are not zeros and ones: bugs hide there."""
  torch.manual_seed(seed)
  model = transformers.CLIPModel(transformers.CLIPConfig.from_dict(fields)).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim <= 1:
        parameter.add_(0.2 * torch.randn_like(parameter))
  return model


def our_params(model: transformers.CLIPModel, config: CLIPConfig) -> dict[str, Any]:
  """The same weights in our tree, without a file."""
  tensors = {key: value.numpy() for key, value in model.state_dict().items()}
  return from_hf(tensors, config, "a test")


def images(config: CLIPConfig, count: int = 2) -> np.ndarray:
  """(count, S, S, 3) float32."""
  size = config.vision.image_size
  return np.random.default_rng(0).standard_normal((count, size, size, 3), np.float32)


def texts(config: CLIPConfig, ends: tuple[int, ...], pad: int = 0) -> np.ndarray:
  """(len(ends), context) ids; row r has its end of text at position ends[r]."""
  rng = np.random.default_rng(1)
  tokens = rng.integers(1, BOS, (len(ends), config.text.context), dtype=np.int32)
  tokens[:, 0] = BOS
  for row, end in zip(tokens, ends, strict=True):
    row[end] = EOS
    row[end + 1 :] = pad
  return tokens


def torch_raw(
  model: transformers.CLIPModel, pixels: np.ndarray, tokens: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
  """PyTorch's projected embeddings, not normalised, with their graph."""
  image = model.get_image_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
  text = model.get_text_features(torch.from_numpy(tokens).long())
  return image.pooler_output, text.pooler_output


def torch_embeddings(
  model: transformers.CLIPModel, pixels: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The same as arrays."""
  with torch.no_grad():
    image, text = torch_raw(model, pixels, tokens)
  return image.numpy(), text.numpy()


def unit(rows: Any) -> np.ndarray:
  """Rows of norm 1."""
  rows = np.asarray(rows, np.float64)
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def unit_gap(ours: Any, theirs: Any) -> float:
  """The largest difference between unit rows."""
  return float(np.abs(unit(ours) - unit(theirs)).max())
