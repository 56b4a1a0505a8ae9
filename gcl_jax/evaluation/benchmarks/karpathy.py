"""COCO 5K (and 1K) and Flickr30k 1K: Karpathy's test splits, captions and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks.documents import Documents, documents, judgements
from gcl_jax.evaluation.benchmarks.files import Files
from gcl_jax.evaluation.benchmarks.pictures import find_pictures
from gcl_jax.evaluation.benchmarks.result import mean_of, recall_of
from gcl_jax.evaluation.benchmarks.task import (
  IMAGE,
  TEXT,
  Benchmark,
  Options,
  Scoring,
  Task,
  chosen,
  sizes,
)

_FILES = {
  "coco": ("dataset_coco.json", "coco_karpathy_test.json"),
  "flickr30k": ("dataset_flickr30k.json", "flickr30k_test.json"),
}
_FOLDERS = {
  "coco": ("", "images"),
  "flickr30k": ("", "images", "flickr30k-images", "flickr30k_images"),
}
LAYOUTS = {
  "coco": """\
  dataset_coco.json (Karpathy's) or coco_karpathy_test.json
  val2014/*.jpg     (or --images=<folder that holds val2014>)""",
  "flickr30k": """\
  dataset_flickr30k.json (Karpathy's) or flickr30k_test.json
  flickr30k-images/*.jpg (or images/, or --images=<folder>)""",
}
CUTOFFS = (1, 5, 10, 50)
_CAPTIONS = 5  # of COCO's five to seven
_FOLD = 1_000
_PICTURES = {"coco": 5_000, "flickr30k": 1_000}  # of the test splits


def open_coco(root: str, options: Options) -> Benchmark:
  """COCO 5K, both ways, and the mean over its five folds of a thousand."""
  return _open("coco", root, options)


def open_flickr30k(root: str, options: Options) -> Benchmark:
  """Flickr30k 1K, both ways."""
  return _open("flickr30k", root, options)


def _open(name: str, root: str, options: Options) -> Benchmark:
  """Raises UserError where files, captions or all pictures are missing."""
  files = Files(root, name, LAYOUTS[name])
  wanted = chosen(options.tasks, ["i2t", "t2i"])
  images, captions = _read(files, name)
  pictures = documents(f"the pictures of {name}", images, images=images)
  texts = documents(
    f"the captions of {name}",
    [f"{image}#{k}" for image, found in captions for k in range(len(found))],
    texts=[text for _, found in captions for text in found],
  )
  owner = np.repeat(np.arange(len(images)), [len(found) for _, found in captions])
  tasks = [_task(name, direction, pictures, texts, owner) for direction in wanted]
  folders = [files.root / part for part in _FOLDERS[name]]
  if options.images:
    folders = [Path(options.images).expanduser()]
  return Benchmark(
    name=name,
    tasks=tasks,
    pictures=find_pictures(folders, images),
    fusion="checkpoint",
    stored="float32",
    protocol={
      "split": "Karpathy's test",
      "captions": f"the first {_CAPTIONS} of a picture, as written, no prompt",
      "recall": "of any own caption; of the own picture",
    },
    data_hash=files.digest(),
    summarise=summarise,
  )


def summarise(tasks: Mapping[str, Any]) -> dict[str, Any]:
  """The means over the folds of a thousand."""
  out = {}
  for name, task in tasks.items():
    folds = [scoring for scoring in task["scores"] if scoring.startswith("fold")]
    for k in CUTOFFS if folds else ():
      rows = [recall_of(tasks, name, fold, k) for fold in folds]
      out[f"{name}, mean of {len(folds)} folds of {_FOLD:,}, R@{k}"] = mean_of(rows)
  return out


def _read(files: Files, name: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
  """Relative paths of the test pictures, and (path, captions) of each, in file order."""
  found = []
  data = files.json(*_FILES[name])
  karpathy = isinstance(data, dict)
  where = _FILES[name][0 if karpathy else 1]
  data = files.field(data, "images", where) if karpathy else data
  for entry in files.items(data, files.root / where):
    if karpathy:
      if files.field(entry, "split", where) != "test":
        continue
      path = files.field(entry, "filename", where, str)
      path = f"{entry['filepath']}/{path}" if entry.get("filepath") else path
      sentences = files.field(entry, "sentences", where, list)
      texts = [files.field(s, "raw", where, str) for s in sentences]
    else:
      path = files.field(entry, "image", where, str)
      texts = files.field(entry, "caption", where)
      texts = (
        [texts] if isinstance(texts, str) else files.strings(entry, "caption", where)
      )
    found.append((path, texts[:_CAPTIONS]))
  if not found or not all(texts for _, texts in found):
    raise UserError(
      f"{files.root / where} has no test pictures, or one without a caption: is it the "
      "official file?"
    )
  return [path for path, _ in found], found


def _task(
  name: str, direction: str, pictures: Documents, texts: Documents, owner: np.ndarray
) -> Task:
  """`owner`: (captions,) the picture of each."""
  captions = np.arange(len(owner))
  pairs = (owner, captions) if direction == "i2t" else (captions, owner)
  queries, pool = (pictures, texts) if direction == "i2t" else (texts, pictures)
  whole = judgements(*pairs, len(queries))
  scorings = [Scoring(f"{_thousands(len(pictures))}", (pool,), CUTOFFS, whole)]
  fold_of = np.arange(len(pictures)) // _FOLD
  for fold in (
    range(len(pictures) // _FOLD) if name == "coco" and len(pictures) > _FOLD else ()
  ):
    ours = fold_of == fold, fold_of[owner] == fold
    asking, allowed = ours if direction == "i2t" else reversed(ours)
    asked = np.flatnonzero(asking)
    place = np.cumsum(asking) - 1
    keep = asking[pairs[0]]
    answers = judgements(place[pairs[0][keep]], pairs[1][keep], len(asked))
    scorings.append(
      Scoring(
        f"fold {fold + 1}", (pool,), CUTOFFS, answers, asked=asked, allowed=allowed
      )
    )
  modalities = (IMAGE, TEXT) if direction == "i2t" else (TEXT, IMAGE)
  official = _PICTURES[name], _CAPTIONS * _PICTURES[name]
  official = official if direction == "i2t" else official[::-1]
  size = sizes(len(queries), len(pool), official)
  return Task(direction, modalities, queries, tuple(scorings), size)


def _thousands(count: int) -> str:
  return f"{count // 1000}K" if count % 1000 == 0 else f"all {count:,}"
