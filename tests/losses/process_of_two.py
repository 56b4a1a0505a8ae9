"""One of two processes with two devices each: value and gradients of the global batch.

    python process_of_two.py <port> <process> <folder>

Every process holds its own half of the rows; process 0 writes what all of them make.
"""

import sys

import jax
import loss_cases
import numpy as np
from jax.experimental import multihost_utils

from gcl_jax.fusion import Mix
from gcl_jax.losses import gcl_loss
from gcl_jax.sharding import BATCH_AXES, make_mesh, put_batch


def main(port, process, folder):
  jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
  case, mesh = loss_cases.sixteen(), make_mesh()
  assert mesh.size == 4 and len(jax.local_devices()) == 2
  names = ("image", "text", "alpha", "beta")
  rows = {name: getattr(case, name) for name in names} | case.options
  half = slice(8 * process, 8 * process + 8)
  rows = put_batch(mesh, {name: array[half] for name, array in rows.items()})
  arrays = [rows.pop(name) for name in names]
  for form in ("streaming", "ring"):

    def run(image, text, alpha, beta, scale, rows, form=form):
      return gcl_loss(
        image,
        text,
        Mix(alpha, beta),
        logit_scale=scale,
        direction_weights=loss_cases.WEIGHTS,
        mesh=mesh,
        batch_axes=BATCH_AXES,
        form=form,
        block_size=3,
        **rows,
      )

    step = jax.jit(jax.value_and_grad(run, argnums=range(5), has_aux=True))
    (loss, directions), gradients = step(*arrays, np.float32(20), rows)
    made = [
      multihost_utils.process_allgather(x, tiled=True)
      for x in (loss, directions, *gradients)
    ]
    if process == 0:
      np.savez(f"{folder}/{form}.npz", *made)


main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
