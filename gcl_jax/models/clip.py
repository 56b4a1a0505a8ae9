"""CLIP in Flax NNX: two towers of stacked blocks, one scanned body each.

Source: Radford et al. 2021 and the forward pass of transformers' `CLIPModel`, with
which the tests compare it. Shapes: B rows, S pixels a side, L tokens, W tower width, D
embedding width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings, Mix, score_fusion
from gcl_jax.models.config import (
  LEGACY_EOS_ID,
  CLIPConfig,
  TextConfig,
  VisionConfig,
)

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
}

# What the backward pass may keep; None keeps everything.
REMAT_POLICIES = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Attention(nnx.Module):
  """Multi-head self-attention with biases; the softmax is in float32."""

  def __init__(self, width: int, heads: int, layers: int, dtype, rngs: nnx.Rngs):
    inner = width**-0.5
    linear = functools.partial(_linear, width, width, dtype=dtype, rngs=rngs)
    self.query = linear(std=inner * (2 * layers) ** -0.5)
    self.key = linear(std=inner * (2 * layers) ** -0.5)
    self.value = linear(std=inner * (2 * layers) ** -0.5)
    self.out = linear(std=inner)
    self.heads = heads

  def __call__(self, x: Array, causal: bool) -> Array:
    """(B, L, W) -> (B, L, W)."""
    split = (*x.shape[:2], self.heads, -1)
    q, k, v = (f(x).reshape(split) for f in (self.query, self.key, self.value))
    return self.out(
      jax.nn.dot_product_attention(q, k, v, is_causal=causal).reshape(x.shape)
    )


class MLP(nnx.Module):
  """Up, activation, down."""

  def __init__(
    self, width: int, mlp: int, layers: int, act: str, dtype, rngs: nnx.Rngs
  ):
    self.up = _linear(width, mlp, std=(2 * width) ** -0.5, dtype=dtype, rngs=rngs)
    down = width**-0.5 * (2 * layers) ** -0.5
    self.down = _linear(mlp, width, std=down, dtype=dtype, rngs=rngs)
    self.act = act

  def __call__(self, x: Array) -> Array:
    """(..., W) -> (..., W)."""
    return self.down(_ACTIVATIONS[self.act](self.up(x)))


class Block(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, tower: VisionConfig | TextConfig, dtype, rngs: nnx.Rngs):
    self.norm1 = _norm(tower, dtype, rngs)
    self.attention = Attention(tower.width, tower.heads, tower.layers, dtype, rngs)
    self.norm2 = _norm(tower, dtype, rngs)
    self.mlp = MLP(tower.width, tower.mlp, tower.layers, tower.act, dtype, rngs)

  def __call__(self, x: Array, causal: bool) -> Array:
    """(B, L, W) -> (B, L, W)."""
    x = x + self.attention(self.norm1(x), causal)
    return x + self.mlp(self.norm2(x))


class Tower(nnx.Module):
  """What both towers share: blocks whose parameters lead with an axis of layers."""

  def _make_blocks(self, tower, dtype, remat: str, rngs: nnx.Rngs) -> None:
    @nnx.split_rngs(splits=tower.layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
      return Block(tower, dtype, rngs)

    self.blocks = make(rngs)
    self.remat = remat

  def _run_blocks(self, x: Array, causal: bool) -> Array:
    graphdef, state = nnx.split(self.blocks)

    def body(x, layer):
      # Pure dicts: a Variable of the outer trace cannot be merged inside the scan.
      return nnx.merge(graphdef, nnx.State(layer))(x, causal), None

    if self.remat != "none":
      policy = REMAT_POLICIES[self.remat]
      body = jax.checkpoint(body, prevent_cse=False, policy=policy)
    return jax.lax.scan(body, x, nnx.to_pure_dict(state))[0]


class VisionTower(Tower):
  """Patches, a class token, blocks; pooled at the class token."""

  def __init__(self, tower: VisionConfig, dtype, remat: str, rngs: nnx.Rngs):
    key, width = rngs.params, tower.width
    self.class_embedding = nnx.Param(width**-0.5 * jax.random.normal(key(), (width,)))
    shape = (tower.patch, tower.patch, 3, width)
    self.patch_embedding = Kernel(shape, 0.02, rngs)
    self.position_embedding = Table(tower.positions, width, 0.02, rngs)
    self.pre_norm = _norm(tower, dtype, rngs)
    self._make_blocks(tower, dtype, remat, rngs)
    self.post_norm = _norm(tower, dtype, rngs)
    self.patch, self.dtype = tower.patch, dtype

  def __call__(self, pixels: Array) -> Array:
    """Normalised pixels (B, S, S, 3) -> (B, W)."""
    b, s, _, _ = pixels.shape
    g, p = s // self.patch, self.patch
    # A convolution of stride P is one product over flattened patches, row by row.
    patches = pixels.astype(self.dtype).reshape(b, g, p, g, p, 3)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, g * g, p * p * 3)
    kernel = self.patch_embedding.kernel[...].astype(self.dtype)
    x = patches @ kernel.reshape(p * p * 3, -1)
    first = self.class_embedding[...].astype(self.dtype)
    first = jnp.broadcast_to(first, (b, 1, x.shape[-1]))
    x = jnp.concatenate([first, x], axis=1)
    x = x + self.position_embedding.embedding[...].astype(self.dtype)
    x = self._run_blocks(self.pre_norm(x), causal=False)
    return self.post_norm(x[:, 0])


class TextTower(Tower):
  """Tokens, causal blocks; pooled at the end of the text.

  Causal and pooled at its end, so that what is right of it, and how far the padding
  reaches, changes nothing.
  """

  def __init__(self, tower: TextConfig, dtype, remat: str, rngs: nnx.Rngs):
    self.token_embedding = Table(tower.vocab_size, tower.width, 0.02, rngs)
    self.position_embedding = Table(tower.context, tower.width, 0.02, rngs)
    self._make_blocks(tower, dtype, remat, rngs)
    self.final_norm = _norm(tower, dtype, rngs)
    self.context, self.eos_id, self.dtype = tower.context, tower.eos_id, dtype

  def __call__(self, tokens: Array) -> Array:
    """Token ids (B, L) int32, L at most the context -> (B, W)."""
    length = tokens.shape[1]
    if length > self.context:
      raise ValueError(f"{length} tokens, but the model reads {self.context}")
    x = self.token_embedding.embedding[tokens].astype(self.dtype)
    x = x + self.position_embedding.embedding[:length].astype(self.dtype)
    x = self._run_blocks(x, causal=True)
    if self.eos_id == LEGACY_EOS_ID:
      end = jnp.argmax(tokens, axis=1)
    else:
      end = jnp.argmax(tokens == self.eos_id, axis=1)
    pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
    return self.final_norm(pooled)


class CLIP(nnx.Module):
  """Both towers, their projections and the logit scale."""

  def __init__(
    self,
    config: CLIPConfig,
    *,
    fusion: FusionSettings,
    dtype: Any,
    remat: str,
    rngs: nnx.Rngs,
  ):
    self.vision = VisionTower(config.vision, dtype, remat, rngs)
    self.text = TextTower(config.text, dtype, remat, rngs)
    v, t, d = config.vision.width, config.text.width, config.projection_dim
    self.image_projection = Kernel((v, d), v**-0.5, rngs)
    self.text_projection = Kernel((t, d), t**-0.5, rngs)
    self.logit_scale = nnx.Param(jnp.float32(config.logit_scale_init))
    self.fusion_of = fusion.of
    if fusion.learned:
      self.fusion = FusionWeights(fusion)
    else:
      self.fixed_fusion = (fusion.image_weight, fusion.text_weight)

  def embed_image(self, pixels: Array) -> Array:
    """Normalised pixels (B, S, S, 3) -> projected (B, D) float32, not of unit length."""
    return self.vision(pixels).astype(jnp.float32) @ self.image_projection.kernel[...]

  def embed_text(self, tokens: Array) -> Array:
    """Token ids (B, L) int32 -> projected (B, D) float32, not of unit length."""
    return self.text(tokens).astype(jnp.float32) @ self.text_projection.kernel[...]

  def embed_pair(
    self,
    pixels: Array,
    tokens: Array,
    *,
    has_image: Array | None = None,
    has_text: Array | None = None,
  ) -> tuple[Array, Array, Mix]:
    """Pairs -> unit images (B, D), unit texts (B, D), and the mix that fuses them.

    Args:
      pixels: normalised, (B, S, S, 3).
      tokens: (B, L) int32.
      has_image, has_text: (B,) bool; None where all are there.
    """
    if hasattr(self, "fusion"):
      weights = (self.fusion.image_weight[...], self.fusion.text_weight[...])
    else:
      weights = self.fixed_fusion
    return score_fusion(
      self.embed_image(pixels),
      self.embed_text(tokens),
      image_weight=weights[0],
      text_weight=weights[1],
      of=self.fusion_of,
      has_image=has_image,
      has_text=has_text,
    )


class Kernel(nnx.Module):
  """One matrix without a bias."""

  def __init__(self, shape: tuple[int, ...], std: float, rngs: nnx.Rngs):
    self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape))


class Table(nnx.Module):
  """Rows that are looked up."""

  def __init__(self, rows: int, width: int, std: float, rngs: nnx.Rngs):
    self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (rows, width)))


class FusionWeights(nnx.Module):
  """Learned weights of the two raw embeddings."""

  def __init__(self, fusion: FusionSettings):
    self.image_weight = nnx.Param(jnp.float32(fusion.image_weight))
    self.text_weight = nnx.Param(jnp.float32(fusion.text_weight))


def _linear(inputs: int, outputs: int, *, std: float, dtype, rngs) -> nnx.Linear:
  init = nnx.initializers.normal(std)
  return nnx.Linear(inputs, outputs, kernel_init=init, dtype=dtype, rngs=rngs)


def _norm(tower: VisionConfig | TextConfig, dtype, rngs) -> nnx.LayerNorm:
  # Flax's defaults are another epsilon and a variance that loses digits.
  return nnx.LayerNorm(
    tower.width, epsilon=tower.eps, use_fast_variance=False, dtype=dtype, rngs=rngs
  )


class Model:
  """A CLIP without its weights: what turns a nested dict of arrays into functions.

  Hashable and no pytree, so that a jitted function may close over it. `bind` is free:
  `jax.jit(lambda params, x: model.bind(params).embed_image(x))`.
  """

  def __init__(
    self, config: CLIPConfig, fusion: FusionSettings, dtype: str, remat: str
  ):
    self.config, self.fusion, self.dtype, self.remat = config, fusion, dtype, remat
    abstract = nnx.eval_shape(lambda: self._create(jax.random.key(0)))
    self.graphdef, state = nnx.split(abstract)
    self._abstract = nnx.to_pure_dict(state)

  def _create(self, key: Array) -> CLIP:
    return CLIP(
      self.config,
      fusion=self.fusion,
      dtype=jnp.dtype(self.dtype),
      remat=self.remat,
      rngs=nnx.Rngs(params=key),
    )

  def init(self, key: Array) -> dict[str, Any]:
    """Random weights as CLIP draws them: a nested dict of float32 arrays. Jittable."""
    return nnx.to_pure_dict(nnx.state(self._create(key), nnx.Param))

  def abstract(self) -> dict[str, Any]:
    """The same tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._abstract
    )

  def bind(self, params: dict[str, Any]) -> CLIP:
    """The module with these weights, inside a traced function or outside."""
    return nnx.merge(self.graphdef, nnx.State(params))


def build(
  config: CLIPConfig,
  *,
  fusion: FusionSettings | None = None,
  dtype: str = "float32",
  remat: str = "none",
) -> Model:
  """A model of this shape; no device is touched.

  Args:
    config: its shape.
    fusion: how an image and a text embedding become one; raw addition by default.
    dtype: of the computation, float32 or bfloat16; parameters are float32.
    remat: what the backward pass recomputes: none; dots (all but matrix products);
      full (all but the blocks' inputs).

  Raises:
    UserError: another dtype or policy.
  """
  if dtype not in ("float32", "bfloat16"):
    raise UserError(f"config.model.dtype is {dtype!r}: it is float32 or bfloat16.")
  if remat not in REMAT_POLICIES:
    raise UserError(
      f"config.model.remat is {remat!r}: it is one of {', '.join(REMAT_POLICIES)}."
    )
  return Model(config, fusion or FusionSettings(), dtype, remat)
