"""VISTA by plain PyTorch functions over its state dict, and files to try ours on.

Written from the description of the model, not from ours: no class, no module, one
function per formula. It was compared once with FlagEmbedding's own code.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch.nn.functional import gelu, layer_norm, linear, normalize, silu

from gcl_jax.models import VistaConfig
from gcl_jax.models.vista_config import XLM_R, BertConfig, EvaConfig, bert_to_hf

CLS, SEP, PAD = 2, 3, 0
_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "runs", "cat", "red", "man")
# Both kinds: the image tower narrower than the encoder or wider, odd sizes throughout.
BASE = VistaConfig(
  EvaConfig(32, 2, 2, 85, 8, 32, head=12),
  BertConfig("bert", 48, 3, 4, 96, 60, 40, 2, "gelu", 1e-12, CLS, SEP, PAD),
)
M3 = VistaConfig(
  EvaConfig(48, 2, 2, 100, 14, 56, head=12),
  BertConfig(XLM_R, 32, 2, 4, 96, 60, 44, 1, "gelu", 1e-5, 0, 2, 1),
)


def state_dict(config: VistaConfig, seed: int = 0) -> dict[str, torch.Tensor]:
  """Every tensor of a file of this shape, none of them zeros or ones."""
  vision, text = config.vision, config.text
  make = torch.Generator().manual_seed(seed)

  def drawn(*shape: int, about: float = 0.0, spread: float = 0.2) -> torch.Tensor:
    return about + spread * torch.randn(shape, generator=make)

  tensors: dict[str, torch.Tensor] = {}

  def product(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
    tensors[f"{name}.weight"] = drawn(outputs, inputs, spread=1.5 * inputs**-0.5)
    if bias:
      tensors[f"{name}.bias"] = drawn(outputs)

  def norm(name: str, width: int) -> None:
    tensors[f"{name}.weight"], tensors[f"{name}.bias"] = (
      drawn(width, about=1.0),
      drawn(width),
    )

  width = text.width
  for name, rows in (
    ("word", text.vocab_size),
    ("position", text.table),
    ("token_type", text.types),
  ):
    tensors[f"bge_embeddings.{name}_embeddings.weight"] = drawn(rows, width, spread=1.0)
  norm("bge_embeddings.LayerNorm", width)
  for i in range(text.layers):
    at = f"bge_encoder.layer.{i}"
    for name in ("query", "key", "value"):
      product(f"{at}.attention.self.{name}", width, width)
    product(f"{at}.attention.output.dense", width, width)
    norm(f"{at}.attention.output.LayerNorm", width)
    product(f"{at}.intermediate.dense", width, text.mlp)
    product(f"{at}.output.dense", text.mlp, width)
    norm(f"{at}.output.LayerNorm", width)
  product("bge_pooler.dense", width, width)
  tensors["model_visual.logit_scale"] = drawn()
  at, width = "model_visual.visual", vision.width
  tensors[f"{at}.cls_token"] = drawn(1, 1, width)
  tensors[f"{at}.pos_embed"] = drawn(1, vision.positions, width, spread=1.0)
  kernel = drawn(width, 3, vision.patch, vision.patch, spread=1.0 / vision.patch)
  tensors[f"{at}.patch_embed.proj.weight"] = kernel
  tensors[f"{at}.patch_embed.proj.bias"] = drawn(width)
  turns = rotary(vision)
  for name, table in zip(("cos", "sin"), turns, strict=True):
    tensors[f"{at}.rope.freqs_{name}"] = table
  for i in range(vision.layers):
    block = f"{at}.blocks.{i}"
    norm(f"{block}.norm1", width)
    for name in ("q", "k", "v"):
      product(f"{block}.attn.{name}_proj", width, width, bias=False)
    tensors[f"{block}.attn.q_bias"] = drawn(width)
    tensors[f"{block}.attn.v_bias"] = drawn(width)
    norm(f"{block}.attn.inner_attn_ln", width)
    product(f"{block}.attn.proj", width, width)
    for name, table in zip(("cos", "sin"), turns, strict=True):
      tensors[f"{block}.attn.rope.freqs_{name}"] = table
    norm(f"{block}.norm2", width)
    product(f"{block}.mlp.w1", width, vision.mlp)
    product(f"{block}.mlp.w2", width, vision.mlp)
    norm(f"{block}.mlp.ffn_ln", vision.mlp)
    product(f"{block}.mlp.w3", vision.mlp, width)
  norm(f"{at}.norm", width)
  product(f"{at}.head", width, vision.head)
  product("visual_proj", width, text.width)
  return tensors


def rotary(vision: EvaConfig) -> tuple[torch.Tensor, torch.Tensor]:
  """Cosines and sines of (patches, head) angles, by loops."""
  head = vision.width // vision.heads
  angles = torch.zeros(vision.grid, vision.grid, head)
  for row in range(vision.grid):
    for column in range(vision.grid):
      for k in range(head // 2):  # of either half; neighbours share a frequency
        rate = 10000.0 ** (-2 * (k // 2) / (head // 2))
        angles[row, column, k] = 16 * row / vision.grid * rate
        angles[row, column, head // 2 + k] = 16 * column / vision.grid * rate
  angles = angles.reshape(-1, head)
  return angles.cos(), angles.sin()


def _named(tensors: Mapping[str, torch.Tensor], at: str) -> dict[str, torch.Tensor]:
  return {k[len(at) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{at}.")}


def _dense(x: torch.Tensor, t: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
  return linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))


def _norm(x: torch.Tensor, t: Mapping[str, torch.Tensor], name: str, eps: float):
  return layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def _attend(q, k, v, heads: int, hidden: torch.Tensor | None = None) -> torch.Tensor:
  def split(x):
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)

  scores = split(q) @ split(k).transpose(2, 3) / math.sqrt(q.shape[-1] // heads)
  if hidden is not None:
    scores = scores.masked_fill(hidden[:, None, None, :], -torch.inf)
  return (scores.softmax(dim=-1) @ split(v)).transpose(1, 2).reshape(q.shape)


def patches(
  config: VistaConfig, tensors: Mapping[str, torch.Tensor], pixels: torch.Tensor
) -> torch.Tensor:
  """(B, 3, S, S) -> the image tower's last hidden states without the class token's."""
  vision, t = config.vision, _named(tensors, "model_visual.visual")
  weight, bias = t["patch_embed.proj.weight"], t["patch_embed.proj.bias"]
  x = torch.nn.functional.conv2d(pixels, weight, bias, stride=vision.patch)
  x = x.flatten(2).transpose(1, 2)
  x = torch.cat([t["cls_token"].expand(len(x), 1, -1), x], dim=1) + t["pos_embed"]
  cos, sin = t["rope.freqs_cos"], t["rope.freqs_sin"]

  def turned(y):  # (B, L, width); the class token stays
    split = y.reshape(*y.shape[:2], vision.heads, -1).clone()
    even, odd = split[:, 1:, :, 0::2].clone(), split[:, 1:, :, 1::2].clone()
    c, s = cos[:, None, 0::2], sin[:, None, 0::2]
    out = torch.stack([even * c - odd * s, odd * c + even * s], dim=-1).flatten(-2)
    return torch.cat([split[:, :1], out], dim=1).reshape(y.shape)

  for i in range(vision.layers):
    b = _named(t, f"blocks.{i}")
    h = _norm(x, b, "norm1", vision.eps)
    q = linear(h, b["attn.q_proj.weight"], b["attn.q_bias"])
    k = linear(h, b["attn.k_proj.weight"])
    v = linear(h, b["attn.v_proj.weight"], b["attn.v_bias"])
    mixed = _attend(turned(q), turned(k), v, vision.heads)
    x = x + _dense(_norm(mixed, b, "attn.inner_attn_ln", vision.eps), b, "attn.proj")
    h = _norm(x, b, "norm2", vision.eps)
    h = silu(_dense(h, b, "mlp.w1")) * _dense(h, b, "mlp.w2")
    x = x + _dense(_norm(h, b, "mlp.ffn_ln", vision.eps), b, "mlp.w3")
  return x[:, 1:]


def _encode(config, tensors, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
  text = config.text
  for i in range(text.layers):
    b = _named(tensors, f"bge_encoder.layer.{i}")
    q, k, v = (
      _dense(x, b, f"attention.self.{name}") for name in ("query", "key", "value")
    )
    mixed = _attend(q, k, v, text.heads, hidden)
    x = _norm(
      x + _dense(mixed, b, "attention.output.dense"),
      b,
      "attention.output.LayerNorm",
      text.eps,
    )
    h = _dense(gelu(_dense(x, b, "intermediate.dense")), b, "output.dense")
    x = _norm(x + h, b, "output.LayerNorm", text.eps)
  return x[:, 0]


def _words(config, tensors, tokens: torch.Tensor, positions: torch.Tensor):
  t = _named(tensors, "bge_embeddings")
  x = t["word_embeddings.weight"][tokens] + t["token_type_embeddings.weight"][0]
  x = x + t["position_embeddings.weight"][positions]
  return _norm(x, t, "LayerNorm", config.text.eps)


def embed_text(config, tensors, tokens, lengths) -> torch.Tensor:
  """(B, L) ids of which `lengths` (B,) are there -> (B, D), not normalised."""
  there = torch.arange(tokens.shape[1]) < lengths[:, None]
  positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
  if config.text.kind == XLM_R:
    positions = torch.where(
      there, positions + 1 + config.text.pad_id, config.text.pad_id
    )
  return _encode(config, tensors, _words(config, tensors, tokens, positions), ~there)


def embed_both(config, tensors, pixels, tokens, lengths) -> torch.Tensor:
  """Images (B, 3, S, S) among texts (B, L) -> (B, D), not normalised."""
  seen = _dense(patches(config, tensors, pixels), tensors, "visual_proj")
  count, t = seen.shape[1], _named(tensors, "bge_embeddings")
  seen = seen + t["position_embeddings.weight"][1 : count + 1]
  seen = _norm(seen, t, "LayerNorm", config.text.eps)
  positions = torch.arange(tokens.shape[1]) + count
  positions[0] = 0
  words = _words(config, tensors, tokens, positions.expand(tokens.shape))
  x = torch.cat([words[:, :1], seen, words[:, 1:]], dim=1)
  place = torch.arange(x.shape[1])
  hidden = place >= count + lengths[:, None]
  return _encode(config, tensors, x, hidden)


def embed_image(config, tensors, pixels) -> torch.Tensor:
  """Images alone: among the text of [CLS] and [SEP]."""
  text = config.text
  tokens = torch.tensor([[text.bos_id, text.eos_id]]).expand(len(pixels), 2)
  return embed_both(config, tensors, pixels, tokens, torch.full((len(pixels),), 2))


def embed(config, tensors, pixels: np.ndarray, tokens: np.ndarray, lengths):
  """Unit image, text and fused rows of our kind of inputs, with their graph."""
  images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
  ids, lengths = torch.from_numpy(tokens).long(), torch.as_tensor(lengths)
  rows = (
    embed_image(config, tensors, images),
    embed_text(config, tensors, ids, lengths),
    embed_both(config, tensors, images, ids, lengths),
  )
  return tuple(normalize(x, dim=-1) for x in rows)


def pixels(config: VistaConfig, count: int) -> np.ndarray:
  """(count, S, S, 3) float32."""
  size = config.vision.image_size
  return np.random.default_rng(0).standard_normal((count, size, size, 3), np.float32)


def tokens(config: VistaConfig, lengths: tuple[int, ...], width: int = 0) -> np.ndarray:
  """(len(lengths), width or the longest) ids, [CLS] first, [SEP] last, then padding."""
  text, rng = config.text, np.random.default_rng(1)
  out = rng.integers(5, text.vocab_size, (len(lengths), width or max(lengths)))
  for row, length in zip(out, lengths, strict=True):
    row[0], row[length - 1], row[length:] = text.bos_id, text.eos_id, text.pad_id
  return out.astype(np.int32)


def write_tokenizer(folder: Path, words: tuple[str, ...] = _WORDS) -> None:
  """A small WordPiece tokenizer's files."""
  folder.mkdir(parents=True, exist_ok=True)
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordPiece(
      {word: i for i, word in enumerate(words)}, unk_token="[UNK]"
    )
  )
  backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B [SEP]",
    special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
  )
  backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
  # As published folders have it: the reader must undo both.
  backend.enable_padding(length=16)
  backend.enable_truncation(16)
  backend.save(str(folder / "tokenizer.json"))
  settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 40}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_folder(folder: Path, config: VistaConfig = BASE, seed: int = 0) -> dict:
  """A published VISTA: a .pth beside its text encoder's files; returns its tensors."""
  write_tokenizer(folder)
  fields = bert_to_hf(config.text)
  for name in ("bos_token_id", "eos_token_id"):  # which a BERT's config does not say
    del fields[name]
  (folder / "config.json").write_text(json.dumps(fields))
  tensors = state_dict(config, seed)
  torch.save(tensors, folder / "Visualized_small.pth")
  return tensors


def write_text_encoder(folder: Path, config: VistaConfig = BASE) -> dict:
  """A BERT alone, as BGE's folders are; returns its tensors."""
  from safetensors.torch import save_file

  write_tokenizer(folder)
  (folder / "config.json").write_text(json.dumps(bert_to_hf(config.text)))
  names = {
    "bge_embeddings": "embeddings",
    "bge_encoder": "encoder",
    "bge_pooler": "pooler",
  }
  theirs = {}
  for key, tensor in state_dict(config).items():
    first, _, rest = key.partition(".")
    if first in names:
      theirs[f"{names[first]}.{rest}"] = tensor
  theirs["embeddings.position_ids"] = torch.arange(config.text.table)[None]
  save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
  return theirs


def write_eva(file: Path, config: VistaConfig = BASE) -> dict[str, Any]:
  """An EVA-CLIP file with its text tower; returns the image tower's tensors."""
  visual = {
    key.removeprefix("model_visual."): tensor
    for key, tensor in state_dict(config, seed=1).items()
    if key.startswith("model_visual.")
  }
  torch.save({**visual, "text.ln_final.weight": torch.ones(3)}, file)
  return visual


def changed(config: VistaConfig, tower: str, **fields: Any) -> VistaConfig:
  """A config with other sizes in one tower."""
  return dataclasses.replace(
    config, **{tower: dataclasses.replace(getattr(config, tower), **fields)}
  )
