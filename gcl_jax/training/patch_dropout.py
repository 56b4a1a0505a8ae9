"""Patch dropout: while training, the image tower sees a random part of the patches.

Which ones depends on the seed, the step and the pair's place in the global batch alone:
not on devices or processes, and both passes of GradCache see the same.

Source: Li et al., arXiv 2212.00794 (FLIP).
"""

from __future__ import annotations

import jax

_STREAM = 0xD209  # apart from every other use of the run's seed


def kept_count(patches: int, dropout: float) -> int:
  """How many of so many patches are kept: at least one."""
  return max(1, round(patches * (1.0 - dropout)))


def kept_patches(
  seed: int, step: jax.Array, places: jax.Array, patches: int, dropout: float
) -> jax.Array:
  """(N, K) int32: distinct patches per image, uniformly drawn. No collectives.

  Args:
    seed: the run's.
    step: () int32.
    places: (N,) int32, each row's place in the step's global batch.
    patches: of an image.
    dropout: part of them that is dropped.
  """
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _STREAM), step)

  def one(place: jax.Array) -> jax.Array:
    drawn = jax.random.uniform(jax.random.fold_in(key, place), (patches,))
    return jax.lax.top_k(drawn, kept_count(patches, dropout))[1]

  return jax.vmap(one)(places)
