"""CLIP's ResNet image tower in flax.nnx: OpenAI's RN50 and its like, TinyCLIP's two.

A stem of three convolutions, blocks that take the mean of 2 x 2 cells where others stride,
and a pool in which the mean of all cells attends to them. The numbers equal those of
open_clip's `ModifiedResNet` in evaluation mode, in training too: the statistics of its
batch norms stay those of the file. They are parameters that get no gradient, so that a
step's result depends neither on how a batch is cut nor on how many devices share it. From
random weights they are 0 and 1.

Source: Radford et al., arXiv 2103.00020, section 2.4.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gcl_jax.models.config import ResNetConfig

_EPS = 1e-5
_EXPANSION = 4
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


class Convolution(nnx.Module):
  """A square kernel without bias; borders are zeros."""

  def __init__(self, size: int, inputs: int, outputs: int, dtype, stride: int = 1):
    self.kernel = nnx.Param(jnp.zeros((size, size, inputs, outputs)))
    self.size, self.stride, self.dtype = size, stride, dtype

  def __call__(self, x: Array) -> Array:
    """(B, H, W, inputs) -> (B, H / stride, W / stride, outputs)."""
    kernel = self.kernel[...].astype(self.dtype)
    if self.size == 1:
      # A product of two matrices: a CPU does this faster than a convolution.
      flat = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
      return flat.reshape(*x.shape[:-1], -1)
    pad = self.size // 2
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (self.stride, self.stride),
      ((pad, pad), (pad, pad)),
      dimension_numbers=_DIMENSIONS,
    )


class BatchNorm(nnx.Module):
  """With the statistics that it was given: a factor and a term for each channel."""

  def __init__(self, width: int, dtype):
    self.scale = nnx.Param(jnp.ones(width))
    self.bias = nnx.Param(jnp.zeros(width))
    self.mean = nnx.Param(jnp.zeros(width))
    self.var = nnx.Param(jnp.ones(width))
    self.dtype = dtype

  def __call__(self, x: Array) -> Array:
    """(..., width) -> the same."""
    mean, var = jax.lax.stop_gradient((self.mean[...], self.var[...]))
    factor = self.scale[...] * jax.lax.rsqrt(var + _EPS)
    term = self.bias[...] - mean * factor
    return x * factor.astype(self.dtype) + term.astype(self.dtype)


def _halved(x: Array) -> Array:
  """The mean of each 2 x 2 cells; a last odd row or column is left out."""
  batch, height, width, channels = x.shape
  x = x[:, : height // 2 * 2, : width // 2 * 2]
  x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
  return x.mean(axis=(2, 4))


class Bottleneck(nnx.Module):
  """x + conv3 relu conv2 relu conv1 x, then relu; the first of a stage changes the size."""

  def __init__(self, inputs: int, width: int, halve: bool, dtype):
    outputs = _EXPANSION * width
    self.conv1 = Convolution(1, inputs, width, dtype)
    self.norm1 = BatchNorm(width, dtype)
    self.conv2 = Convolution(3, width, width, dtype)
    self.norm2 = BatchNorm(width, dtype)
    self.conv3 = Convolution(1, width, outputs, dtype)
    self.norm3 = BatchNorm(outputs, dtype)
    self.reshapes, self.halve = halve or inputs != outputs, halve
    if self.reshapes:
      self.shortcut_conv = Convolution(1, inputs, outputs, dtype)
      self.shortcut_norm = BatchNorm(outputs, dtype)

  def __call__(self, x: Array) -> Array:
    """(B, H, W, inputs) -> (B, H, W, outputs), or half of H and of W."""
    y = jax.nn.relu(self.norm1(self.conv1(x)))
    y = jax.nn.relu(self.norm2(self.conv2(y)))
    if self.halve:
      x, y = _halved(x), _halved(y)
    y = self.norm3(self.conv3(y))
    if self.reshapes:
      x = self.shortcut_norm(self.shortcut_conv(x))
    return jax.nn.relu(x + y)


class Pool(nnx.Module):
  """One query, the first token, attends to all; softmax in float32."""

  def __init__(self, config: ResNetConfig, dtype, rngs: nnx.Rngs):
    width = config.features
    self.query = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
    self.key = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
    self.value = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
    self.heads = config.heads

  def __call__(self, x: Array) -> Array:
    """(B, L, width) -> (B, width)."""
    batch, length, width = x.shape
    head = width // self.heads
    q = self.query(x[:, 0]).reshape(batch, self.heads, head) * head**-0.5
    k = self.key(x.reshape(-1, width)).reshape(batch, length, self.heads, head)
    v = self.value(x.reshape(-1, width)).reshape(batch, length, self.heads, head)
    logits = jnp.einsum("bhd,blhd->bhl", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhl,blhd->bhd", weights, v).reshape(batch, width)


class ResNetTower(nnx.Module):
  """Pixels -> what the pool's attention mixed; the projection is the model's."""

  def __init__(self, config: ResNetConfig, dtype, remat: str, rngs: nnx.Rngs):
    """`remat`: "full" keeps the input of each block alone, all else keeps everything.

    To compute norms and activations again, as "pointwise" does in a transformer, took a
    CPU twice as long as to keep them.
    """
    width = config.width
    for index, (stride, inputs, outputs) in enumerate(
      ((2, 3, width // 2), (1, width // 2, width // 2), (1, width // 2, width)), 1
    ):
      setattr(self, f"conv{index}", Convolution(3, inputs, outputs, dtype, stride))
      setattr(self, f"norm{index}", BatchNorm(outputs, dtype))
    inputs = width
    for stage, blocks in enumerate(config.stages, 1):
      channels = width * 2 ** (stage - 1)
      for block in range(blocks):
        halve = stage > 1 and block == 0
        name = f"stage{stage}_block{block}"
        setattr(self, name, Bottleneck(inputs, channels, halve, dtype))
        inputs = _EXPANSION * channels
    self.position_embedding = nnx.Embed(
      config.positions, config.features, dtype=dtype, rngs=rngs
    )
    self.pool = Pool(config, dtype, rngs)
    self.config, self.dtype, self.remat = config, dtype, remat

  def __call__(self, pixels: Array, kept: Array | None = None) -> Array:
    """(B, S, S, 3), normalised -> (B, 32 widths).

    Raises:
      ValueError: another size than the config's, or `kept`, which are a ViT's patches.
    """
    config, size = self.config, self.config.image_size
    if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
      raise ValueError(
        f"pixels {pixels.shape}: this model takes (B, {size}, {size}, 3)"
      )
    if kept is not None:
      raise ValueError("a ResNet has no patches that could be left out")
    x = pixels.astype(self.dtype)
    for index in (1, 2, 3):
      conv, norm = getattr(self, f"conv{index}"), getattr(self, f"norm{index}")
      x = jax.nn.relu(norm(conv(x)))
    x = _halved(x)
    for stage, blocks in enumerate(config.stages, 1):
      for block in range(blocks):
        x = self._block(getattr(self, f"stage{stage}_block{block}"), x)
    x = x.reshape(x.shape[0], -1, config.features)
    x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)
    return self.pool(x + self.position_embedding.embedding[...].astype(self.dtype))

  def _block(self, block: Bottleneck, x: Array) -> Array:
    if self.remat != "full":
      return block(x)
    graphdef, state = nnx.split(block)
    params = nnx.to_pure_dict(state)

    def run(x: Array, params) -> Array:
      return nnx.merge(graphdef, nnx.State(params))(x)

    return jax.checkpoint(run)(x, params)
