"""CLIP's two towers in flax.nnx.

Pruned towers whose layers differ run layer by layer (`uneven.py`); an image tower may be
a ResNet (`resnet.py`).

Source: Radford et al., arXiv 2103.00020; numbers equal transformers' `CLIPModel`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gcl_jax.fusion import FusionSettings, Mix, score_fusion
from gcl_jax.models.config import CLIPConfig, ResNetConfig, TextConfig, VisionConfig
from gcl_jax.models.layers import (
  REMAT,
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
from gcl_jax.models.resnet import ResNetTower
from gcl_jax.models.uneven import cut
from gcl_jax.sharding import gathered, rows_apart


class Attention(nnx.Module):
  """Multi-head self-attention; softmax in float32."""

  def __init__(self, config, causal: bool, dtype, rngs: nnx.Rngs):
    width, inner = config.width, config.heads * config.head
    self.query = linear(width, inner, dtype, rngs)
    self.key = linear(width, inner, dtype, rngs)
    self.value = linear(width, inner, dtype, rngs)
    self.out = linear(inner, width, dtype, rngs)
    self.head, self.causal = config.head, causal

  def __call__(self, x: Array) -> Array:
    """(B, L, width) -> the same."""
    batch, length, _ = x.shape
    x = flat_rows(x)
    # As many heads as the kernel has: a cut layer has fewer than the config's.
    query, key, value = (
      split_heads(product(x), batch, self.head)
      for product in (self.query, self.key, self.value)
    )
    mask = jnp.tril(jnp.ones((length, length), bool)) if self.causal else None
    return self.out(attend(query, key, value, mask)).reshape(batch, length, -1)


class MLP(nnx.Module):
  """Two layers with the config's activation between."""

  def __init__(self, config, dtype, rngs: nnx.Rngs):
    self.fc1 = linear(config.width, config.mlp, dtype, rngs)
    self.fc2 = linear(config.mlp, config.width, dtype, rngs)
    self.act = config.act

  def __call__(self, x: Array) -> Array:
    """(B, L, width) -> the same."""
    return self.fc2(activate(self.fc1(flat_rows(x)), self.act)).reshape(x.shape)


class Block(nnx.Module):
  """x + attention(norm1 x), then x + mlp(norm2 x); a pruned one may lack a half."""

  def __init__(self, config, causal: bool, dtype, rngs: nnx.Rngs):
    self.norm1 = norm(config.width, config.eps, dtype, rngs)
    self.attention = Attention(config, causal, dtype, rngs)
    self.norm2 = norm(config.width, config.eps, dtype, rngs)
    self.mlp = MLP(config, dtype, rngs)

  def __call__(self, x: Array, halves: Collection[str] = ("attention", "mlp")) -> Array:
    """(B, L, width) -> the same."""
    if "attention" in halves:
      x = x + self.attention(self.norm1(x))
    if "mlp" in halves:
      x = x + self.mlp(self.norm2(x))
    return x


def _stack(config, causal: bool, dtype, rngs: nnx.Rngs) -> Block:
  return stack(lambda rngs: Block(config, causal, dtype, rngs), config.layers, rngs)


def _run(blocks: Block, x: Array, config, remat: str, tower: str) -> Array:
  if not config.uneven:
    return run(blocks, x, remat, tower)
  graphdef, state = nnx.split(blocks)
  return _run_uneven(graphdef, nnx.to_pure_dict(state), x, config, remat, tower)


def _run_uneven(graphdef, params, x: Array, config, remat: str, tower: str) -> Array:
  """One layer after another, each cut to its own size."""
  # Backward this is one concatenation; of indexing it would be a sum of whole stacks.
  ones = (1,) * config.layers
  apart = jax.tree.map(lambda leaf: jax.lax.split(leaf, ones), params)

  for index in range(config.layers):

    def step(x: Array, layer: dict[str, Any], index: int = index) -> Array:
      layer = gathered(layer, f"{tower}/blocks", layer=True)
      own = cut(config, index, layer)
      # What is cut away stays bound, and unused.
      block = nnx.merge(graphdef, nnx.State({**layer, **own}))
      return rows_apart(block(rows_apart(x), own))

    layer = jax.tree.map(
      lambda leaves, index=index: leaves[index][0],
      apart,
      is_leaf=lambda node: isinstance(node, tuple | list),
    )
    if remat != "none":
      step = jax.checkpoint(step, policy=REMAT[remat])
    x = step(x, layer)
  return x


class VisionTower(nnx.Module):
  """Pixels -> the class token's last hidden state, layer-normed."""

  def __init__(self, config: VisionConfig, dtype, remat: str, rngs: nnx.Rngs):
    width = config.width
    self.class_embedding = nnx.Param(jnp.zeros(width))
    self.patch_embedding = linear(3 * config.patch**2, width, dtype, rngs, bias=False)
    self.position_embedding = embedding(config.positions, width, dtype, rngs)
    self.pre_norm = norm(width, config.eps, dtype, rngs)
    self.blocks = _stack(config, False, dtype, rngs)
    self.post_norm = norm(width, config.eps, jnp.float32, rngs)
    self.config, self.dtype, self.remat = config, dtype, remat

  def __call__(self, pixels: Array, kept: Array | None = None) -> Array:
    """(B, S, S, 3), normalised -> (B, width) float32.

    `kept`: (B, K) int32, which patches are looked at, each with its own position; None
    is all. The class token always is.

    Raises:
      ValueError: another size than the config's.
    """
    config, batch = self.config, pixels.shape[0]
    x = patches(pixels, config, self.dtype, kept)
    positions = self.position_embedding.embedding[...].astype(self.dtype)
    if kept is not None:
      at_class = jnp.broadcast_to(positions[:1], (batch, 1, config.width))
      positions = jnp.concatenate(
        [at_class, jnp.take(positions[1:], kept, axis=0)], axis=1
      )
    x = self.patch_embedding(x)
    first = self.class_embedding[...].astype(self.dtype)
    first = jnp.broadcast_to(first, (batch, 1, config.width))
    x = jnp.concatenate([first, x], axis=1)
    x = _run(self.blocks, self.pre_norm(x + positions), config, self.remat, "vision")
    return self.post_norm(x[:, 0])


class TextTower(nnx.Module):
  """Tokens -> the hidden state at the end-of-text token, layer-normed."""

  def __init__(self, config: TextConfig, dtype, remat: str, rngs: nnx.Rngs):
    self.token_embedding = embedding(config.vocab_size, config.width, dtype, rngs)
    self.position_embedding = embedding(config.context, config.width, dtype, rngs)
    self.blocks = _stack(config, True, dtype, rngs)
    self.final_norm = norm(config.width, config.eps, jnp.float32, rngs)
    self.config, self.dtype, self.remat = config, dtype, remat

  def __call__(self, tokens: Array) -> Array:
    """(B, L) ids, L at most the context -> (B, width) float32.

    Attention is causal and only one position is read: what comes after it, and how
    much of it, changes nothing.

    Raises:
      ValueError: longer than the context.
    """
    config = self.config
    if tokens.ndim != 2 or tokens.shape[1] > config.context:
      raise ValueError(f"tokens {tokens.shape}: at most (B, {config.context})")
    length = tokens.shape[1]
    positions = self.position_embedding.embedding[:length].astype(self.dtype)
    x = self.token_embedding(tokens) + positions
    x = _run(self.blocks, x, config, self.remat, "text")
    if config.eos_id == 2:
      # OpenAI's configs say 2, which their vocabulary does not mean: transformers takes
      # the largest id there, which is the end of text.
      end = jnp.argmax(tokens, axis=1)
    else:
      end = jnp.argmax(tokens == config.eos_id, axis=1)
    pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
    return self.final_norm(pooled)


class FusionWeights(nnx.Module):
  """The two learned factors of score fusion."""

  def __init__(self, settings: FusionSettings):
    self.image_weight = nnx.Param(jnp.float32(settings.image_weight))
    self.text_weight = nnx.Param(jnp.float32(settings.text_weight))


class CLIP(nnx.Module):
  """Both towers and their projections; only its shape is made here (`Model.init`).

  Embeddings are float32 and not normalised whatever the compute dtype: the last norms
  and the projections are computed in float32.
  """

  def __init__(
    self,
    config: CLIPConfig,
    fusion: FusionSettings,
    dtype: Any,
    remat: str,
    rngs: nnx.Rngs,
  ):
    width = config.projection_dim
    of_image, of_text = remat_of_towers(remat)
    resnet = isinstance(config.vision, ResNetConfig)
    if resnet:
      self.vision = ResNetTower(config.vision, dtype, of_image, rngs)
    else:
      self.vision = VisionTower(config.vision, dtype, of_image, rngs)
    self.text = TextTower(config.text, dtype, of_text, rngs)
    self.image_projection = linear(
      config.vision.features, width, jnp.float32, rngs, bias=resnet
    )
    self.text_projection = linear(
      config.text.width, width, jnp.float32, rngs, bias=False
    )
    self.logit_scale = nnx.Param(jnp.float32(config.logit_scale_init))
    if fusion.learned:
      self.fusion = FusionWeights(fusion)
    self.fusion_settings = fusion

  def embed_image(self, pixels: Array, *, kept_patches: Array | None = None) -> Array:
    """(B, S, S, 3) normalised pixels -> (B, D) float32, not normalised.

    `kept_patches`: (B, K) int32, row by row from the top left, which patches the tower
    sees; None is all. For training with fewer (arXiv 2212.00794).

    Raises:
      ValueError: another size than the config's.
    """
    return self.image_projection(self.vision(pixels, kept_patches))

  def embed_text(self, tokens: Array) -> Array:
    """(B, L) int32 ids -> (B, D) float32, not normalised.

    L may be anything up to the context: cutting padding after the end of text, or
    adding it, changes nothing.

    Raises:
      ValueError: longer than the context.
    """
    return self.text_projection(self.text(tokens))

  def embed_pair(
    self,
    pixels: Array,
    tokens: Array,
    *,
    has_image: Array | None = None,
    has_text: Array | None = None,
    kept_patches: Array | None = None,
  ) -> tuple[Array, Array, Mix]:
    """(B, S, S, 3), (B, L) -> unit image (B, D), unit text (B, D), and their `Mix`.

    `has_image`, `has_text`: (B,) bool, None where all are there; see `score_fusion`.
    `kept_patches`: see `embed_image`.
    """
    settings = self.fusion_settings
    weights = (settings.image_weight, settings.text_weight)
    if settings.learned:
      weights = (self.fusion.image_weight[...], self.fusion.text_weight[...])
    return score_fusion(
      self.embed_image(pixels, kept_patches=kept_patches),
      self.embed_text(tokens),
      image_weight=weights[0],
      text_weight=weights[1],
      of=settings.of,
      has_image=has_image,
      has_text=has_text,
    )
