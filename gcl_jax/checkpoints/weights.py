"""The weights of a training state that are to be used: averages, with LoRA merged.

The one place that knows it, for the evaluation while training as for a folder read
later: what `config.eval.best` chose is what is exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gcl_jax.models.lora import merge_lora


def weights_in_use(state: Mapping[str, Any], alpha: float) -> Any:
  """The parameters to evaluate, search with and export.

  Args:
    state: `params`, and `ema` where the run keeps an average: a nested dict of the
      averages of what is trained, without the rest.
    alpha: of `config.lora.alpha`; matters where `params` has factors of LoRA's.

  Returns:
    The model's parameters, a nested dict. What is neither averaged nor adapted is the
    same array.
  """
  return merge_lora(overlaid(state["params"], state.get("ema", {})), alpha)


def overlaid(base: Any, over: Mapping[str, Any]) -> Any:
  """A nested dict with the leaves of `over`, which has some of its paths, in place."""
  if not isinstance(base, Mapping):
    return over
  return {
    name: overlaid(tree, over[name]) if name in over else tree
    for name, tree in base.items()
  }
