"""The update rules by name: how a gradient becomes a step, for stacked blocks too.

A tower's blocks are one tree whose arrays have a leading layers axis. Rules that look at
a whole array (its norm, its rows and columns, its singular values) must look at each
layer's by itself, and a stacked bias must not pass for a matrix: hence rules by path.

All of them are optax's: AdamW (arXiv 1711.05101), Lion (2302.06675), Adafactor as
big_vision uses it (1804.04235, 2106.04560: momentum, no scaling by the parameter's
size), LAMB (1904.00962) and Muon (2502.16982, whose scale lets it take AdamW's learning
rates).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from gcl_jax.sharding import map_with_path

# By path, not by rank: a stacked bias is (layers, width) and looks like a matrix.
_DECAYED = r".*/(kernel|embedding)|lora/.*"
_STACKED = r"(?:lora/)?(vision|text)/blocks/.*"
_BLOCK_MATRICES = r"(vision|text)/blocks/.*/kernel"
# Of Muon's steps to those of AdamW, whose root mean square is about this.
_MUON_RMS = 0.2


def update_rule(
  config: ConfigDict, rate: optax.Schedule, other_rate: optax.Schedule
) -> optax.GradientTransformation:
  """The rule that `config.name` names, weight decay and learning rate included.

  Args:
    config: `config.optimizer`.
    rate: the learning rate by step.
    other_rate: Muon's for what is not a matrix of a block.
  """
  return RULES[config.name](config, rate, other_rate)


def per_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
  """`rule` on each layer of a tower's blocks by itself, on all else as it is.

  Its state for the blocks has a leading layers axis, counters included.
  """

  def init(params):
    # A tower of which nothing is trained has no arrays, and vmap wants one.
    over = jax.vmap(rule.init) if jax.tree.leaves(params) else rule.init
    return over(params)

  def update(updates, state, params=None):
    over = jax.vmap(rule.update) if jax.tree.leaves(updates) else rule.update
    return over(updates, state, params)

  def stack_of(path: str, _) -> str:
    stacked = re.fullmatch(_STACKED, path)
    return stacked[1] if stacked else "single"

  layers = optax.GradientTransformation(init, update)
  return optax.partition(
    # The towers apart, for they may differ in depth.
    {"vision": layers, "text": layers, "single": rule},
    lambda tree: map_with_path(stack_of, tree),
  )


def _decayed(tree: Any) -> Any:
  return map_with_path(lambda path, _: bool(re.fullmatch(_DECAYED, path)), tree)


def _adamw(config, rate, other_rate) -> optax.GradientTransformation:
  del other_rate
  return optax.adamw(
    rate,
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    mu_dtype=config.moment_dtype,
    weight_decay=config.weight_decay,
    mask=_decayed,
  )


def _lion(config, rate, other_rate) -> optax.GradientTransformation:
  del other_rate
  return optax.lion(
    rate,
    b1=config.b1,
    b2=config.b2,
    mu_dtype=config.moment_dtype,
    weight_decay=config.weight_decay,
    mask=_decayed,
  )


def _lamb(config, rate, other_rate) -> optax.GradientTransformation:
  del other_rate
  # As in its authors' code what does not decay has Adam's step. A bias that starts at
  # zero would otherwise stay there: its first steps are as small as it is.
  return optax.chain(
    optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.moment_dtype),
    optax.add_decayed_weights(config.weight_decay, _decayed),
    optax.masked(per_layer(optax.scale_by_trust_ratio()), _decayed),
    optax.scale_by_learning_rate(rate),
  )


def _adafactor(config, rate, other_rate) -> optax.GradientTransformation:
  del other_rate

  def decay(step, exponent):
    return jnp.minimum(1.0 - (step + 1.0) ** -exponent, config.b2)

  factored = optax.scale_by_factored_rms(decay_rate_fn=decay)
  chain = [per_layer(optax.chain(factored, optax.clip_by_block_rms(1.0)))]
  if config.b1:
    chain.append(
      optax.ema(config.b1, debias=False, accumulator_dtype=config.moment_dtype)
    )
  # Not `optax.adafactor`: its decay is not scaled by the learning rate.
  return optax.chain(
    *chain,
    optax.add_decayed_weights(config.weight_decay, _decayed),
    optax.scale_by_learning_rate(rate),
  )


def _muon(config, rate, other_rate) -> optax.GradientTransformation:
  def layers_of_matrices(tree):
    dimensions = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree.map(lambda _: dimensions, tree)

  def label(path: str, _) -> str:
    return "matrix" if re.fullmatch(_BLOCK_MATRICES, path) else "other"

  matrices = optax.contrib.muon(
    rate,
    beta=config.muon_momentum,
    weight_decay=config.weight_decay,
    mu_dtype=config.moment_dtype,
    muon_weight_dimension_numbers=layers_of_matrices,
    consistent_rms=_MUON_RMS,
  )
  # Not the Adam within `optax.contrib.muon`: that one is Nesterov's.
  other = _adamw(config, other_rate, None)
  return optax.partition(
    {"matrix": matrices, "other": other}, lambda tree: map_with_path(label, tree)
  )


RULES: dict[str, Callable[..., optax.GradientTransformation]] = {
  "adamw": _adamw,
  "lion": _lion,
  "adafactor": _adafactor,
  "lamb": _lamb,
  "muon": _muon,
}
