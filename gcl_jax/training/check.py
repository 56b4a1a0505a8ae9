"""What a config may say: every wrong value is refused by name, before anything else."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from gcl_jax.errors import UserError
from gcl_jax.losses.denominators import DENOMINATORS
from gcl_jax.losses.pairs import FORMS, KERNEL_DEPTH, KERNELS
from gcl_jax.training.optimizer import LOCKS
from gcl_jax.training.update_rules import RULES

SEPARATION_FEATURES = ("none", "initial_text_tower")


def check_loss(config: ConfigDict) -> None:
  """Refuses what `config.loss`, `.temperature` or `.fusion` cannot mean.

  Raises:
    UserError: naming the field, what it holds, and what it may hold.
  """
  loss = config.loss
  _check_choices(
    config,
    {
      "loss.name": ("gcl", "contrastive"),
      "loss.denominator": DENOMINATORS,
      "temperature.mode": ("learned", "fixed"),
      "fusion.of": ("raw", "unit"),
      "loss.form": FORMS,
      "loss.kernel": KERNELS,
      "model.dtype": ("float32", "bfloat16"),
    },
  )
  if loss.kernel != "xla" and loss.form == "dense":
    raise UserError(
      f"config.loss.kernel is {loss.kernel!r}, but config.loss.form is 'dense', which "
      "has no tiles: take another form, or kernel xla."
    )
  direction_weights(config)
  direction_weights(config, "distill")
  scale, top = config.temperature.logit_scale, config.temperature.max_logit_scale
  capped = config.temperature.mode == "learned" and top
  if scale < 0 or (capped and scale > top):
    raise UserError(
      f"config.temperature.logit_scale is {scale}: it is the scale itself (1/tau, such "
      f"as 100), at most config.temperature.max_logit_scale ({top}); 0 keeps the model's."
    )
  features = loss.separation_features
  if loss.intra_modal_separation and not (
    features in SEPARATION_FEATURES or features.endswith(".npy")
  ):
    raise UserError(
      f"config.loss.separation_features is {features!r}: it is none, initial_text_tower "
      "or a .npy file with one row per record."
    )


def check_kernel(config: ConfigDict, depth: int) -> None:
  """Refuses kernels for embeddings of so many numbers, where they take none such.

  Raises:
    UserError: naming both.
  """
  if config.loss.kernel == "pallas" and depth % KERNEL_DEPTH:
    raise UserError(
      f"config.loss.kernel is 'pallas', whose kernels take embeddings of a multiple of "
      f"{KERNEL_DEPTH} numbers, and this model's have {depth}: leave it at xla."
    )


def direction_weights(config: ConfigDict, of: str = "loss") -> np.ndarray | None:
  """`config.<of>.direction_weights` as a (3, 3) float32 array; None is all ones.

  Raises:
    UserError: it is neither empty nor 3 rows of 3 weights of at least 0.
  """
  weights = config[of].direction_weights
  if not len(weights):
    return None
  try:
    array = np.asarray(weights, np.float32)
  except ValueError:
    array = np.zeros(0)
  if array.shape == (9,):
    array = array.reshape(3, 3)
  off_diagonal = array[~np.eye(3, dtype=bool)] if array.shape == (3, 3) else array
  sound = np.isfinite(off_diagonal).all() and (off_diagonal >= 0).all()
  if array.shape != (3, 3) or not sound or not off_diagonal.any():
    raise UserError(
      f"config.{of}.direction_weights is {weights}: 3 rows of 3 weights (query image, "
      "text, fused by candidate image, text, fused), none negative and not all zero."
    )
  return array


def describe_loss(config: ConfigDict) -> str:
  """One line for tables and cards: loss, temperature, features, averaged weights."""
  loss = config.loss
  name = "CL" if loss.name == "contrastive" else f"GCL ({loss.denominator})"
  if loss.intra_modal_separation:
    features = {"none": "no features", "initial_text_tower": "the first text tower"}
    of = features.get(loss.separation_features) or Path(loss.separation_features).name
    name += f" + {loss.intra_modal_separation} x image separation (features: {of})"
  if direction_weights(config) is not None and loss.name == "gcl":
    name += f", direction weights {np.asarray(loss.direction_weights).tolist()}"
  distill = config.get("distill")  # older runs have no such fields
  if distill and distill.teacher:
    own = "" if distill.loss_weight == 1 else f"{distill.loss_weight} x "
    name = f"{own}{name} + {distill.weight} x affinity to {Path(distill.teacher).name}"
    if direction_weights(config, "distill") is not None:
      name += f", direction weights {np.asarray(distill.direction_weights).tolist()}"
  decay = config.get("ema_decay", 0.0)  # older runs have no such field
  weights = f" Weights: their moving average (decay {decay})." if decay else ""
  return f"Loss: {name}; logit scale {config.temperature.mode}.{weights}"


def check_numbers(config: ConfigDict) -> None:
  """Refuses counts and rates that cannot be, and parts that are not there.

  Raises:
    UserError: naming the field.
  """
  at_least = {
    "init.vision_positions": 0,
    "tokenizer.vocab_size": 514,  # all bytes, start and end
    "microbatches": 1,
    "accumulate_steps": 1,
    "log.every": 1,
    "steps": 0,
    "epochs": 0,
    "eval.every": 0,
    "eval.batch_size": 1,
    "checkpoint.every": 0,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": 0,
    "optimizer.learning_rate": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_norm": 0,
    "optimizer.adamw_learning_rate": 0,
    "lora.rank": 0,
    "distill.weight": 0,
    "distill.loss_weight": 0,
    "distill.logit_scale": 0,
    "data.threads": 0,
    "data.prefetch": 0,
  }
  for field, lowest in at_least.items():
    value = _field(config, field)
    if not lowest <= value < math.inf:
      raise UserError(
        f"config.{field} is {value}: it is at least {lowest}, and finite."
      )
  if config.distill.teacher and not (
    config.distill.weight or config.distill.loss_weight
  ):
    raise UserError(
      "config.distill.weight and config.distill.loss_weight are both 0: nothing would be "
      "trained."
    )
  if not 0 <= config.ema_decay < 1:
    raise UserError(
      f"config.ema_decay is {config.ema_decay}: it is at least 0 (off) and below 1."
    )
  if not 0 <= config.model.patch_dropout < 1:
    raise UserError(
      f"config.model.patch_dropout is {config.model.patch_dropout}: it is at least 0 (off) "
      "and below 1."
    )
  if config.lora.rank and not config.lora.alpha > 0:
    raise UserError(f"config.lora.alpha is {config.lora.alpha}: it is above 0.")
  why = {
    "muon": "which turns whole matrices, but LoRA leaves none to train",
    "lamb": "which steps in proportion to a matrix, but LoRA's begin at zero",
  }
  if config.lora.rank and config.optimizer.name in why:
    raise UserError(
      f"config.optimizer.name is {config.optimizer.name}, {why[config.optimizer.name]}: use "
      f"adamw, or set config.lora.rank ({config.lora.rank}) to 0."
    )
  check_optimizer(config)
  if config.log.wandb and importlib.util.find_spec("wandb") is None:
    raise UserError(
      f"config.log.wandb is {config.log.wandb!r} but wandb is not installed: "
      "pip install wandb, or leave the field empty."
    )


def check_optimizer(config: ConfigDict) -> None:
  """Refuses what `config.optimizer` cannot mean.

  Raises:
    UserError: naming the field.
  """
  _check_choices(
    config,
    {
      "optimizer.name": tuple(RULES),
      "optimizer.moment_dtype": ("float32", "bfloat16"),
      "optimizer.locked_tower": ("", *LOCKS),
    },
  )
  for field in ("b1", "b2", "muon_momentum"):
    value = config.optimizer[field]
    if not 0 <= value < 1:
      raise UserError(
        f"config.optimizer.{field} is {value}: it is at least 0 and below 1."
      )
  if not 0 < config.optimizer.layer_decay <= 1:
    raise UserError(
      f"config.optimizer.layer_decay is {config.optimizer.layer_decay}: it is above 0 and "
      "at most 1 (off)."
    )


def _check_choices(config: ConfigDict, choices: Mapping[str, Sequence[str]]) -> None:
  for field, allowed in choices.items():
    value = _field(config, field)
    if value not in allowed:
      names = ", ".join(name or '""' for name in allowed)
      raise UserError(f"config.{field} is {value!r}: it is one of {names}.")


def _field(config: ConfigDict, path: str) -> Any:
  for name in path.split("."):
    config = config[name]
  return config
