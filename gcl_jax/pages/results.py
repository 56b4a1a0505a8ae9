"""Results of the nine-direction evaluation, read back from JSON and checked.

The files may be old, damaged or not ours: what is needed is checked here, so that a page
is made of numbers only. What older evaluations lack is None.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcl_jax.errors import UserError
from gcl_jax.evaluation import VIEWS, direction_names
from gcl_jax.evaluation.banks import MODALITIES
from gcl_jax.pages.page import is_picture
from gcl_jax.paths import AnyPath, as_path, is_remote

POOLS = ("local", "global")
GROUPS = ("same", "other")
SHOWN_KS = (1, 5, 10)
_LARGEST = 1e15  # that a count or a number of ours can be


@dataclass(frozen=True)
class Result:
  """One model's evaluation.

  Attributes:
    name: how the page calls it; no two results alike.
    path: the file that it was read from.
    counts: the items, as the evaluation counted them.
    checkpoint, split: as they were given to the evaluation.
    views: "plain" and "centered" as `evaluate_nine` made them, checked.
    examples: as `make_examples` made them, checked; None in files without.
    losses: (step, loss) of the run, None where it kept no metrics.
  """

  name: str
  path: str
  counts: Mapping[str, int]
  checkpoint: str
  split: str
  views: Mapping[str, Mapping]
  examples: Sequence[Mapping] | None
  losses: Sequence[tuple[float, float]] | None


def read_results(arguments: Sequence[str]) -> list[Result]:
  """Reads evaluations: files, each as PATH or NAME=PATH.

  Without a name a result is called by its checkpoint's last name, by the file's where
  two would be called alike.

  Raises:
    UserError: no file, one that is not there, no evaluation, or damaged; two names
      alike.
  """
  if not arguments:
    raise UserError(
      "name the evaluations: python -m gcl_jax.report a.json b.json --output=report.html"
      " (python -m gcl_jax.evaluate --output=a.json makes them)."
    )
  given = [_named(argument) for argument in arguments]
  read = [(name, path, _read(path)) for name, path in given]
  names = _names([(name, path, str(data["checkpoint"])) for name, path, data in read])
  twice = [name for name, count in Counter(names).items() if count > 1]
  if twice:
    raise UserError(
      f'two evaluations would be called "{twice[0]}": name them, as in'
      f" first={given[0][1]}."
    )
  return [
    Result(
      name=name,
      path=str(path),
      counts=_counts(path, data.get("items")),
      checkpoint=str(data["checkpoint"]),
      split=str(data.get("split", "")),
      views=_views(path, data),
      examples=_examples(path, data.get("examples")),
      losses=_losses(str(data["checkpoint"]), path),
    )
    for name, (_, path, data) in zip(names, read, strict=True)
  ]


def _named(argument: str) -> tuple[str, AnyPath]:
  whole = as_path(argument)
  name, equals, path = argument.partition("=")
  if not equals or "/" in name or whole.is_file():
    return "", whole
  return name, as_path(path)


def _names(given: Sequence[tuple[str, AnyPath, str]]) -> list[str]:
  short = [name or Path(checkpoint).name for name, _, checkpoint in given]
  counts = Counter(short)
  return [
    name or (label if counts[label] == 1 else Path(str(path)).stem)
    for label, (name, path, _) in zip(short, given, strict=True)
  ]


def _read(path: AnyPath) -> dict:
  if path.is_dir():
    raise UserError(
      f"{path} is a folder: name the JSON file that python -m gcl_jax.evaluate"
      " --output=... wrote."
    )
  if not path.is_file():
    raise UserError(
      f"{path}: there is no such file; python -m gcl_jax.evaluate --output={path} makes"
      " one."
    )
  try:
    data = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} cannot be read as JSON: {error}.") from error
  if isinstance(data, dict) and "benchmark" in data:
    raise UserError(
      f"{path} is the result of a public benchmark, which has no page: reports are of"
      " evaluations in nine directions (without --benchmark)."
    )
  if not isinstance(data, dict) or not any(view in data for view in VIEWS):
    raise UserError(
      f"{path} is no evaluation in nine directions: name a file that"
      " python -m gcl_jax.evaluate --output=... wrote."
    )
  return {"checkpoint": path, **data}


def _damaged(path: AnyPath, where: str, what: object) -> UserError:
  shown = repr(what)
  shown = shown if len(shown) < 40 else shown[:39] + "…"
  return UserError(f"{path} is damaged: {where} is {shown}; evaluate the model again.")


class _Reader:
  """Walks a result, and says where it is not what it should be."""

  def __init__(self, path: AnyPath, root: Any, where: str):
    self.path, self.value, self.where = path, root, where

  def __getitem__(self, key: str) -> _Reader:
    inner = self.value.get(key) if isinstance(self.value, dict) else None
    return _Reader(self.path, inner, f"{self.where}.{key}")

  def fail(self) -> UserError:
    return _damaged(self.path, self.where, self.value)

  def number(self, *, none: bool = False) -> float | None:
    if self.value is None and none:
      return None
    kind = isinstance(self.value, (int, float)) and not isinstance(self.value, bool)
    if not kind or not abs(self.value) < _LARGEST:  # NaN is not below it either
      raise self.fail()
    return self.value

  def count(self) -> int:
    if self.number() < 0:
      raise self.fail()
    return int(self.value)

  def numbers(self) -> list[float]:
    if not isinstance(self.value, list):
      raise self.fail()
    each = enumerate(self.value)
    return [_Reader(self.path, x, f"{self.where}[{i}]").number() for i, x in each]

  def text(self, *, none: bool = False) -> str | None:
    if self.value is None and none:
      return None
    if not isinstance(self.value, str):
      raise self.fail()
    return self.value


def _counts(path: AnyPath, data: Any) -> dict[str, int]:
  if not isinstance(data, dict):
    raise _damaged(path, "items", data)
  return {
    str(key): int(_Reader(path, value, f"items.{key}").number())
    for key, value in data.items()
  }


def _views(path: AnyPath, data: dict) -> dict[str, dict]:
  return {
    view: _view(_Reader(path, data[view], view)) for view in VIEWS if view in data
  }


def _view(at: _Reader) -> dict:
  if not isinstance(at.value, dict):
    raise at.fail()
  share = at["own_share"]
  return {
    **{pool: _pool(at[pool]) for pool in POOLS},
    "own_share": {
      name: share[name].number(none=True) for name in (*MODALITIES, "mean")
    },
    "no_bias": {name: share["no_bias"][name].number(none=True) for name in MODALITIES},
    "top10_share": None
    if at["top10_share"].value is None
    else {
      name: at["top10_share"][name].number(none=True) for name in direction_names()
    },
    "delta": {
      pair: at["gap"]["delta"][pair].number(none=True)
      for pair in ("i-t", "i-it", "t-it")
    },
    "sketch": _sketch(at["sketch"]),
  }


def _pool(at: _Reader) -> dict:
  ladder = None if at["ladder"].value is None else at["ladder"].numbers()
  if ladder and (ladder[0] < 1 or any(b <= a for a, b in itertools.pairwise(ladder))):
    raise at["ladder"].fail()
  cells = {name: _cell(at["cells"][name], ladder) for name in direction_names()}
  return {"ladder": ladder, "cells": cells, **{g: _mean(at[g], cells) for g in GROUPS}}


def _cell(at: _Reader, ladder: list[float] | None) -> dict:
  found = at["found"].numbers() if ladder and at["found"].value is not None else None
  if found is not None and len(found) != len(ladder):
    raise at["found"].fail()
  queries, pool = at["queries"].count(), at["pool"].count()
  if queries and not pool:
    raise at["pool"].fail()
  return {
    **{f"R@{k}": at[f"R@{k}"].number(none=True) for k in SHOWN_KS},
    "median_rank": at["median_rank"].number(none=True),
    "queries": queries,
    "pool": pool,
    "marked": bool(at["marked"].value),
    "found": found,
  }


def _mean(at: _Reader, cells: Mapping[str, dict]) -> dict:
  names = at["cells"].value
  if not isinstance(names, list) or not all(
    isinstance(name, str) and name in cells for name in names
  ):
    raise at["cells"].fail()
  return {
    **{f"R@{k}": at[f"R@{k}"].number(none=True) for k in SHOWN_KS},
    "se": {f"R@{k}": at["se"][f"R@{k}"].number(none=True) for k in SHOWN_KS},
    "cells": names,
  }


def _sketch(at: _Reader) -> dict | None:
  if at.value is None:
    return None
  out: dict = {"explained": at["explained"].numbers()}
  for name in MODALITIES:
    bank = at[name]
    x, y = bank["x"].numbers(), bank["y"].numbers()
    mean = None if bank["mean"].value is None else bank["mean"].numbers()
    if len(x) != len(y) or (mean is not None and len(mean) != 2):
      raise bank.fail()
    out[name] = {"x": x, "y": y, "mean": mean}
  return out


def _examples(path: AnyPath, data: Any) -> list[dict] | None:
  if not data:
    return None
  if not isinstance(data, list):
    raise _damaged(path, "examples", data)
  return [
    _example(_Reader(path, each, f"examples[{i}]")) for i, each in enumerate(data)
  ]


def _example(at: _Reader) -> dict:
  found = at["found"].value
  if not isinstance(found, list):
    raise at["found"].fail()
  return {
    "query": at["query"].text(),
    "answer": at["answer"].text(),
    **_shown(at),
    "rank": int(at["rank"].number()),
    "found": [
      _found(_Reader(at.path, each, f"{at.where}.found[{i}]"))
      for i, each in enumerate(found)
    ],
  }


def _found(at: _Reader) -> dict:
  return {
    "modality": at["modality"].text(),
    **_shown(at),
    "score": at["score"].number(),
    "right": bool(at["right"].value),
  }


def _shown(at: _Reader) -> dict:
  image = at["image"].text(none=True)
  if image is not None and not is_picture(image):
    raise at["image"].fail()
  return {
    "item": at["item"].text(),
    "text": at["text"].text(none=True),
    "image": image,
  }


def _losses(checkpoint: str, path: AnyPath) -> list[tuple[float, float]] | None:
  """Steps and losses from the run's folder, or from beside the evaluation.

  The checkpoint is what a file says, which may be a stranger's: no store is asked for it.
  """
  for folder in (checkpoint, str(path.parent)):
    if folder == checkpoint and is_remote(folder):
      continue
    try:
      file = as_path(folder) / "metrics.jsonl"
      lines = file.read_text().splitlines() if file.is_file() else []
    except (OSError, UserError, ValueError):
      continue  # a store that cannot be reached, no path
    points = [point for point in map(_loss, lines) if point is not None]
    if points:
      return points
  return None


def _loss(line: str) -> tuple[float, float] | None:
  try:
    values = json.loads(line)
    point = float(values["step"]), float(values["loss"])
  except (ValueError, KeyError, TypeError, OverflowError):
    return None  # a line of an evaluation, or one that a kill cut short
  return point if all(abs(x) < _LARGEST for x in point) else None  # no NaN either
