"""VISTA in PyTorch, as its authors run it: the other side of benchmarks/step.py.

Its parameters are a state dict under VISTA's own keys. Attention is PyTorch's own
`scaled_dot_product_attention`, which the original's encoder uses today; its image tower
writes it out, which is slower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import (
  conv2d,
  gelu,
  layer_norm,
  linear,
  normalize,
  scaled_dot_product_attention,
  silu,
)

from gcl_jax.models import VistaConfig
from gcl_jax.models.convert import key_shapes
from gcl_jax.models.vista_config import XLM_R
from gcl_jax.models.vista_table import VISTA_TABLE

# A small image tower beside the sizes of MiniLM-L6: VISTA's form at a CPU's size.
SMALL = {
  "model_type": "vista",
  "vision_config": {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 512,
    "patch_size": 16,
    "image_size": 96,
    "projection_dim": 64,
  },
  "text_config": {
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
  },
}
_VISUAL = "model_visual.visual"


class VistaTorch(torch.nn.Module):
  """Pixels (B, 3, S, S) and ids (B, L) -> unit image, text and fused rows."""

  def __init__(self, config: VistaConfig):
    """Parameters are zeros, until `load_state_dict`."""
    super().__init__()
    self.config = config
    for key, shape in key_shapes(config, VISTA_TABLE).items():
      self._put(key, torch.nn.Parameter(torch.zeros(shape)))

  def _put(self, key: str, weight: torch.nn.Parameter) -> None:
    *parts, last = key.split(".")
    module = self
    for part in parts:
      if not hasattr(module, part):
        module.add_module(part, torch.nn.Module())
      module = getattr(module, part)
    module.register_parameter(last, weight.requires_grad_("rope" not in key))

  def forward(
    self, pixels: torch.Tensor, tokens: torch.Tensor
  ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit rows, (B, D) each."""
    text = self.config.text
    seen = self._dense(self._patches(pixels), "visual_proj")
    places = torch.arange(1, seen.shape[1] + 1, device=seen.device)
    seen = self._placed(seen, places)
    none = torch.tensor([[text.bos_id, text.eos_id]], device=seen.device)
    ends = (tokens == text.eos_id).flip(1).cumsum(1).flip(1) > 0
    alone = self._encode(self._words(tokens, self._text_places(tokens)), ends)
    rows = (
      self._beside(seen, none.expand(len(seen), 2), None),
      alone,
      self._beside(seen, tokens, ends),
    )
    image, text_rows, fused = (normalize(x.float(), dim=-1) for x in rows)
    return image, text_rows, fused

  def _text_places(self, tokens: torch.Tensor) -> torch.Tensor:
    """Positions of a text alone: XLM-RoBERTa's begin after padding's."""
    text = self.config.text
    if text.kind != XLM_R:
      return torch.arange(tokens.shape[1], device=tokens.device)
    there = (tokens != text.pad_id).long()
    return there.cumsum(1) * there + text.pad_id

  def _at(self, key: str) -> torch.Tensor:
    return self.get_parameter(key)

  def _dense(self, x: torch.Tensor, name: str) -> torch.Tensor:
    return linear(x, self._at(f"{name}.weight"), self._at(f"{name}.bias"))

  def _norm(self, x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
    weight, bias = self._at(f"{name}.weight"), self._at(f"{name}.bias")
    return layer_norm(x, x.shape[-1:], weight, bias, eps)

  def _placed(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    table = self._at("bge_embeddings.position_embeddings.weight")
    return self._norm(
      x + table[places], "bge_embeddings.LayerNorm", self.config.text.eps
    )

  def _words(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    words = self._at("bge_embeddings.word_embeddings.weight")
    types = self._at("bge_embeddings.token_type_embeddings.weight")
    return self._placed(torch.nn.functional.embedding(tokens, words) + types[0], places)

  def _beside(self, seen, tokens, ends: torch.Tensor | None) -> torch.Tensor:
    count = seen.shape[1]
    places = torch.arange(tokens.shape[1], device=seen.device) + count
    places[0] = 0
    words = self._words(tokens, places)
    x = torch.cat([words[:, :1], seen, words[:, 1:]], dim=1)
    if ends is not None:
      ends = torch.cat([ends.new_ones(len(ends), count), ends], dim=1)
    return self._encode(x, ends)

  def _encode(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    text = self.config.text
    mask = None if mask is None else mask[:, None, None, :]
    for i in range(text.layers):
      at = f"bge_encoder.layer.{i}"
      q, k, v = (
        self._dense(x, f"{at}.attention.self.{name}")
        for name in ("query", "key", "value")
      )
      h = self._dense(
        _attend(q, k, v, text.heads, mask), f"{at}.attention.output.dense"
      )
      x = self._norm(x + h, f"{at}.attention.output.LayerNorm", text.eps)
      h = gelu(self._dense(x, f"{at}.intermediate.dense"))
      h = self._dense(h, f"{at}.output.dense")
      x = self._norm(x + h, f"{at}.output.LayerNorm", text.eps)
    return x[:, 0]

  def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
    vision = self.config.vision
    kernel = self._at(f"{_VISUAL}.patch_embed.proj.weight")
    bias = self._at(f"{_VISUAL}.patch_embed.proj.bias")
    x = conv2d(pixels, kernel, bias, stride=vision.patch).flatten(2).transpose(1, 2)
    first = self._at(f"{_VISUAL}.cls_token").expand(len(x), 1, -1)
    x = torch.cat([first, x], dim=1) + self._at(f"{_VISUAL}.pos_embed")
    cos, sin = (self._at(f"{_VISUAL}.rope.freqs_{name}") for name in ("cos", "sin"))
    for i in range(vision.layers):
      at = f"{_VISUAL}.blocks.{i}"
      h = self._norm(x, f"{at}.norm1", vision.eps)
      q = linear(h, self._at(f"{at}.attn.q_proj.weight"), self._at(f"{at}.attn.q_bias"))
      k = linear(h, self._at(f"{at}.attn.k_proj.weight"))
      v = linear(h, self._at(f"{at}.attn.v_proj.weight"), self._at(f"{at}.attn.v_bias"))
      h = _attend(q, k, v, vision.heads, None, (cos, sin))
      h = self._norm(h, f"{at}.attn.inner_attn_ln", vision.eps)
      x = x + self._dense(h, f"{at}.attn.proj")
      h = self._norm(x, f"{at}.norm2", vision.eps)
      h = silu(self._dense(h, f"{at}.mlp.w1")) * self._dense(h, f"{at}.mlp.w2")
      x = x + self._dense(self._norm(h, f"{at}.mlp.ffn_ln", vision.eps), f"{at}.mlp.w3")
    return x[:, 1:]


def _attend(q, k, v, heads: int, mask: Any, turns: Any = None) -> torch.Tensor:
  q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
  if turns is not None:
    q, k = (_turned(x, *turns).to(v.dtype) for x in (q, k))
  return scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
  first, rest = x[:, :, :1], x[:, :, 1:]
  even, odd = rest.unflatten(-1, (-1, 2)).unbind(-1)
  turned = torch.stack([-odd, even], dim=-1).flatten(-2)
  return torch.cat([first, rest * cos + turned * sin], dim=2)
