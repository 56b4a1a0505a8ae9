"""Affinity mimicking: a student's softmaxes over the batch learn a teacher's.

TinyCLIP's distillation (Wu et al., arXiv 2309.12314; https://github.com/microsoft/Cream,
TinyCLIP), over all directions between image, text and fused. An affinity is never
materialised: with z the student's logits and z' the teacher's, the cross entropy of an
anchor is

    Σ_k p'_k (lse(z) − z_k) = lse(z) − Σ_k p'_k z_k ,  p' = softmax(z')

and the mean of z under p' is an online sum like a log-sum-exp. So the streaming engine
does it: the gradient of a logit is p − p', from the same tile computed again.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from gcl_jax.fusion import Mix
from gcl_jax.losses import dense
from gcl_jax.losses.denominators import ordered_pairs, weighted_mean
from gcl_jax.losses.engine import make_plan, streamed
from gcl_jax.losses.pairs import (
  Pairs,
  Summing,
  check_form,
  check_mesh,
  make_pairs,
  matmul_precision,
  over_batch,
  scalar_scale,
)
from gcl_jax.losses.tiles import Anchors, Block, Running, Tile, is_mixed, updated


def affinity_loss(
  image: Array,
  text: Array,
  fused: Array | Mix,
  teacher_image: Array,
  teacher_text: Array,
  teacher_fused: Array,
  *,
  logit_scale: ArrayLike,
  teacher_scale: ArrayLike,
  direction_weights: ArrayLike | None = None,
  has_image: Array | None = None,
  has_text: Array | None = None,
  mesh: Mesh | None = None,
  batch_axes: tuple[str, ...] = ("data",),
  form: str = "auto",
  block_size: int | None = None,
) -> tuple[Array, Array]:
  """Cross entropy of a student's affinities under a frozen teacher's.

  Of anchor j of modality a, over the candidates k of modality b that exist (its own pair
  among them; pairs that share an id are candidates too):

    ℓ_ab^j = −Σ_k softmax_k(s' e'_a^j · e'_b^k) log softmax_k(s e_a^j · e_b^k)
    L = Σ_{a≠b,j} w_ab p_a^j ℓ_ab^j / Σ_{a≠b,j} w_ab p_a^j

  With only image ↔ text weighted this is TinyCLIP's soft loss. It does not fall below
  the entropy of the teacher's affinities. Differentiable, once and in reverse mode, in
  the student's embeddings and logit_scale.

  Args:
    image, text, fused: the student's, as in `gcl_loss`.
    teacher_image, teacher_text, teacher_fused: (N, E) unit rows; no gradient. E need
      not be the student's D.
    logit_scale, teacher_scale: s and s', positive scalars, already exponentiated.
    direction_weights: (3, 3), rows anchors, columns candidates; by default all 1. The
      diagonal is ignored.
    has_image, has_text, mesh, batch_axes, block_size: as in `gcl_loss`.
    form: as in `gcl_loss`; what it gathers or sends round are both models' embeddings.

  Returns:
    loss: float32 scalar, 0 where nothing counts. directions: (3, 3) float32, the mean ℓ
      per direction whatever its weight; no gradient.

  Raises:
    ValueError: as in `gcl_loss`.
  """
  check_form(form, block_size)
  weights = np.ones((3, 3)) if direction_weights is None else direction_weights
  weights = jnp.asarray(weights, jnp.float32)
  if weights.shape != (3, 3):
    raise ValueError(f"direction_weights has shape {weights.shape}, not (3, 3)")
  weights = jax.lax.stop_gradient(jnp.where(jnp.eye(3, dtype=bool), 0.0, weights))
  present = {"pair_ids": None, "has_image": has_image, "has_text": has_text}
  pairs = make_pairs(image, text, fused, **present)
  if teacher_image.ndim != 2 or len(teacher_image) != len(image):
    raise ValueError(
      f"teacher_image has shape {teacher_image.shape}, not ({len(image)}, E)"
    )
  try:
    teacher = make_pairs(teacher_image, teacher_text, teacher_fused, **present)
  except ValueError as error:
    raise ValueError(f"teacher_{error}") from None
  # With the root of the scale in each of two banks their products are the logits.
  root = jnp.sqrt(scalar_scale(teacher_scale, "teacher_scale"))
  banks = tuple(jax.lax.stop_gradient(root * bank) for bank in teacher.banks)
  return _mean_loss(
    pairs._replace(features=banks),
    scalar_scale(logit_scale),
    weights,
    mesh=mesh,
    batch_axes=tuple(batch_axes),
    form=form,
    block_size=block_size,
  )


@functools.partial(
  jax.jit, static_argnames=("mesh", "batch_axes", "form", "block_size")
)
def _mean_loss(
  pairs: Pairs,
  scale: Array,
  weights: Array,
  *,
  mesh: Mesh | None,
  batch_axes: tuple[str, ...],
  form: str,
  block_size: int | None,
) -> tuple[Array, Array]:
  check_mesh(mesh, batch_axes, pairs.ids.shape[0])
  if form != "dense":
    plan = make_plan(
      AffinityTile(3, is_mixed(pairs), _DIRECTIONS, matmul_precision(pairs)),
      _sums,
      pairs,
      form=form,
      block_size=block_size,
      mesh=mesh,
      batch_axes=batch_axes,
    )
    return streamed(plan, pairs, scale, weights)

  def local(rows: Pairs, shared, summing: Summing) -> tuple[Array, Array]:
    scale, weights = shared
    rows = rows.written_out()
    columns = summing.gather(rows)
    of_both = []
    for a, b in _DIRECTIONS:
      logits, teachers = (
        factor * dense.similarities(mine, theirs, jax.lax.Precision.HIGHEST)
        for factor, mine, theirs in (
          (scale, rows.banks[a], columns.banks[b]),
          (1.0, rows.features[a], columns.features[b]),
        )
      )
      there = columns.there[b]
      lse = dense.masked_logsumexp(logits, there)
      affinity = jnp.where(there, jax.nn.softmax(teachers, where=there), 0.0)
      of_both.append((lse, jnp.sum(affinity * logits, axis=-1)))
    lse, expected = map(jnp.stack, zip(*of_both, strict=True))
    nothing = jnp.zeros_like(lse)
    sums, counts = _sums(jnp.concatenate([lse, nothing, expected]), rows, scale)
    return weighted_mean(summing.total(sums), summing.total(counts), weights)

  return over_batch(local, pairs, (scale, weights), mesh=mesh, batch_axes=batch_axes)


_DIRECTIONS = tuple(ordered_pairs())


def _sums(found: Array, rows: Pairs, scale: Array) -> tuple[Array, Array]:
  """(3, 3) sums of ℓ_ab over the rows, and how many; found (3 P, n) of `finish`."""
  del scale
  lse, _, expected = jnp.split(found, 3)
  counted = jnp.stack([rows.there[a] for a, _ in _DIRECTIONS]) & (lse != -jnp.inf)
  terms = jnp.where(counted, jnp.where(counted, lse, 0.0) - expected, 0.0)
  places = tuple(zip(*_DIRECTIONS, strict=True))
  table = jnp.zeros((3, 3), jnp.float32)
  return (
    table.at[places].set(jnp.sum(terms, axis=-1)),
    table.at[places].set(jnp.sum(counted, axis=-1, dtype=jnp.float32)),
  )


class _Running(NamedTuple):
  """Two unfinished log-sum-exps, and Σ exp(teacher's logit − its peak) · student's."""

  peak: Array
  total: Array
  teacher_peak: Array
  teacher_total: Array
  expected: Array


@dataclasses.dataclass(frozen=True)
class AffinityTile(Tile):
  """A `Tile` of two models: `Block.features` are the teacher's banks, roots included.

  What is there is a candidate, whatever its id. An anchor has three numbers, (3 P, n):
  the log-sum-exps of the student and of the teacher, and the student's mean logit under
  the teacher's affinity.
  """

  def begin(self, zeros: Array) -> _Running:
    """As `Tile.begin`."""
    return _Running(zeros - jnp.inf, zeros, zeros - jnp.inf, zeros, zeros)

  def finish(self, running: _Running) -> Array:
    """The three numbers of each anchor; −∞, −∞ and 0 where there was no candidate."""
    peak, total, teacher_peak, teacher_total, expected = running
    some = jnp.where(teacher_total != 0, teacher_total, 1.0)
    own = super().finish(Running(peak, total))
    of_teacher = super().finish(Running(teacher_peak, teacher_total))
    return jnp.concatenate([own, of_teacher, expected / some])

  def fold(
    self,
    rows: Block,
    columns: Block,
    scale: Array,
    mine: _Running,
    theirs: _Running | None = None,
  ) -> tuple[_Running, _Running | None]:
    """As `Tile.fold`."""
    products = self._multiplied(rows.vectors, columns.vectors)
    logits = self.table(products, self.mix(rows.vectors), self.mix(columns.vectors))
    logits = [scale * x for x in logits]
    teachers = self._teachers(rows, columns)
    mine = _updated(mine, logits, teachers, self.read(rows, columns), axis=1)
    if theirs is None:
      return mine, None
    masks = self.read_back(rows, columns)
    theirs = _updated(self.turned(theirs), logits, teachers, masks, axis=0)
    return mine, self.turned(theirs)

  def weights(
    self,
    logits: list[Array],
    rows: Block,
    columns: Block,
    own: Anchors,
    others: Anchors,
  ) -> list[Array]:
    """As `Tile.weights`: p − p' of the anchors of both sides, by their cotangents."""
    own, others = _Anchors.of(own), _Anchors.of(others)
    masks, masks_back = self.read(rows, columns), self.read_back(rows, columns)
    weights = []
    for p, (logit, teacher, q) in enumerate(
      zip(logits, self._teachers(rows, columns), self.transposed, strict=True)
    ):
      down = own.weighted(p, logit, teacher, masks[p], axis=1)
      back = others.weighted(q, logit, teacher, masks_back[p], axis=0)
      weights.append(down + back)
    return weights

  def factor(self, rows: Block, columns: Block) -> None:
    """None: the features are another model's."""

  def read(self, rows: Block, columns: Block) -> list[Array]:
    """For every block (a, m): whether modality m of k is there, (1, C)."""
    return [columns.there[m][None, :] for _, m in self.blocks]

  def read_back(self, rows: Block, columns: Block) -> list[Array]:
    """For every block (a, m): whether modality a of j is there, (R, 1)."""
    return [rows.there[a][:, None] for a, _ in self.blocks]

  def _teachers(self, rows: Block, columns: Block) -> list[Array]:
    highest = jax.lax.Precision.HIGHEST
    return [
      dense.similarities(rows.features[a], columns.features[m], highest)
      for a, m in self.blocks
    ]


class _Anchors(NamedTuple):
  """The parts of an anchor's numbers and their cotangents, (P, n) each."""

  lse: Array
  teacher_lse: Array
  of_lse: Array
  of_expected: Array

  @classmethod
  def of(cls, anchors: Anchors) -> _Anchors:
    lse, teacher_lse, _ = jnp.split(anchors.lse, 3)
    of_lse, _, of_expected = jnp.split(anchors.cotangent, 3)
    return cls(lse, teacher_lse, of_lse, of_expected)

  def weighted(
    self, place: int, logit: Array, teacher: Array, mask: Array, axis: int
  ) -> Array:
    """dL/d(logit) (R, C) by anchors along the rows (axis 1) or the columns (axis 0)."""
    lse, teacher_lse, of_lse, of_expected = (
      jnp.expand_dims(x[place], axis) for x in self
    )
    own = jnp.exp(jnp.where(mask, logit - lse, -jnp.inf))
    wanted = jnp.exp(jnp.where(mask, teacher - teacher_lse, -jnp.inf))
    return of_lse * own + of_expected * wanted


def _updated(
  state: _Running,
  logits: list[Array],
  teachers: list[Array],
  masks: list[Array],
  axis: int,
) -> _Running:
  """Folds one tile into the state, along its rows (axis 1) or columns (axis 0)."""
  own = updated(Running(state.peak, state.total), logits, masks, axis)
  before = Running(state.teacher_peak, state.teacher_total)
  after = updated(before, teachers, masks, axis)
  expected = []
  for p, (logit, teacher, mask) in enumerate(zip(logits, teachers, masks, strict=True)):
    shift = jnp.where(after.peak[p] > -jnp.inf, after.peak[p], 0.0)
    exponents = jnp.where(mask, teacher - jnp.expand_dims(shift, axis), -jnp.inf)
    more = jnp.sum(jnp.exp(exponents) * logit, axis=axis)
    expected.append(state.expected[p] * jnp.exp(before.peak[p] - shift) + more)
  return _Running(*own, *after, jnp.stack(expected))
