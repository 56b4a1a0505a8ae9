"""The result of a benchmark: one object for the file, one table for the screen."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

_LETTERS = {"image": "i", "text": "t", "image,text": "it"}


def mean_of(values: list[float | None]) -> float | None:
  """The plain mean; None where one is missing, so that nothing is averaged silently."""
  if not values or None in values:
    return None
  return float(np.mean(values))


def recall_of(
  tasks: Mapping[str, Any], task: str, scoring: str, k: int
) -> float | None:
  """A recall in percent, for a mean of the benchmark's own.

  None where it is not there, is of partial data, or of another size than the official.
  """
  block = tasks.get(task, {}).get("scores", {}).get(scoring)
  if block is None or block["partial"] or task_is_partial(tasks[task]):
    return None
  if not tasks[task].get("official_size", True):
    return None
  return block.get("recall", {}).get(str(k))


def task_is_partial(task: Mapping[str, Any]) -> bool:
  if "scores" not in task:
    return bool(task["partial"])
  return any(block["partial"] for block in task["scores"].values())


def directions_of(tasks: Mapping[str, Any]) -> dict[str, Any]:
  """Means over the tasks of each direction, by scoring; partial ones left out.

  Each names its tasks, and has the K that all of them have.
  """
  grouped: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
  for task_name, task in tasks.items():
    for name, block in task.get("scores", {}).items():
      if block["partial"] or "recall" not in block:
        continue
      of_direction = grouped.setdefault(task["direction"], {})
      of_direction.setdefault(name, {})[task_name] = block["recall"]
  return {
    direction: {name: _mean_recalls(by_task) for name, by_task in blocks.items()}
    for direction, blocks in grouped.items()
  }


def _mean_recalls(by_task: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
  rows = list(by_task.values())
  shared = [k for k in rows[0] if all(k in row for row in rows)]
  return {"tasks": list(by_task)} | {
    k: float(np.mean([row[k] for row in rows])) for k in shared
  }


def table_of(result: Mapping[str, Any]) -> str:
  """The result as a table, 100 columns at most, and what to beware of below it."""
  console = Console(file=io.StringIO(), width=100, no_color=True)
  rows = [
    (name, task["direction"], scoring, block)
    for name, task in result["tasks"].items()
    for scoring, block in task.get("scores", {}).items()
  ]
  cutoffs = list(dict.fromkeys(k for *_, b in rows for k in b.get("recall", {})))
  cutoffs.sort(key=int)
  if rows:
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("task", "direction", "scoring"):
      table.add_column(head)
    for head in ("queries", "pool", *(f"R@{k}" for k in cutoffs)):
      table.add_column(head, justify="right")
    for name, direction, scoring, block in rows:
      recalls, wide = block.get("recall", {}), block.get("wide_ties", [])
      table.add_row(
        name + ("*" if block["partial"] else ""),
        " > ".join(_LETTERS[side] for side in direction.split(" -> ")),
        scoring,
        _count(block["queries"]),
        _count(block["candidates"]),
        *(_cell(recalls.get(k)) + ("~" if int(k) in wide else "") for k in cutoffs),
      )
    console.print(table)
  for line in _lines(result):
    console.print(line, markup=False, highlight=False)
  return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _lines(result: Mapping[str, Any]) -> list[str]:
  tasks, lines = result["tasks"], []
  for name, task in tasks.items():
    for part in ("all", "foreign_texts"):
      if part in task:
        lines.append(
          f"{name}, {part.replace('_', ' ')}: Kendall's tau-c {task[part]['tau_c']:.4f} "
          f"over {task[part]['pairs']:,} pairs"
        )
  for name, value in result["summary"].items():
    if not isinstance(value, Mapping):
      shown = (
        "not given (not all tasks, partial ones, or of another size)"
        if value is None
        else f"{value:.2f}"
      )
      lines.append(f"{name}: {shown}")
  blocks = [b for task in tasks.values() for b in task.get("scores", {}).values()]
  if any(block.get("wide_ties") for block in blocks):
    lines.append(
      "~ ties alone could move it by more than 0.05 points: the file has the interval"
    )
  for name, task in tasks.items():
    if not task.get("official_size", True):
      counts = [
        f"{found:,} {what} (official: {want:,})"
        for what, (found, want) in task["sizes"].items()
      ]
      lines.append(
        f"{name}: {', '.join(counts)}: of another size, and in no mean of the benchmark's"
      )
  partial = [name for name, task in tasks.items() if task_is_partial(task)]
  if partial:
    lines.append(
      f"* PARTIAL: pictures are missing in {', '.join(partial)}; these numbers are of what "
      "is there, compare with nothing, and no mean includes them"
    )
  zeros = sum(sum(task.get("zero_vectors", {}).values()) for task in tasks.values())
  if zeros:
    lines.append(f"{zeros:,} embeddings are zero vectors")
  return lines + list(result.get("notes", []))


def _cell(value: float | None) -> str:
  return "" if value is None else f"{value:.2f}"


def _count(value: int | list[int]) -> str:
  return f"{value:,}" if isinstance(value, int) else f"{value[0]:,}-{value[1]:,}"
