"""What the towers of every family are made of, and the scan over stacked blocks.

The blocks of a tower are one block whose arrays have a leading layers axis, and
`jax.lax.scan` runs over it, so compile time and the compiled program do not grow with
depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

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
MASKED = -1e30  # finite: softmax of a row of these is not NaN


def remat_of_towers(remat: str) -> tuple[str, ...]:
  """The policies of the image tower and of the text tower."""
  names = tuple(remat.split(","))
  return names * 2 if len(names) == 1 else names


def activate(x: Array, name: str) -> Array:
  """An activation by its Hugging Face name."""
  if name == "quick_gelu":
    return x * jax.nn.sigmoid(1.702 * x)
  if name == "gelu":
    # By erf, as PyTorch has it: the erfc of jax.nn.gelu takes a CPU longer. In float32,
    # for the sum cancels where x is far below zero.
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)
  return jax.nn.gelu(x, approximate=True)


def flat_rows(x: Array) -> Array:
  """(B, L, width) -> (B L, width).

  So a kernel's gradient is a product of two matrices as they lie in memory. With more
  axes XLA's CPU backend transposes what comes from above first.
  """
  return x.reshape(-1, x.shape[-1])


def linear(
  inputs: int, outputs: int, dtype: Any, rngs: nnx.Rngs, bias: bool = True
) -> nnx.Linear:
  """A product with a kernel (inputs, outputs)."""
  return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, rngs=rngs)


def norm(width: int, eps: float, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """A LayerNorm; statistics in float32."""
  # The fast variance, E[x²] − E[x]², loses digits where the mean is large.
  return nnx.LayerNorm(
    width, epsilon=eps, dtype=dtype, use_fast_variance=False, rngs=rngs
  )


def embedding(rows: int, width: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Embed:
  """A table (rows, width)."""
  return nnx.Embed(rows, width, dtype=dtype, rngs=rngs)


def split_heads(x: Array, batch: int, head: int) -> Array:
  """(B L, heads head) -> (B, heads, L, head).

  With both batch axes first the CPU's products are a third faster than with heads
  behind the length.
  """
  return x.reshape(batch, -1, x.shape[-1] // head, head).transpose(0, 2, 1, 3)


def attend(query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
  """Attention of (B, heads, L, head) each -> (B L, heads head); softmax in float32.

  `mask`: bool that broadcasts to (B, heads, L, L), True where a query may look; None is
  everywhere.
  """
  batch, heads, length, size = query.shape
  logits = jnp.einsum(
    "bhqd,bhkd->bhqk", query * size**-0.5, key, preferred_element_type=jnp.float32
  )
  if mask is not None:
    logits = jnp.where(mask, logits, MASKED)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, value)
  return mixed.transpose(0, 2, 1, 3).reshape(batch * length, heads * size)


def patches(pixels: Array, config: Any, dtype: Any, kept: Array | None = None) -> Array:
  """(B, S, S, 3) -> (B, patches, patch patch 3), or those of `kept` (B, K) alone.

  Args:
    config: of the tower: `image_size`, `patch`, `grid`. Pixels left over at the right
      and below are dropped.

  Raises:
    ValueError: another size than the config's.
  """
  size, patch, grid = config.image_size, config.patch, config.grid
  if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
    raise ValueError(f"pixels {pixels.shape}: this model takes (B, {size}, {size}, 3)")
  batch = pixels.shape[0]
  x = pixels[:, : grid * patch, : grid * patch].astype(dtype)
  x = x.reshape(batch, grid, patch, grid, patch * 3).transpose(0, 1, 3, 2, 4)
  x = x.reshape(batch, grid * grid, 3 * patch**2)
  # Before the first product: what is dropped costs nothing.
  return x if kept is None else jnp.take_along_axis(x, kept[:, :, None], axis=1)


def stack(make_block: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs):
  """One block whose every array has a leading axis of `layers`."""

  @nnx.split_rngs(splits=layers)
  @nnx.vmap(in_axes=0, out_axes=0)
  def make(rngs: nnx.Rngs) -> nnx.Module:
    return make_block(rngs)

  return make(rngs)


def run(blocks: nnx.Module, x: Array, remat: str, tower: str, *shared: Any) -> Array:
  """(B, L, width) through stacked blocks, one after the other.

  Args:
    blocks: of `stack`; called as block(x, *shared).
    remat: a key of `REMAT`.
    tower: where the blocks stand among the parameters.
    shared: what every block is given beside its input.
  """
  graphdef, state = nnx.split(blocks)

  def step(x: Array, layer: dict[str, Any]) -> tuple[Array, None]:
    layer = gathered(layer, f"{tower}/blocks", layer=True)
    block = nnx.merge(graphdef, nnx.State(layer))
    return rows_apart(block(rows_apart(x), *shared)), None

  if remat != "none":
    step = jax.checkpoint(step, prevent_cse=False, policy=REMAT[remat])
  return jax.lax.scan(step, x, nnx.to_pure_dict(state))[0]
