"""VISTA in flax.nnx: EVA02's patches, read by a BERT in the midst of the text.

One encoder makes all three embeddings, the last hidden state of its first token: of the
text alone; of the image, as `[CLS] patches [SEP]`; of both, as `[CLS] patches text
[SEP]`. Parameters are as in `clip.py`. There is no dropout.

Source: Zhou et al., arXiv 2406.04292; numbers equal FlagEmbedding's `Visualized_BGE`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from gcl_jax.fusion import FusionSettings, unit_bank
from gcl_jax.models.layers import (
  activate,
  attend,
  embedding,
  flat_rows,
  linear,
  norm,
  patches,
  remat_of_towers,
  run,
  split_heads,
  stack,
)
from gcl_jax.models.vista_config import XLM_R, BertConfig, EvaConfig, VistaConfig


class EvaAttention(nnx.Module):
  """Self-attention with rotary positions, and a norm before the last product."""

  def __init__(self, config: EvaConfig, dtype, rngs: nnx.Rngs):
    width = config.width
    self.query = linear(width, width, dtype, rngs)
    self.key = linear(width, width, dtype, rngs, bias=False)
    self.value = linear(width, width, dtype, rngs)
    self.inner_norm = norm(width, config.eps, dtype, rngs)
    self.out = linear(width, width, dtype, rngs)
    self.head = config.width // config.heads

  def __call__(self, x: Array, cos: Array, sin: Array) -> Array:
    """(B, L, width) -> the same; cos and sin broadcast to (B, heads, L, head)."""
    batch, length, _ = x.shape
    x = flat_rows(x)
    query, key, value = (
      split_heads(product(x), batch, self.head)
      for product in (self.query, self.key, self.value)
    )
    mixed = attend(_rotated(query, cos, sin), _rotated(key, cos, sin), value)
    return self.out(self.inner_norm(mixed)).reshape(batch, length, -1)


def _rotated(x: Array, cos: Array, sin: Array) -> Array:
  """Each pair of neighbours (a, b) of (..., head) turned by its angle."""
  pairs = x.reshape(*x.shape[:-1], -1, 2)
  turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
  return (x * cos + turned * sin).astype(x.dtype)  # the angles are float32


class GatedMLP(nnx.Module):
  """silu(gate x) · fc1 x, a norm, and a last product: SwiGLU."""

  def __init__(self, config: EvaConfig, dtype, rngs: nnx.Rngs):
    self.gate = linear(config.width, config.mlp, dtype, rngs)
    self.fc1 = linear(config.width, config.mlp, dtype, rngs)
    self.norm = norm(config.mlp, config.eps, dtype, rngs)
    self.fc2 = linear(config.mlp, config.width, dtype, rngs)

  def __call__(self, x: Array) -> Array:
    """(B, L, width) -> the same."""
    rows = flat_rows(x)
    hidden = nnx.silu(self.gate(rows)) * self.fc1(rows)
    return self.fc2(self.norm(hidden)).reshape(x.shape)


class EvaBlock(nnx.Module):
  """x + attention(norm1 x), then x + mlp(norm2 x)."""

  def __init__(self, config: EvaConfig, dtype, rngs: nnx.Rngs):
    self.norm1 = norm(config.width, config.eps, dtype, rngs)
    self.attention = EvaAttention(config, dtype, rngs)
    self.norm2 = norm(config.width, config.eps, dtype, rngs)
    self.mlp = GatedMLP(config, dtype, rngs)

  def __call__(self, x: Array, cos: Array, sin: Array) -> Array:
    """(B, L, width) -> the same."""
    x = x + self.attention(self.norm1(x), cos, sin)
    return x + self.mlp(self.norm2(x))


class EvaTower(nnx.Module):
  """Pixels -> the last hidden states of the patches, without a last norm."""

  def __init__(self, config: EvaConfig, dtype, remat: str, rngs: nnx.Rngs):
    self.class_embedding = nnx.Param(jnp.zeros(config.width))
    self.patch_embedding = linear(3 * config.patch**2, config.width, dtype, rngs)
    self.position_embedding = embedding(config.positions, config.width, dtype, rngs)
    self.blocks = stack(lambda rngs: EvaBlock(config, dtype, rngs), config.layers, rngs)
    self.config, self.dtype, self.remat = config, dtype, remat

  def __call__(
    self, pixels: Array, cos: Array, sin: Array, kept: Array | None = None
  ) -> Array:
    """(B, S, S, 3), normalised -> (B, patches, width), or those of `kept` (B, K).

    `cos`, `sin`: (patches, head), the rotary positions.

    Raises:
      ValueError: another size than the config's.
    """
    batch, width = pixels.shape[0], self.config.width
    x = self.patch_embedding(patches(pixels, self.config, self.dtype, kept))
    positions = self.position_embedding.embedding[...].astype(self.dtype)
    first = self.class_embedding[...].astype(self.dtype) + positions[0]
    first = jnp.broadcast_to(first, (batch, 1, width))
    x = x + (positions[1:] if kept is None else jnp.take(positions[1:], kept, axis=0))
    turns = (
      _with_class(table, at_class, kept) for table, at_class in ((cos, 1.0), (sin, 0.0))
    )
    x = jnp.concatenate([first, x], axis=1)
    return run(self.blocks, x, self.remat, "vision", *turns)[:, 1:]


def _with_class(table: Array, at_class: float, kept: Array | None) -> Array:
  """Of (patches, head), the rows of the patches looked at, before them the class
  token's, which does not turn: broadcasts to (B, heads, 1 + K, head)."""
  table = jnp.pad(table, ((1, 0), (0, 0)), constant_values=at_class)
  if kept is None:
    return table
  return jnp.take(table, jnp.pad(kept + 1, ((0, 0), (1, 0))), axis=0)[:, None]


class BertAttention(nnx.Module):
  """Self-attention over what the mask lets be seen."""

  def __init__(self, config: BertConfig, dtype, rngs: nnx.Rngs):
    width = config.width
    self.query = linear(width, width, dtype, rngs)
    self.key = linear(width, width, dtype, rngs)
    self.value = linear(width, width, dtype, rngs)
    self.out = linear(width, width, dtype, rngs)
    self.head = config.width // config.heads

  def __call__(self, x: Array, mask: Array) -> Array:
    """(B, L, width), bool (B, 1, 1, L) -> (B, L, width)."""
    batch, length, _ = x.shape
    x = flat_rows(x)
    query, key, value = (
      split_heads(product(x), batch, self.head)
      for product in (self.query, self.key, self.value)
    )
    return self.out(attend(query, key, value, mask)).reshape(batch, length, -1)


class BertMLP(nnx.Module):
  """Two layers with the config's activation between."""

  def __init__(self, config: BertConfig, dtype, rngs: nnx.Rngs):
    self.fc1 = linear(config.width, config.mlp, dtype, rngs)
    self.fc2 = linear(config.mlp, config.width, dtype, rngs)
    self.act = config.act

  def __call__(self, x: Array) -> Array:
    """(B, L, width) -> the same."""
    return self.fc2(activate(self.fc1(flat_rows(x)), self.act)).reshape(x.shape)


class BertBlock(nnx.Module):
  """norm1(x + attention x), then norm2(x + mlp x)."""

  def __init__(self, config: BertConfig, dtype, rngs: nnx.Rngs):
    self.attention = BertAttention(config, dtype, rngs)
    self.norm1 = norm(config.width, config.eps, dtype, rngs)
    self.mlp = BertMLP(config, dtype, rngs)
    self.norm2 = norm(config.width, config.eps, dtype, rngs)

  def __call__(self, x: Array, mask: Array) -> Array:
    """(B, L, width) -> the same."""
    x = self.norm1(x + self.attention(x, mask))
    return self.norm2(x + self.mlp(x))


class BertEncoder(nnx.Module):
  """Tokens -> hidden states. Padding is what comes after a row's last [SEP]."""

  def __init__(self, config: BertConfig, dtype, remat: str, rngs: nnx.Rngs):
    width = config.width
    self.token_embedding = embedding(config.vocab_size, width, dtype, rngs)
    self.position_embedding = embedding(config.table, width, dtype, rngs)
    self.type_embedding = embedding(config.types, width, dtype, rngs)
    self.embedding_norm = norm(width, config.eps, dtype, rngs)
    self.blocks = stack(
      lambda rngs: BertBlock(config, dtype, rngs), config.layers, rngs
    )
    self.config, self.dtype, self.remat = config, dtype, remat

  def __call__(self, x: Array, mask: Array) -> Array:
    """Embedded (B, L, width), bool (B, L) of what is there -> hidden states."""
    return run(self.blocks, x, self.remat, "text", mask[:, None, None, :])

  def is_text(self, tokens: Array) -> Array:
    """(B, L) ids -> bool: up to the last [SEP]. Not "is no padding": a text may spell
    the padding token."""
    ends = (tokens == self.config.eos_id)[:, ::-1]
    return jnp.cumsum(ends, axis=1)[:, ::-1] > 0

  def embed_tokens(self, tokens: Array, positions: Array) -> Array:
    """(B, L) ids, positions that broadcast to them -> (B, L, width), normed."""
    first_type = self.type_embedding.embedding[0].astype(self.dtype)
    x = self.token_embedding(tokens) + first_type
    return self.embedding_norm(x + self.position_embedding(positions))

  def embed_patches(self, x: Array, positions: Array) -> Array:
    """(B, K, width) -> the same, as words stand in the sequence, but of no type."""
    return self.embedding_norm(x + self.position_embedding(positions))

  def text_positions(self, tokens: Array) -> Array:
    """Of the tokens of a text alone, as the kind counts them."""
    config = self.config
    if config.kind != XLM_R:
      return jnp.arange(tokens.shape[1])[None]
    there = tokens != config.pad_id
    return jnp.cumsum(there, axis=1) * there + config.pad_id


class Fixed(nnx.Module):
  """What VISTA's files hold and no training moves.

  The rotary positions, and what no embedding depends on (the encoder's pooler, EVA-CLIP's
  last norm, projection and logit scale): kept so that a file goes out as it came in.
  """

  def __init__(self, config: VistaConfig, rngs: nnx.Rngs):
    vision, width, f32 = config.vision, config.text.width, jnp.float32
    turns = jnp.zeros((vision.grid**2, vision.width // vision.heads))
    self.rotary_cos, self.rotary_sin = nnx.Param(turns), nnx.Param(turns)
    self.pooler = linear(width, width, f32, rngs)
    self.vision_norm = norm(vision.width, vision.eps, f32, rngs)
    self.vision_head = linear(vision.width, vision.head, f32, rngs)
    self.vision_logit_scale = nnx.Param(jnp.float32(0))


class Vista(nnx.Module):
  """Both towers and the projection between; only its shape is made here.

  Embeddings are float32 and not normalised whatever the compute dtype.
  """

  def __init__(
    self,
    config: VistaConfig,
    fusion: FusionSettings,
    dtype: Any,
    remat: str,
    rngs: nnx.Rngs,
  ):
    del fusion  # the encoder fuses
    of_image, of_text = remat_of_towers(remat)
    self.vision = EvaTower(config.vision, dtype, of_image, rngs)
    self.text = BertEncoder(config.text, dtype, of_text, rngs)
    self.image_projection = linear(config.vision.width, config.text.width, dtype, rngs)
    self.fixed = Fixed(config, rngs)
    self.logit_scale = nnx.Param(jnp.float32(config.logit_scale_init))
    self.config = config

  def embed_image(self, pixels: Array, *, kept_patches: Array | None = None) -> Array:
    """(B, S, S, 3) normalised pixels -> (B, D) float32, not normalised.

    `kept_patches`: (B, K) int32, row by row from the top left, which patches are looked
    at, each with its own positions; None is all.

    Raises:
      ValueError: another size than the config's.
    """
    return self._beside(self.embed_patches(pixels, kept_patches), self._no_text(pixels))

  def embed_text(self, tokens: Array) -> Array:
    """(B, L) int32 ids, L at most `config.text.context` -> (B, D) float32.

    Cutting padding after the longest text, or adding it, changes nothing.

    Raises:
      ValueError: longer than the encoder has positions.
    """
    text = self.text
    if tokens.ndim != 2 or tokens.shape[1] > text.config.context:
      raise ValueError(f"tokens {tokens.shape}: at most (B, {text.config.context})")
    x = text.embed_tokens(tokens, text.text_positions(tokens))
    return text(x, text.is_text(tokens))[:, 0].astype(jnp.float32)

  def embed_both(
    self, pixels: Array, tokens: Array, *, kept_patches: Array | None = None
  ) -> Array:
    """Documents with both, (B, S, S, 3) and (B, L) -> (B, D) float32.

    A text longer than `config.pair_context` is cut to it, its [SEP] kept.
    """
    return self._beside(self.embed_patches(pixels, kept_patches), tokens)

  def embed_pair(
    self,
    pixels: Array,
    tokens: Array,
    *,
    has_image: Array | None = None,
    has_text: Array | None = None,
    kept_patches: Array | None = None,
  ) -> tuple[Array, Array, Array]:
    """(B, S, S, 3), (B, L) -> unit image, text and fused rows, (B, D) each.

    The image tower runs once, the encoder three times. `has_image`, `has_text`: (B,)
    bool, None where all are there; see `unit_bank`.
    """
    seen = self.embed_patches(pixels, kept_patches)
    return unit_bank(
      self._beside(seen, self._no_text(pixels)),
      self.embed_text(tokens),
      self._beside(seen, tokens),
      has_image=has_image,
      has_text=has_text,
    )

  def embed_patches(self, pixels: Array, kept: Array | None = None) -> Array:
    """Projected patches as they stand in the encoder's sequence, (B, K, width)."""
    turns = (self.fixed.rotary_cos[...], self.fixed.rotary_sin[...])
    x = self.image_projection(self.vision(pixels, *turns, kept))
    positions = jnp.arange(self.config.vision.grid**2)[None] if kept is None else kept
    return self.text.embed_patches(x, positions + 1)

  def _no_text(self, pixels: Array) -> Array:
    """[CLS] [SEP], the text of an image alone, (B, 2)."""
    config = self.config.text
    return jnp.tile(
      jnp.array([[config.bos_id, config.eos_id]], jnp.int32), (pixels.shape[0], 1)
    )

  def _beside(self, seen: Array, tokens: Array) -> Array:
    """[CLS], the patches, then the rest of the text -> (B, D) float32."""
    text, most = self.text, self.config.pair_context
    is_text = text.is_text(tokens)
    if tokens.shape[1] > most:
      goes_on, is_text = is_text[:, most], is_text[:, :most]
      last = jnp.where(goes_on, text.config.eos_id, tokens[:, most - 1])
      tokens = tokens[:, :most].at[:, -1].set(last)
    # Also for XLM-RoBERTa the positions of a document with an image begin at 0.
    after = jnp.arange(1, tokens.shape[1]) + self.config.vision.grid**2
    x = text.embed_tokens(tokens, jnp.pad(after, (1, 0))[None])
    x = jnp.concatenate([x[:, :1], seen, x[:, 1:]], axis=1)
    there = jnp.ones(seen.shape[:2], bool)
    mask = jnp.concatenate([is_text[:, :1], there, is_text[:, 1:]], axis=1)
    return text(x, mask)[:, 0].astype(jnp.float32)
