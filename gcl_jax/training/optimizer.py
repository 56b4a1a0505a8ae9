"""The optimizer of a run: clipping, the update rule, learning-rate factors, freezing."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from gcl_jax.errors import UserError
from gcl_jax.sharding import first_match, map_with_path, path_of, unused_patterns
from gcl_jax.training.depth import depth_factors
from gcl_jax.training.update_rules import RULES, update_rule

LOCKS = {
  "image": r"(lora/)?(vision|image_projection)/.*",
  "text": r"(lora/)?(text|text_projection)/.*",
}
_FIXED = "fixed/"  # what a file holds and no training moves (`models/vista.py`)
_BASE_OF_LORA = r"(vision|text|image_projection|text_projection)/.*"


def learning_rate_schedule(
  config: ConfigDict, steps: int, peak: float = 0.0
) -> optax.Schedule:
  """Step -> learning rate: linear warm-up from 0, then a cosine or a constant.

  Args:
    config: `config.optimizer`.
    steps: length of the run.
    peak: another one than the config's; 0: the config's.

  Raises:
    UserError: a warm-up that does not end within the run, or an unknown schedule.
  """
  warmup = config.warmup_steps
  if warmup and warmup >= steps:
    raise UserError(
      f"config.optimizer.warmup_steps is {warmup}, but the run has only {steps} steps: "
      "shorten the warm-up or raise config.steps (or config.epochs)."
    )
  peak = peak or config.learning_rate
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
  """A tree of Python bools: what the run must not change, to the bit.

  That is a fixed logit scale, a locked tower, whatever has a factor of 0, what a model
  never trains (`fixed/...`), and beside LoRA's factors (`lora/...`) all of the towers
  and projections.
  """
  factors = multipliers(config, params)

  def frozen(path: str, factor: float) -> bool:
    fixed_scale = path == "logit_scale" and temperature.mode == "fixed"
    locked = config.locked_tower and re.fullmatch(LOCKS[config.locked_tower], path)
    base = "lora" in params and re.fullmatch(_BASE_OF_LORA, path)
    fixed = path.startswith(_FIXED)
    return bool(fixed_scale or locked or base or fixed or factor == 0.0)

  return map_with_path(frozen, factors)


def make_optimizer(
  config: ConfigDict, temperature: ConfigDict, params: Any, steps: int
) -> optax.GradientTransformation:
  """Global-norm clip, update rule, factors by path; frozen parameters have no state.

  Args:
    config: `config.optimizer`.
    temperature: `config.temperature`; a fixed logit scale is a frozen parameter.
    params: arrays or shapes, a nested dict.
    steps: length of the run, for the schedule.

  Raises:
    UserError: an unknown optimizer or schedule, a bad warm-up or multiplier, or a
      configuration that freezes everything.
  """
  if config.name not in RULES:
    raise UserError(
      f"config.optimizer.name is {config.name!r}: it is one of {', '.join(RULES)}."
    )
  frozen = frozen_mask(config, temperature, params)
  labels = map_with_path(lambda _, f: "frozen" if f else "trained", frozen)
  if "trained" not in jax.tree.leaves(labels):
    raise UserError(
      "config.optimizer freezes every parameter, by its multipliers or its locked tower: leave "
      "something to train."
    )
  factors = {
    path_of(key_path): factor
    for key_path, factor in jax.tree_util.tree_leaves_with_path(
      _all_factors(config, params)
    )
  }
  chain = [
    update_rule(
      config,
      learning_rate_schedule(config, steps),
      learning_rate_schedule(config, steps, config.adamw_learning_rate),
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


def _all_factors(config: ConfigDict, params: Any) -> Any:
  """By path and by depth; the latter are arrays for stacked blocks."""
  by_path = multipliers(config, params)
  if config.layer_decay == 1.0:
    return by_path
  by_depth = depth_factors(config.layer_decay, params)
  return jax.tree.map(lambda a, b: a * b, by_path, by_depth)


def cap_logit_scale(params: Any, temperature: ConfigDict) -> Any:
  """CLIP's rule: a learned scale is put back into [1, max] after every update."""
  if temperature.mode == "fixed" or not temperature.max_logit_scale:
    return params
  top = jnp.log(jnp.float32(temperature.max_logit_scale))
  return {**params, "logit_scale": jnp.clip(params["logit_scale"], 0.0, top)}
