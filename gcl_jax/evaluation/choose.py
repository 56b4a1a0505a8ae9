"""Numbers of a result by name: what keep-best watches, what goes into a log."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping

from gcl_jax.errors import UserError
from gcl_jax.evaluation.banks import MODALITIES
from gcl_jax.evaluation.metrics import KS
from gcl_jax.evaluation.nine import CELLS, POOLS, VIEWS, cell_name


def metric_names() -> list[str]:
  """The recalls that can be chosen, as "global.other.R@10" or "local.i->t.R@1".

  "plain." or "centered." may stand before each; plain is meant without. Higher is
  better for all of them.
  """
  groups = ["same", "other", *(cell_name(q, c) for q, c in CELLS)]
  return [f"{pool}.{group}.R@{k}" for pool in POOLS for group in groups for k in KS]


def check_metric(path: str) -> None:
  """Raises UserError, with the nearest names, where `path` is no metric's name."""
  names = metric_names()
  if _split(path)[1] in names:
    return
  near = difflib.get_close_matches(_split(path)[1], names, n=3, cutoff=0.4)
  hint = " or ".join(near) if near else "global.other.R@10"
  raise UserError(f'"{path}" is no metric of the evaluation; did you mean {hint}?')


def best_metric(result: Mapping, path: str) -> float:
  """The recall in percent that `path` names in a result of `evaluate_nine`.

  Raises UserError where no metric has that name, the view was not computed, or the data
  has no such queries.
  """
  check_metric(path)
  view, name = _split(path)
  if view not in result:
    there = " and ".join(v for v in VIEWS if v in result)
    raise UserError(f'"{path}": the evaluation computed only {there}')
  pool, group, recall = name.split(".")
  part = result[view][pool]
  value = (part["cells"].get(group) or part.get(group))[recall]
  if value is None:
    raise UserError(
      f'"{path}": the evaluation data has no such queries; choose another metric,'
      " such as local.other.R@10"
    )
  return value


def scalars(result: Mapping) -> dict[str, float]:
  """What a training log keeps of a result: means, own share and gap, by name."""
  out = {}
  for view in VIEWS:
    if view not in result:
      continue
    part = result[view]
    for pool in POOLS:
      for group in ("same", "other"):
        for k in KS:
          out[f"{view}.{pool}.{group}.R@{k}"] = part[pool][group][f"R@{k}"]
    for name in (*MODALITIES, "mean"):
      out[f"{view}.own_share.{name}"] = part["own_share"][name]
    for pair, delta in part["gap"]["delta"].items():
      out[f"{view}.gap.{pair}"] = delta
  return {name: value for name, value in out.items() if value is not None}


def choose_step(folder: str | os.PathLike, step: str | int, metric: str) -> int:
  """The step of a run's folder that is meant.

  Args:
    folder: of a run with checkpoints.
    step: "latest", "best" or a number.
    metric: what "best" is judged by; see `metric_names`.

  Raises UserError where there is no such checkpoint, or none was evaluated.
  """
  from gcl_jax.checkpoints import read_results, saved_steps

  steps = saved_steps(folder)
  if not steps:
    raise UserError(f"{folder} holds no whole checkpoint: train it first")
  if step == "latest":
    return steps[-1]
  if step == "best":
    check_metric(metric)
    results = read_results(folder)
    scores = {s: best_metric(results[s], metric) for s in steps if s in results}
    if not scores:
      raise UserError(
        f"no checkpoint of {folder} was evaluated while it trained: choose latest or"
        f" one of {', '.join(map(str, steps))}"
      )
    return max(scores, key=lambda s: (scores[s], s))
  if str(step).isdecimal() and int(step) in steps:
    return int(step)
  raise UserError(
    f"{folder} has no checkpoint of step {step}: choose latest, best or one of"
    f" {', '.join(map(str, steps))}"
  )


def _split(path: str) -> tuple[str, str]:
  """The view and the name within it."""
  for view in VIEWS:
    if path.startswith(view + "."):
      return view, path.removeprefix(view + ".")
  return VIEWS[0], path
