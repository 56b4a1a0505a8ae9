"""LoRA as a run's config asks for it."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from gcl_jax.models.lora import first_factors, lora_shapes

_TOWERS = {"image": "vision", "text": "text"}


def adapted_shapes(config: ConfigDict, shapes: Any) -> Any:
  """The model's shapes with those of LoRA's factors, where the config wants some.

  A locked tower gets none.

  Raises:
    UserError: see `gcl_jax.models.lora.lora_shapes`.
  """
  if not config.lora.rank:
    return shapes
  matrices = {
    tower: tuple(config.lora[modality])
    for modality, tower in _TOWERS.items()
    if config.optimizer.locked_tower != modality
  }
  return {**shapes, "lora": lora_shapes(shapes, config.lora.rank, matrices)}


def adapted(params: Any, shapes: Any, seed: int) -> Any:
  """The first parameters of a run: the model's, and factors that change nothing yet.

  Args:
    params: the model's.
    shapes: of `adapted_shapes`.
    seed: the run's.
  """
  if "lora" not in shapes:
    return params
  return {**params, "lora": first_factors(shapes["lora"], seed)}
