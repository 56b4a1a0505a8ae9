"""A whole loss as one differentiable function that never holds its logits.

The custom derivative is around engine and formula together and outside `shard_map`: the
cotangent of every log-sum-exp is known in the forward, up to one factor, and travels with
it, so that the backward communicates one scalar.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from gcl_jax.losses import denominators, streaming
from gcl_jax.losses.pairs import BANKS, Pairs, batch_parts
from gcl_jax.losses.tiles import Anchors, Block, Tile

# lse (P, n), rows, scale -> sums and counts over the rows, of one shape.
Formula = Callable[[Array, Pairs, Array], tuple[Array, Array]]

# Rows and columns of a tile, at most. On two CPU cores 256 is as fast as 512 and takes
# half of its memory (`python -m benchmarks.loss`); accelerators like larger products.
BLOCKS = {"cpu": 256}
BLOCK_ELSEWHERE = 512
# A tile of the kernels is squares of its own: the more, the fewer and larger the
# products that follow them.
KERNEL_BLOCK = 4096
# Above this many bytes of gathered embeddings a device, `auto` sends them round instead.
_RING_ABOVE = 2**31


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is computed, and where. Holds no array.

  Attributes:
    tile: which similarities.
    formula: what becomes of their log-sum-exps.
    block_size: rows and columns of a tile, at most.
    mesh, axes: the devices that share the batch; None and () for one.
    ring: embeddings travel round the devices instead of being gathered.
  """

  tile: Tile
  formula: Formula
  block_size: int
  mesh: Mesh | None = None
  axes: tuple[str, ...] = ()
  ring: bool = False

  @property
  def alone(self) -> bool:
    """One device holds the whole batch."""
    return self.mesh is None or batch_parts(self.mesh, self.axes) == 1

  def size(self, rows: int) -> int:
    """As few blocks of these rows as the limit allows, and no more padding."""
    blocks = max(-(-rows // self.block_size), 1)
    of = self.tile.multiple
    return max(-(-rows // (blocks * of)), 1) * of

  def sizes(self, rows: Block, columns: Block) -> tuple[int, int]:
    """Rows and columns of a tile."""
    return self.size(len(rows.ids)), self.size(len(columns.ids))


def make_plan(
  tile: Tile,
  formula: Formula,
  pairs: Pairs,
  *,
  form: str,
  block_size: int | None,
  mesh: Mesh | None,
  batch_axes: tuple[str, ...],
  kernel: str = "xla",
) -> Plan:
  """The plan of a form: "streaming", "ring", or "auto", which chooses between them.

  Raises:
    ValueError: the kernel cannot hold these embeddings.
  """
  parts = 1 if mesh is None else batch_parts(mesh, batch_axes)
  banks = sum(
    leaf.nbytes for leaf in jax.tree.leaves((*_vectors(pairs), pairs.features))
  )
  ring = form == "ring" or (form == "auto" and parts > 1 and banks > _RING_ABOVE)
  size = block_size or default_block(mesh)
  if kernel == "pallas":
    from gcl_jax.losses import kernels  # needs a JAX with Triton; nothing else does

    tile = kernels.kernel_tile(tile, pairs.image.shape[1], _platform(mesh))
    size = block_size or KERNEL_BLOCK
  return Plan(tile, formula, size, mesh, tuple(batch_axes), ring and parts > 1)


def default_block(mesh: Mesh | None) -> int:
  """The block size for the devices of a mesh, or for JAX's default ones."""
  return BLOCKS.get(_platform(mesh), BLOCK_ELSEWHERE)


def _platform(mesh: Mesh | None) -> str:
  return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def streamed(
  plan: Plan, pairs: Pairs, scale: Array, weights: Array
) -> tuple[Array, Array]:
  """`denominators.weighted_mean` of the formula's sums over the global batch.

  Differentiable, once and in reverse mode, in the embeddings (and the Mix) of `pairs`
  and in the scale, which must not be 0.

  On several devices the forward all-gathers embeddings, presence, ids, log-sum-exps and
  their cotangents (ring: sends the first three round) and all-reduces sums and counts
  once; the backward all-reduces one scalar (ring: sends all of them round once more).
  """
  if plan.mesh is None:
    # Inside a `shard_map` of the caller's, what rows share must vary as they do.
    zero = 0.0 * jax.lax.stop_gradient(pairs.image[0, 0])
    scale, weights = scale + zero, weights + zero
  return _streamed(plan, pairs, scale, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _streamed(
  plan: Plan, pairs: Pairs, scale: Array, weights: Array
) -> tuple[Array, Array]:
  return _forward(plan, pairs, scale, weights)[0]


def _forward(plan: Plan, pairs: Pairs, scale: Array, weights: Array):
  totals, own, everybody = _on_devices(
    plan, _forward_here, (pairs,), (scale, weights), _forward_specs(plan)
  )
  sums, counts = totals
  result = denominators.weighted_mean(sums, counts, weights)
  weight = jnp.sum(weights * counts)
  factor = jnp.where(weight != 0, 1.0 / jnp.where(weight != 0, weight, 1.0), 0.0)
  return result, (pairs, scale, weights, own, everybody, factor)


def _backward(plan: Plan, saved, cotangents):
  pairs, scale, weights, own, everybody, factor = saved
  specs = (PartitionSpec(plan.axes), PartitionSpec())
  gradients, scale_gradient = _on_devices(
    plan, _backward_here, (pairs, own), (everybody, scale, weights), specs
  )
  # The directions have no gradient.
  factor = factor * cotangents[0]
  gradients = jax.tree.map(
    lambda x, like: (factor * x).astype(like.dtype), gradients, _vectors(pairs)
  )
  nothing = jax.tree.map(lambda _: None, pairs)
  return (
    nothing._replace(**dict(zip(BANKS, gradients, strict=True))),
    factor * scale_gradient,
    jnp.zeros_like(weights),
  )


_streamed.defvjp(_forward, _backward)


def _vectors(pairs: Pairs) -> tuple[Any, ...]:
  return pairs.image, pairs.text, pairs.fused


def _block(plan: Plan, pairs: Pairs) -> Block:
  modalities = plan.tile.modalities
  return Block(
    _vectors(pairs)[:modalities],
    pairs.features,
    jnp.stack(pairs.there[:modalities]),
    pairs.ids,
  )


def _forward_here(plan: Plan, pairs: Pairs, scale: Array, weights: Array):
  """One device's part: totals, own `Anchors`, and (columns, their Anchors) or None."""
  block, tile = _block(plan, pairs), plan.tile
  columns = None
  if plan.alone:
    size = plan.size(len(block.ids))
    running = streaming.triangle_forward(tile, block, scale, size)
  else:
    running = streaming.nothing_yet(tile, block)
    if plan.ring:
      running = _around(
        plan,
        lambda running, columns: streaming.rectangle_forward(
          tile, block, columns, scale, running, plan.sizes(block, columns)
        ),
        running,
        block,
      )
    else:
      columns = _gathered_block(plan, block)
      sizes = plan.sizes(block, columns)
      running = streaming.rectangle_forward(tile, block, columns, scale, running, sizes)
  lse = tile.finish(running)
  sums, pull, counts = jax.vjp(
    lambda lse: plan.formula(lse, pairs, scale), lse, has_aux=True
  )
  own = Anchors(lse, pull(weights)[0])
  if plan.alone:
    return (sums, counts), own, None
  totals = jax.lax.psum(jnp.stack([sums, counts]), plan.axes)
  everybody = None if plan.ring else (columns, _gathered(plan, own, axis=1))
  return (totals[0], totals[1]), own, everybody


def _backward_here(plan: Plan, pairs: Pairs, own: Anchors, everybody, scale, weights):
  """One device's gradients of its rows, and the scale's, summed over the devices."""
  block, tile = _block(plan, pairs), plan.tile
  if plan.alone:
    size = plan.size(len(block.ids))
    walked = streaming.triangle_backward(tile, block, scale, own, size)
  elif plan.ring:

    def further(gradient, visitors):
      columns, others = visitors
      sizes = plan.sizes(block, columns)
      more = streaming.rectangle_backward(
        tile, block, columns, scale, own, others, sizes
      )
      return jax.tree.map(jnp.add, gradient, more)

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.float32), block.vectors)
    walked = _around(plan, further, zeros, (block, own))
  else:
    columns, others = everybody
    sizes = plan.sizes(block, columns)
    walked = streaming.rectangle_backward(
      tile, block, columns, scale, own, others, sizes
    )

  exact = pairs.in_float32()

  def direct(vectors):
    rows = exact._replace(**dict(zip(BANKS, vectors, strict=True)))
    return plan.formula(own.lse, rows, scale)[0]

  gradients = list(jax.vjp(direct, _vectors(exact))[1](weights)[0])
  for place, more in enumerate(walked):
    gradients[place] = jax.tree.map(jnp.add, gradients[place], more)
  # Every logit is s times a product of two embeddings (a Mix being numbers beside them):
  # by Euler's theorem s dL/ds = ½ Σ e · dL/de.
  banks = [
    (x, g) for x, g in zip(_vectors(exact), gradients, strict=True) if _is_bank(x)
  ]
  of_scale = sum(jnp.vdot(x, gradient) for x, gradient in banks) / (2 * scale)
  if not plan.alone:
    of_scale = jax.lax.psum(of_scale, plan.axes)
  return tuple(gradients), of_scale


def _is_bank(vectors) -> bool:
  return isinstance(vectors, jax.Array)


def _gathered(plan: Plan, tree, axis: int = 0):
  return jax.tree.map(
    lambda leaf: jax.lax.all_gather(leaf, plan.axes, axis=axis, tiled=True), tree
  )


def _gathered_block(plan: Plan, block: Block) -> Block:
  rows = _gathered(plan, block._replace(there=block.there.T))
  return rows._replace(there=rows.there.T)


def _around(plan: Plan, visit, carry, guest):
  """Calls `visit(carry, guest)` with the guests of all devices, each sent on in turn."""
  parts = batch_parts(plan.mesh, plan.axes)
  steps = [(i, (i + 1) % parts) for i in range(parts)]

  def step(state, _):
    carry, guest = state
    # Sent before it is used, so that the way and the work overlap.
    following = jax.tree.map(
      lambda leaf: jax.lax.ppermute(leaf, plan.axes, steps), guest
    )
    return (visit(carry, guest), following), None

  (carry, guest), _ = jax.lax.scan(step, (carry, guest), length=parts - 1)
  return visit(carry, guest)


def _forward_specs(plan: Plan):
  everywhere = PartitionSpec()
  return everywhere, PartitionSpec(None, plan.axes), everywhere


def _on_devices(plan: Plan, function, split, shared, out_specs):
  """`function(plan, *split, *shared)` on every device's rows of `split`."""
  call = functools.partial(function, plan)
  if plan.mesh is None:
    return call(*split, *shared)
  rows, anchors = PartitionSpec(plan.axes), PartitionSpec(None, plan.axes)
  in_specs = (rows, anchors)[: len(split)] + (PartitionSpec(),) * len(shared)
  # Nothing is differentiated inside, so replication need not be tracked.
  return jax.shard_map(
    call, mesh=plan.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )(*split, *shared)
