"""AdamW with warm-up and cosine, decay by path, and learning-rate factors by path."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from gcl_jax.errors import UserError
from gcl_jax.sharding import first_match, map_with_path, path_of, unused_patterns

# Decay by path, not by rank: a stacked bias is (layers, width) and looks like a matrix.
_DECAYED = r".*/(kernel|embedding)"


def learning_rate_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
  """Step -> learning rate: linear warm-up from 0, then a cosine or a constant.

  Args:
    config: `config.optimizer`.
    steps: length of the run.

  Raises:
    UserError: a warm-up that does not end within the run, or an unknown schedule.
  """
  warmup = config.warmup_steps
  if warmup and warmup >= steps:
    raise UserError(
      f"config.optimizer.warmup_steps is {warmup}, but the run has only {steps} steps: "
      "shorten the warm-up or raise config.steps (or config.epochs)."
    )
  peak = config.learning_rate
  if config.schedule == "cosine":
    after = optax.cosine_decay_schedule(peak, steps - warmup, config.final_fraction)
  elif config.schedule == "constant":
    after = optax.constant_schedule(peak)
  else:
    raise UserError(
      f"config.optimizer.schedule is {config.schedule!r}: it is cosine or constant."
    )
  if not warmup:
    return after
  return optax.join_schedules(
    [optax.linear_schedule(0.0, peak, warmup), after], [warmup]
  )


def multipliers(config: ConfigDict, params: Any) -> Any:
  """A tree of learning-rate factors, by the first pattern that matches; default 1.

  Args:
    config: `config.optimizer`.
    params: arrays or shapes, a nested dict.

  Raises:
    UserError: a pattern that is no regular expression, or matches no parameter.
  """
  rules = [(str(pattern), float(factor)) for pattern, factor in config.multipliers]
  for pattern, _ in rules:
    try:
      re.compile(pattern)
    except re.error as error:
      raise UserError(
        f"config.optimizer.multipliers: {pattern!r} is no regular expression: {error}"
      ) from None
  if unused := unused_patterns(rules, params):
    raise UserError(
      f"config.optimizer.multipliers: no parameter's path matches {unused}. A pattern "
      f"matches the whole path, as in 'text/.*'; paths begin with {sorted(params)}."
    )
  return map_with_path(lambda path, _: first_match(rules, path, 1.0), params)


def frozen_mask(config: ConfigDict, temperature: ConfigDict, params: Any) -> Any:
  """A tree of Python bools: what the run must not change, to the bit."""
  factors = multipliers(config, params)

  def frozen(path: str, factor: float) -> bool:
    fixed_scale = path == "logit_scale" and temperature.mode == "fixed"
    return fixed_scale or factor == 0.0

  return map_with_path(frozen, factors)


def make_optimizer(
  config: ConfigDict, temperature: ConfigDict, params: Any, steps: int
) -> optax.GradientTransformation:
  """Global-norm clip, AdamW, factors by path; frozen parameters have no state.

  Args:
    config: `config.optimizer`.
    temperature: `config.temperature`; a fixed logit scale is a frozen parameter.
    params: arrays or shapes, a nested dict.
    steps: length of the run, for the schedule.

  Raises:
    UserError: an unknown optimizer or schedule, a bad warm-up or multiplier, or a
      configuration that freezes everything.
  """
  if config.name != "adamw":
    raise UserError(f"config.optimizer.name is {config.name!r}: there is adamw.")
  frozen = frozen_mask(config, temperature, params)
  labels = map_with_path(lambda _, f: "frozen" if f else "trained", frozen)
  if "trained" not in jax.tree.leaves(labels):
    raise UserError("config.optimizer.multipliers freezes every parameter.")
  factors = {
    path_of(key_path): factor
    for key_path, factor in jax.tree_util.tree_leaves_with_path(
      multipliers(config, params)
    )
  }
  chain = [
    optax.adamw(
      learning_rate_schedule(config, steps),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=lambda tree: map_with_path(
        lambda path, _: bool(re.fullmatch(_DECAYED, path)), tree
      ),
    ),
    optax.stateless(
      lambda updates, _: map_with_path(lambda path, u: u * factors[path], updates)
    ),
  ]
  if config.clip_norm:
    chain.insert(0, optax.clip_by_global_norm(config.clip_norm))
  return optax.partition(
    {"trained": optax.chain(*chain), "frozen": optax.set_to_zero()}, labels
  )


def cap_logit_scale(params: Any, temperature: ConfigDict) -> Any:
  """CLIP's rule: a learned scale is put back into [1, max] after every update."""
  if temperature.mode == "fixed" or not temperature.max_logit_scale:
    return params
  top = jnp.log(jnp.float32(temperature.max_logit_scale))
  return {**params, "logit_scale": jnp.clip(params["logit_scale"], 0.0, top)}
