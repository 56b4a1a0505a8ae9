"""CLIP's two towers in flax.nnx, and `Model`, the handle that makes and binds them.

Parameters are float32 and live outside the module, as a plain nested dict: the blocks
of a tower are one block whose arrays have a leading layers axis, and `jax.lax.scan`
runs over it, so compile time and the compiled program do not grow with depth. Pruned
towers whose layers differ run layer by layer (`uneven.py`); an image tower may be a
ResNet (`resnet.py`).

Source: Radford et al., arXiv 2103.00020; numbers equal transformers' `CLIPModel`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings, Mix, score_fusion
from gcl_jax.models.config import CLIPConfig, ResNetConfig, TextConfig, VisionConfig
from gcl_jax.models.initial import initial_params
from gcl_jax.models.resnet import ResNetTower
from gcl_jax.models.uneven import cut
from gcl_jax.sharding import gathered, rows_apart

_policies = jax.checkpoint_policies
# What the backward pass of a block may keep. "pointwise" keeps every product and computes
# norms, activations and the softmax again, which costs less than to write them to memory
# and to read them; "dots" keeps the products with weights and recomputes the rest
# (attention, activations); "full" keeps the block's input alone.
REMAT = {
  "none": None,
  "pointwise": _policies.dots_saveable,
  "full": _policies.nothing_saveable,
  "dots": _policies.dots_with_no_batch_dims_saveable,
}
DTYPES = ("float32", "bfloat16", "float16")
_MASKED = -1e30  # finite: softmax of a row of these is not NaN


def _activate(x: Array, name: str) -> Array:
  if name == "quick_gelu":
    return x * jax.nn.sigmoid(1.702 * x)
  if name == "gelu":
    # By erf, as PyTorch has it: the erfc of jax.nn.gelu takes a CPU longer. In float32,
    # for the sum cancels where x is far below zero.
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)
  return jax.nn.gelu(x, approximate=True)


def _rows(x: Array) -> Array:
  """(B, L, width) -> (B L, width).

  So a kernel's gradient is a product of two matrices as they lie in memory. With more
  axes XLA's CPU backend transposes what comes from above first.
  """
  return x.reshape(-1, x.shape[-1])


def _linear(inputs: int, outputs: int, dtype, rngs: nnx.Rngs, bias=True):
  return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, rngs=rngs)


def _norm(width: int, eps: float, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
  # The fast variance, E[x²] − E[x]², loses digits where the mean is large.
  return nnx.LayerNorm(
    width, epsilon=eps, dtype=dtype, use_fast_variance=False, rngs=rngs
  )


def _embedding(rows: int, width: int, dtype, rngs: nnx.Rngs) -> nnx.Embed:
  return nnx.Embed(rows, width, dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
  """Multi-head self-attention; softmax in float32."""

  def __init__(self, config, causal: bool, dtype, rngs: nnx.Rngs):
    width, inner = config.width, config.heads * config.head
    self.query = _linear(width, inner, dtype, rngs)
    self.key = _linear(width, inner, dtype, rngs)
    self.value = _linear(width, inner, dtype, rngs)
    self.out = _linear(inner, width, dtype, rngs)
    self.head, self.causal = config.head, causal

  def __call__(self, x: Array) -> Array:
    """(B, L, width) -> the same."""
    batch, length, width = x.shape
    x, head = _rows(x), self.head

    def heads(projected: Array) -> Array:
      # (B, heads, L, head): with both batch axes first the CPU's products are a third
      # faster than with heads behind the length.
      # As many heads as the kernel has: a cut layer has fewer than the config's.
      split = projected.reshape(batch, length, projected.shape[-1] // head, head)
      return split.transpose(0, 2, 1, 3)

    q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
    q = q * head**-0.5
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    if self.causal:
      logits = jnp.where(jnp.tril(jnp.ones((length, length), bool)), logits, _MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, v)
    mixed = mixed.transpose(0, 2, 1, 3).reshape(x.shape[0], q.shape[1] * head)
    return self.out(mixed).reshape(batch, length, width)


class MLP(nnx.Module):
  """Two layers with the config's activation between."""

  def __init__(self, config, dtype, rngs: nnx.Rngs):
    self.fc1 = _linear(config.width, config.mlp, dtype, rngs)
    self.fc2 = _linear(config.mlp, config.width, dtype, rngs)
    self.act = config.act

  def __call__(self, x: Array) -> Array:
    """(B, L, width) -> the same."""
    return self.fc2(_activate(self.fc1(_rows(x)), self.act)).reshape(x.shape)


class Block(nnx.Module):
  """x + attention(norm1 x), then x + mlp(norm2 x); a pruned one may lack a half."""

  def __init__(self, config, causal: bool, dtype, rngs: nnx.Rngs):
    self.norm1 = _norm(config.width, config.eps, dtype, rngs)
    self.attention = Attention(config, causal, dtype, rngs)
    self.norm2 = _norm(config.width, config.eps, dtype, rngs)
    self.mlp = MLP(config, dtype, rngs)

  def __call__(self, x: Array, halves: Collection[str] = ("attention", "mlp")) -> Array:
    """(B, L, width) -> the same."""
    if "attention" in halves:
      x = x + self.attention(self.norm1(x))
    if "mlp" in halves:
      x = x + self.mlp(self.norm2(x))
    return x


def _stack(config, causal: bool, dtype, rngs: nnx.Rngs) -> Block:
  """One block whose every array has a leading axis of `config.layers`."""

  @nnx.split_rngs(splits=config.layers)
  @nnx.vmap(in_axes=0, out_axes=0)
  def make(rngs: nnx.Rngs) -> Block:
    return Block(config, causal, dtype, rngs)

  return make(rngs)


def _run(blocks: Block, x: Array, config, remat: str, tower: str) -> Array:
  graphdef, state = nnx.split(blocks)
  if config.uneven:
    return _run_uneven(graphdef, nnx.to_pure_dict(state), x, config, remat, tower)

  def step(x: Array, layer: dict[str, Any]) -> tuple[Array, None]:
    layer = gathered(layer, f"{tower}/blocks", layer=True)
    return rows_apart(nnx.merge(graphdef, nnx.State(layer))(rows_apart(x))), None

  if remat != "none":
    step = jax.checkpoint(step, prevent_cse=False, policy=REMAT[remat])
  return jax.lax.scan(step, x, nnx.to_pure_dict(state))[0]


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
    self.patch_embedding = _linear(3 * config.patch**2, width, dtype, rngs, bias=False)
    self.position_embedding = _embedding(config.positions, width, dtype, rngs)
    self.pre_norm = _norm(width, config.eps, dtype, rngs)
    self.blocks = _stack(config, False, dtype, rngs)
    self.post_norm = _norm(width, config.eps, jnp.float32, rngs)
    self.config, self.dtype, self.remat = config, dtype, remat

  def __call__(self, pixels: Array, kept: Array | None = None) -> Array:
    """(B, S, S, 3), normalised -> (B, width) float32.

    `kept`: (B, K) int32, which patches are looked at, each with its own position; None
    is all. The class token always is.

    Raises:
      ValueError: another size than the config's.
    """
    config = self.config
    size, patch, grid = config.image_size, config.patch, config.grid
    if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
      raise ValueError(
        f"pixels {pixels.shape}: this model takes (B, {size}, {size}, 3)"
      )
    batch = pixels.shape[0]
    x = pixels[:, : grid * patch, : grid * patch].astype(self.dtype)
    x = x.reshape(batch, grid, patch, grid, patch * 3).transpose(0, 1, 3, 2, 4)
    x = x.reshape(batch, grid * grid, 3 * patch**2)
    positions = self.position_embedding.embedding[...].astype(self.dtype)
    if kept is not None:
      # Before the first product: what is dropped costs nothing.
      x = jnp.take_along_axis(x, kept[:, :, None], axis=1)
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
    self.token_embedding = _embedding(config.vocab_size, config.width, dtype, rngs)
    self.position_embedding = _embedding(config.context, config.width, dtype, rngs)
    self.blocks = _stack(config, True, dtype, rngs)
    self.final_norm = _norm(config.width, config.eps, jnp.float32, rngs)
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
    of_image, of_text = _of_towers(remat)
    resnet = isinstance(config.vision, ResNetConfig)
    if resnet:
      self.vision = ResNetTower(config.vision, dtype, of_image, rngs)
    else:
      self.vision = VisionTower(config.vision, dtype, of_image, rngs)
    self.text = TextTower(config.text, dtype, of_text, rngs)
    self.image_projection = _linear(
      config.vision.features, width, jnp.float32, rngs, bias=resnet
    )
    self.text_projection = _linear(
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


@dataclasses.dataclass(frozen=True)
class Model:
  """How to make and bind parameters; holds no array. Hashable, not a pytree."""

  config: CLIPConfig
  fusion: FusionSettings
  dtype: str
  remat: str
  graphdef: Any = dataclasses.field(repr=False, compare=False)
  _shapes: Any = dataclasses.field(repr=False, compare=False)

  def init(self, key: Array) -> dict[str, Any]:
    """Random float32 parameters as `CLIPModel` draws them: a plain nested dict.

    A pure function of a `jax.random.key`: jit it, with `out_shardings` to be born
    sharded. Blocks' arrays have a leading layers axis.
    """
    return initial_params(self.config, self.fusion, self._shapes, key)

  def abstract(self) -> dict[str, Any]:
    """`jax.ShapeDtypeStruct`s in the place of `init`'s arrays."""
    return jax.tree.map(lambda leaf: leaf, self._shapes)

  def bind(self, params: Any) -> CLIP:
    """The module with these parameters, inside `jax.jit` or not; cheap when traced."""
    return nnx.merge(self.graphdef, nnx.State(params))


def _of_towers(remat: str) -> tuple[str, ...]:
  """The policies of the image tower and of the text tower."""
  names = tuple(remat.split(","))
  return names * 2 if len(names) == 1 else names


@functools.cache
def _abstract(config, fusion, dtype: str, remat: str) -> tuple[Any, Any]:
  def make() -> CLIP:
    rngs = nnx.Rngs(params=jax.random.key(0))
    return CLIP(config, fusion, jnp.dtype(dtype), remat, rngs)

  graphdef, state = nnx.split(nnx.eval_shape(make))
  return graphdef, nnx.to_pure_dict(state)


def build(
  config: CLIPConfig,
  *,
  fusion: FusionSettings | None = None,
  dtype: str = "float32",
  remat: str = "none",
) -> Model:
  """A model of this shape. No device work.

  Args:
    config: the shape.
    fusion: how image and text become one; None is raw, 1 and 1.
    dtype: what the towers compute in: "float32", "bfloat16" or "float16". Parameters
      and embeddings are float32 in any case. JAX rounds the inputs of float32 products
      on TPUs and GPUs unless told otherwise (`jax.default_matmul_precision`).
    remat: what the backward pass may keep of a block: "none" (everything), "pointwise"
      (all products), "dots" (products with weights) or "full" (the block's input alone);
      or two of them with a comma between, "full,none": the image tower's and the text
      tower's.

  Raises:
    UserError: an unknown dtype or remat.
  """
  if dtype not in DTYPES:
    raise UserError(f"model.dtype is {dtype!r}: it is one of {', '.join(DTYPES)}.")
  if len(_of_towers(remat)) != 2 or not set(_of_towers(remat)) <= set(REMAT):
    raise UserError(
      f"model.remat is {remat!r}: it is one of {', '.join(REMAT)}, or two with a comma "
      "between, for the image tower and for the text tower."
    )
  fusion = FusionSettings() if fusion is None else fusion
  return Model(config, fusion, dtype, remat, *_abstract(config, fusion, dtype, remat))
