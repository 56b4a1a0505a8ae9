"""Composed queries of one's own: a picture and a text that lead to another picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks.documents import documents, judgements, places
from gcl_jax.evaluation.benchmarks.files import Files, distinct
from gcl_jax.evaluation.benchmarks.pictures import Pictures, ZipPictures, find_pictures
from gcl_jax.evaluation.benchmarks.task import (
  BOTH,
  IMAGE,
  Benchmark,
  Options,
  Scoring,
  Task,
  chosen,
)

LAYOUT = """\
  composed.jsonl   {"reference": picture, "text": ..., "target": picture} a line; "kind"
                   and "split" are optional, and only the split test is asked
  captions.jsonl   {"image": picture, ...} a line: more candidates; optional
  the pictures     beside it, or in images.zip (or --images=<folder>)"""
CUTOFFS = (1, 5, 10, 50)
_KIND = re.compile(r"[\w.-]{1,60}")  # names a folder of what is exported
_TAKEN = ("all", ".", "..")


def open_composed(root: str, options: Options) -> Benchmark:
  """Queries of `composed.jsonl` over all pictures that the folder names.

  The reference is never an answer. Kinds are scored together and each by itself.

  Raises:
    UserError: a file is missing, a line is not as it should be, a kind that cannot be
      a name, no query is left, none
      of the pictures is there.
  """
  files = Files(root, "composed queries", LAYOUT)
  chosen(options.tasks, ["composed"])
  fields = ("reference", "text", "target")
  lines = files.objects("composed.jsonl", dict.fromkeys(fields, str))
  if any("split" in line for line in lines):
    lines = [line for line in lines if line.get("split") == "test"]
  if not lines:
    raise UserError(f"{files.root / 'composed.jsonl'} has no query of the split test.")
  table = []
  if files.has("captions.jsonl"):
    table = files.objects("captions.jsonl", {"image": str})
  names = [line["image"] for line in table]
  names += [line[side] for line in lines for side in ("reference", "target")]
  gallery = documents("the candidates", distinct(names), images=distinct(names))
  rows = {
    s: places(gallery.ids, [n[s] for n in lines]) for s in ("reference", "target")
  }
  queries = documents(
    "the queries",
    [f"q{k}" for k in range(len(lines))],
    images=[line["reference"] for line in lines],
    texts=[line["text"] for line in lines],
  )

  def scoring(name: str, asked: np.ndarray) -> Scoring:
    return Scoring(
      name,
      (gallery,),
      CUTOFFS,
      judgements(range(len(asked)), rows["target"][asked], len(asked)),
      excluded=rows["reference"][asked][:, None],
      asked=asked,
    )

  scorings = [scoring("all", np.arange(len(lines)))]
  kinds = _kinds(files, lines)
  if len(set(kinds)) > 1:
    scorings += [scoring(k, np.flatnonzero(kinds == k)) for k in distinct(kinds)]
  return Benchmark(
    name="composed",
    tasks=[Task("composed", (BOTH, IMAGE), queries, tuple(scorings))],
    pictures=_pictures(files, options, distinct(names)),
    fusion="checkpoint",
    stored="float32",
    protocol={"masked": "the reference"},
    data_hash=files.digest(),
    summarise=_no_means,
  )


def _kinds(files: Files, lines: list[dict[str, Any]]) -> np.ndarray:
  """The kind of each query; "" of all where none has one."""
  kinds = [str(line.get("kind", "")) for line in lines]
  for kind in distinct(kinds) if any(kinds) else ():
    if kind in _TAKEN or not _KIND.fullmatch(kind):
      raise UserError(
        f"{files.root / 'composed.jsonl'}: {kind[:80]!r} cannot be a kind: name one for "
        "every query, or for none, of letters, digits, '_', '-' and '.', at most 60, and "
        "not 'all'."
      )
  return np.array(kinds)


def _no_means(tasks: Mapping[str, Any]) -> dict[str, Any]:
  del tasks
  return {}


def _pictures(files: Files, options: Options, names: list[str]) -> Pictures:
  if options.images:
    return find_pictures([Path(options.images).expanduser()], names)
  if files.has("images.zip") and not (files.root / names[0]).is_file():
    return ZipPictures(files.find("images.zip"))
  return find_pictures([files.root], names)
