"""What the tests of checkpoints share."""

import jax
import numpy as np


def same_bits(a, b):
  """Whether two trees hold the same arrays, bit for bit."""
  return all(
    np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )
