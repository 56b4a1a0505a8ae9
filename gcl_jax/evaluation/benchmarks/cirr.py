"""CIRR (arXiv 2108.04024): a picture and a change to it, on real photographs.

The reference picture is never an answer: it is left out of what its query searches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks.documents import documents, judgements, places
from gcl_jax.evaluation.benchmarks.files import Files
from gcl_jax.evaluation.benchmarks.pictures import find_pictures
from gcl_jax.evaluation.benchmarks.result import mean_of, recall_of
from gcl_jax.evaluation.benchmarks.task import (
  BOTH,
  IMAGE,
  Benchmark,
  Options,
  Scoring,
  Task,
  chosen,
  sizes,
)

LAYOUT = """\
  captions/cap.rc2.<val|test1>.json
  image_splits/split.rc2.<val|test1>.json
  dev/*.png, test1/*.png                (as the split files say; or --images=<folder>)
from https://github.com/Cuberick-Orion/CIRR, branch cirr_dataset"""
CUTOFFS, SUBSET_CUTOFFS = (1, 5, 10, 50), (1, 2, 3)
_SIZES = {"val": (4_181, 2_297), "test1": (4_148, 2_315)}  # queries, pictures


def open_cirr(root: str, options: Options) -> Benchmark:
  """The splits asked for (`val` by default; `test1` has no public answers).

  Raises:
    UserError: a file is missing, an entry names a picture that its split lacks, none of
      the pictures is there.
  """
  files = Files(root, "CIRR", LAYOUT)
  tasks, references = [], []
  for split in chosen(options.tasks, ["val", "test1"], ["val"]):
    task, paths = _task(files, split)
    tasks.append(task)
    references += paths
  folders = [files.root, files.root / "images", files.root / "img_raw"]
  if options.images:
    folders = [Path(options.images).expanduser()]
  return Benchmark(
    name="cirr",
    tasks=tasks,
    pictures=find_pictures(folders, references),
    fusion="checkpoint",
    stored="float32",
    protocol={
      "gallery": "the pictures of the split's file",
      "masked": "the reference (official)",
      "recall": "of target_hard (official)",
    },
    data_hash=files.digest(),
    summarise=summarise,
  )


def summarise(tasks: Mapping[str, Any]) -> dict[str, Any]:
  if "val" not in tasks:
    return {}
  both = [recall_of(tasks, "val", "recall", 5), recall_of(tasks, "val", "subset", 1)]
  return {"mean of R@5 and subset R@1": mean_of(both)}


def read_split(files: Files, split: str) -> dict[str, str]:
  """Names and relative paths of a split's pictures."""
  name = f"image_splits/split.rc2.{split}.json"
  paths = files.json(name)
  if not isinstance(paths, dict) or not all(isinstance(p, str) for p in paths.values()):
    raise UserError(f"{files.root / name} is no object of names: is it CIRR's?")
  return {name: path.removeprefix("./") for name, path in paths.items()}


def read_captions(files: Files, split: str) -> list[dict[str, Any]]:
  """The entries of a caption file, with the fields that all of them have."""
  name = f"captions/cap.rc2.{split}.json"
  entries = files.entries(name)
  for entry in entries:
    files.field(entry, "pairid", name)
    for field in ("reference", "caption"):
      files.field(entry, field, name, str)
    files.strings(files.field(entry, "img_set", name), "members", name)
  return entries


def _task(files: Files, split: str) -> tuple[Task, list[str]]:
  paths, entries = read_split(files, split), read_captions(files, split)
  public = "target_hard" in entries[0]
  gallery = documents(
    f"the gallery of {split}", list(paths), images=list(paths.values())
  )

  def rows(names: list[str]) -> np.ndarray:
    found = places(gallery.ids, names)
    if (found < 0).any():
      raise UserError(
        f"captions/cap.rc2.{split}.json names {names[int(np.argmin(found))]}, which "
        f"image_splits/split.rc2.{split}.json lacks: take both from one release."
      )
    return found

  reference = rows([entry["reference"] for entry in entries])[:, None]
  members = [entry["img_set"]["members"] for entry in entries]
  if len(set(map(len, members))) > 1:
    raise UserError(f"captions/cap.rc2.{split}.json: an image set of another size.")
  subset = rows([name for group in members for name in group])
  subset = subset.reshape(len(entries), -1)
  relevant = None
  if public:
    name = f"captions/cap.rc2.{split}.json"
    targets = rows([files.field(e, "target_hard", name, str) for e in entries])
    relevant = judgements(np.arange(len(entries)), targets, len(entries))
  queries = documents(
    f"the queries of {split}",
    [str(entry["pairid"]) for entry in entries],
    images=[paths[entry["reference"]] for entry in entries],
    texts=[entry["caption"] for entry in entries],
  )
  head = {"version": "rc2"}
  scorings = (
    Scoring(
      "recall",
      (gallery,),
      CUTOFFS,
      relevant,
      excluded=reference,
      server=head | {"metric": "recall"},
    ),
    Scoring(
      "subset",
      (gallery,),
      SUBSET_CUTOFFS,
      relevant,
      excluded=reference,
      lists=subset,
      server=head | {"metric": "recall_subset"},
    ),
  )
  size = sizes(len(queries), len(gallery), _SIZES[split])
  return Task(split, (BOTH, IMAGE), queries, scorings, size), list(paths.values())
