"""WebVid-CoVR (arXiv 2308.14746): a video and a change to it that lead to another video.

The query's video is its middle frame; a target is up to fifteen frames, each embedded by
itself. The gallery is the test's own targets.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks.documents import (
  Documents,
  Parts,
  documents,
  judgements,
  places,
)
from gcl_jax.evaluation.benchmarks.fashioniq import clean_caption
from gcl_jax.evaluation.benchmarks.files import Files
from gcl_jax.evaluation.benchmarks.result import mean_of, recall_of
from gcl_jax.evaluation.benchmarks.task import (
  BOTH,
  IMAGE,
  Benchmark,
  Options,
  Scoring,
  Task,
  chosen,
)
from gcl_jax.evaluation.benchmarks.video import VideoPictures, middle, spread

LAYOUT = """\
  webvid8m-covr_test.csv   with pth1, pth2, edit, scores
  videos/<folder>/<id>.mp4, or extracted frames videos/<folder>/<id>/*.jpg, in the order
                           of their names (or --images=<folder that holds <folder>/>)
the table from https://huggingface.co/datasets/lucas-ventura/WebVid-CoVR"""
CUTOFFS = (1, 5, 10, 50)
FRAMES = 15
TARGETS = ("mean", "query", "middle")
_TABLE = "webvid8m-covr_test.csv"
_TEMPERATURE = 0.1


def open_covr(root: str, options: Options) -> Benchmark:
  """The test, rows in the order of their targets.

  `targets`: "mean" is the plain mean of the frames' unit vectors (the GCL paper), "query"
  weights them by the softmax of the table's scores over 0.1 (CoVR's default), "middle"
  takes the middle frame.

  Raises:
    UserError: the table or a column is missing, a target is there twice, none of the
      videos is there, or they cannot be decoded.
  """
  files = Files(root, "WebVid-CoVR", LAYOUT)
  chosen(options.tasks, ["test"])
  targets = options.targets or "mean"
  if targets not in TARGETS:
    raise UserError(f"--targets={targets}: there are {', '.join(TARGETS)}.")
  rows = files.rows(_TABLE)
  for row in rows:
    for field in ("pth1", "pth2", "edit", "scores"):
      files.field(row, field, _TABLE)
  rows.sort(key=lambda row: row["pth2"])
  folder = (
    Path(options.images).expanduser() if options.images else files.root / "videos"
  )
  pictures = VideoPictures(folder)
  gallery = _gallery(rows, pictures, targets)
  if not any(pictures.count(row["pth2"]) for row in rows):
    raise UserError(
      f"none of the videos is there: {rows[0]['pth2'] if rows else 'any'}.mp4 and others "
      f"were looked for in {folder}. A folder of WebVid-CoVR holds\n{LAYOUT}"
    )
  queries = documents(
    "the queries",
    [f"q{k}" for k in range(len(rows))],
    images=[f"{r['pth1']}#{middle(pictures.count(r['pth1']))}" for r in rows],
    texts=[clean_caption(row["edit"]) for row in rows],
  )
  scoring = Scoring(
    "test",
    (gallery,),
    CUTOFFS,
    judgements(range(len(rows)), range(len(rows)), len(rows)),
    excluded=places(gallery.ids, [row["pth1"] for row in rows])[:, None],
  )
  return Benchmark(
    name="covr",
    tasks=[Task("test", (BOTH, IMAGE), queries, (scoring,))],
    pictures=pictures,
    fusion="unit",
    stored="float32",
    protocol={
      "query_frame": "middle",
      "target_frames": 1 if targets == "middle" else FRAMES,
      "targets": targets,
      "masked": "the query's own video (official)",
    },
    data_hash=files.digest(),
    summarise=summarise,
  )


def summarise(tasks: Mapping[str, Any]) -> dict[str, Any]:
  """CoVR's meanR3 and meanR4."""
  rows = [recall_of(tasks, "test", "test", k) for k in CUTOFFS]
  return {"meanR3 (1, 5, 10)": mean_of(rows[:3]), "meanR4 (and 50)": mean_of(rows)}


def _gallery(
  rows: list[dict[str, str]], pictures: VideoPictures, targets: str
) -> Documents:
  """One document a row, of its target's frames."""
  frames, weights, offsets = [], [], [0]
  for row in rows:
    video, total = row["pth2"], pictures.count(row["pth2"])
    chosen_frames = [middle(total)] if targets == "middle" else spread(total, FRAMES)
    chosen_frames = chosen_frames or [0]  # a missing video: its frame is not there
    frames += [f"{video}#{frame}" for frame in chosen_frames]
    weights += _weights(row["scores"], len(chosen_frames), targets)
    offsets.append(len(frames))
  return documents(
    "the targets",
    [row["pth2"] for row in rows],
    images=frames,
    parts=Parts(np.array(offsets, np.int64), np.array(weights, np.float32)),
  )


def _weights(scores: str, frames: int, targets: str) -> list[float]:
  """Of the frames of one target; uniform where the scores do not fit."""
  uniform = [1 / frames] * frames
  if targets != "query":
    return uniform
  try:
    values = np.array(ast.literal_eval(scores), np.float64)
  except (ValueError, SyntaxError):
    return uniform
  if values.shape != (frames,) or not np.isfinite(values).all():
    return uniform
  raised = np.exp((values - values.max()) / _TEMPERATURE)
  return list(raised / raised.sum())
