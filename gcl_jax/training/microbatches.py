"""GradCache: the negatives of the full batch from embeddings made a part at a time.

Source: Gao et al., arXiv 2101.06983. The full batch is embedded part by part without
keeping activations; the loss and its gradient with respect to the embeddings are those
of the full batch; then every part is embedded again, and that gradient is carried on
into the parameters. Exact, for one more forward pass. Not gradient accumulation, whose
parts see only their own negatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gcl_jax.sharding import BATCH_AXES

# params, rows -> arrays with the same leading axis
Embed = Callable[[Any, Any], Any]


def in_microbatches(embed: Embed, count: int, mesh: Mesh) -> Embed:
  """`embed` in `count` parts of each device's rows, one part's activations at a time.

  A part is cut out of a device's own shard, so no row moves. Collectives: none in the
  forward, but where parameters lie split over `fsdp` they are gathered, all of them, for
  the whole step; in the backward one all-reduce of the parameters' gradients, after the
  last part.

  Args:
    embed: rows are independent of one another.
    count: parts; divides the rows of a device.
    mesh: over whose batch axes the rows are split.
  """
  if count == 1:
    return embed

  def here(params, rows):
    # Without this every part would reduce its gradient over the devices by itself.
    params = jax.lax.pcast(params, BATCH_AXES, to="varying")
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), rows)
    made = jax.lax.map(jax.checkpoint(lambda part: embed(params, part)), parts)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), made)

  # The other axes stay the compiler's: a product may be split over `tensor` inside.
  return jax.shard_map(
    here,
    mesh=mesh,
    axis_names=set(BATCH_AXES),
    in_specs=(P(), P(BATCH_AXES)),
    out_specs=P(BATCH_AXES),
  )
