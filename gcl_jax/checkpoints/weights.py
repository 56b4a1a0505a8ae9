"""The weights of a training state that are to be used: averaged where the run averages.

The one place that knows it, for the evaluation while training as for a folder read
later: what `config.eval.best` chose is what is exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def weights_in_use(state: Mapping[str, Any]) -> Any:
  """The parameters to evaluate, search with and export.

  Args:
    state: `params`, and `ema` where the run keeps an average: a nested dict of the
      averages of what is trained, without the rest.

  Returns:
    A nested dict like `params`. What is not averaged is the same array.
  """
  return overlaid(state["params"], state.get("ema", {}))


def overlaid(base: Any, over: Mapping[str, Any]) -> Any:
  """A nested dict with the leaves of `over`, which has some of its paths, in place."""
  if not isinstance(base, Mapping):
    return over
  return {
    name: overlaid(tree, over[name]) if name in over else tree
    for name, tree in base.items()
  }
