"""The twelve retrieval tasks of MMEB (VLM2Vec, arXiv 2410.05160), version 1.

Every query has its own list of candidates, of which the first is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks.documents import documents, judgements
from gcl_jax.evaluation.benchmarks.files import Files
from gcl_jax.evaluation.benchmarks.pictures import find_pictures
from gcl_jax.evaluation.benchmarks.result import mean_of, recall_of
from gcl_jax.evaluation.benchmarks.task import (
  BOTH,
  IMAGE,
  TEXT,
  Benchmark,
  Options,
  Scoring,
  Task,
  chosen,
  sizes,
)

LAYOUT = """\
  <task>/test-00000-of-00001.parquet   with qry_text, qry_img_path, tgt_text, tgt_img_path
  images/...                           images.zip, unpacked
from https://huggingface.co/datasets/TIGER-Lab/MMEB-eval"""


class Kind(NamedTuple):
  """A task's direction, and the instruction that its query texts begin with."""

  direction: tuple[str, str]
  instruction: str


KINDS = {
  "VisDial": Kind(
    (TEXT, IMAGE),
    "Represent the given dialogue about an image, which is used for image retrieval:",
  ),
  "CIRR": Kind(
    (BOTH, IMAGE),
    "Given an image, find a similar everyday image with the described changes:",
  ),
  "VisualNews_t2i": Kind((TEXT, IMAGE), "Retrieve an image of this news caption."),
  "VisualNews_i2t": Kind(
    (IMAGE, TEXT), "Find a caption for the news in the given photo."
  ),
  "MSCOCO_t2i": Kind(
    (TEXT, IMAGE), "Find me an everyday image that matches the given caption:"
  ),
  "MSCOCO_i2t": Kind(
    (IMAGE, TEXT), "Find an image caption describing the given everyday image."
  ),
  "NIGHTS": Kind(
    (IMAGE, IMAGE), "Find a day-to-day image that looks similar to the provided image."
  ),
  "WebQA": Kind((TEXT, BOTH), "Find a Wikipedia image that answers this question:"),
  "FashionIQ": Kind(
    (BOTH, IMAGE), "Find an image to match the fashion image and style note:"
  ),
  "Wiki-SS-NQ": Kind(
    (TEXT, IMAGE), "Find the document screenshot that can answer the given query:"
  ),
  "OVEN": Kind(
    (BOTH, BOTH),
    "Retrieve a Wikipedia image-description pair that provides evidence for the question"
    " of this image:",
  ),
  "EDIS": Kind((TEXT, BOTH), "Find a news image that matches the provided caption:"),
}
_IMAGE_MARK = re.compile(r"<\|image_\d+\|>\s*")
_QUERIES = 1_000  # of each official task
_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
_MODES = ("multimodal", "unimodal")
_INSTRUCTIONS = ("stored", "none")


def open_mmeb(root: str, options: Options) -> Benchmark:
  """The tasks asked for, checked.

  `instructions`: "stored" takes texts as they are in the files, image marks included
  (as the published CLIP rows did); "none" takes marks and instructions away. `mode`:
  "unimodal" embeds of each side only the modality that the task is named for, so that
  the instruction text is not added to an image query.

  Raises:
    UserError: a file or a column is missing, a list without its answer or of unequal
      lengths, none of the pictures is there.
  """
  files = Files(root, "MMEB", LAYOUT)
  names = chosen(options.tasks, list(KINDS))
  mode, instructions = options.mode or "multimodal", options.instructions or "stored"
  for flag, value, known in (
    ("mode", mode, _MODES),
    ("instructions", instructions, _INSTRUCTIONS),
  ):
    if value not in known:
      raise UserError(f"--{flag}={value}: MMEB has {', '.join(known)}.")
  missing = [n for n in names if not any(map(files.has, _files(n)))]
  if missing and len(missing) < len(names):
    present = ",".join(name for name in names if name not in missing)
    raise UserError(
      f"{files.root} lacks {', '.join(missing)}; evaluate what is there by "
      f"--tasks={present}. A folder of MMEB holds\n{LAYOUT}"
    )
  tasks = [_task(files, name, mode, instructions == "none") for name in names]
  folders = [files.root / "images", files.root]
  if options.images:
    folders = [Path(options.images).expanduser()]
  some = [
    name
    for task in tasks
    for part in (task.queries, task.scorings[0].pool[0])
    for name in part.images.drop_null()[:200].to_pylist()
  ]
  return Benchmark(
    name="mmeb",
    tasks=tasks,
    pictures=find_pictures(folders, some),
    fusion="raw",
    stored="float32",
    protocol={
      "mode": mode,
      "instructions": instructions,
      "recall": "the first of a query's own candidates, hit@1 (official)",
    },
    data_hash=files.digest(),
    summarise=summarise,
  )


def summarise(tasks: Mapping[str, Any]) -> dict[str, Any]:
  """The mean hit@1 of the twelve, and with all ties lost."""
  rows = [recall_of(tasks, name, "own list", 1) for name in KINDS]
  out = {"mean of 12, hit@1": mean_of(rows), "mean of 12, hit@1, ties lost": None}
  if None not in rows:
    lost = [tasks[name]["scores"]["own list"]["ties"]["1"][0] for name in KINDS]
    out["mean of 12, hit@1, ties lost"] = mean_of(lost)
  return out


def _files(name: str) -> tuple[str, ...]:
  return f"{name}/test-00000-of-00001.parquet", f"{name}.parquet"


def _task(files: Files, name: str, mode: str, bare: bool) -> Task:
  path = files.find(*_files(name))
  try:
    table = pq.read_table(path, columns=list(_COLUMNS))
  except (OSError, pa.ArrowInvalid) as error:
    raise files.bad(path, error) from error
  if absent := [c for c in _COLUMNS if c not in table.column_names]:
    raise UserError(f"{path} lacks the column {absent[0]}: is it a file of MMEB-eval?")
  rows = table.to_pylist()
  (asks, answers), instruction = KINDS[name]
  kept = {BOTH} if mode == "multimodal" else None

  def side(text: str | None, image: str | None, modality: str):
    text, image = text or "", image or ""
    if bare:
      text = _IMAGE_MARK.sub("", text).strip().removeprefix(instruction).strip()
    if kept is None and modality == TEXT:
      image = ""
    if kept is None and modality == IMAGE:
      text = ""
    return text, image

  queries = [side(r["qry_text"], r["qry_img_path"], asks) for r in rows]
  pool: dict[tuple[str, str], int] = {}
  lists = []
  for number, row in enumerate(rows):
    pairs = [side(*pair, answers) for pair in _targets(row, f"{path}, row {number}")]
    lists.append([pool.setdefault(pair, len(pool)) for pair in pairs])
  widest = max(map(len, lists), default=0)
  padded = np.full((len(lists), widest), -1, np.int64)
  for number, found in enumerate(lists):
    padded[number, : len(found)] = found
  return Task(
    name,
    (asks, answers),
    documents(
      f"the queries of {name}",
      [f"q{k}" for k in range(len(queries))],
      texts=[text for text, _ in queries],
      images=[image for _, image in queries],
    ),
    (
      Scoring(
        "own list",
        (
          documents(
            f"the candidates of {name}",
            [f"c{k}" for k in range(len(pool))],
            texts=[text for text, _ in pool],
            images=[image for _, image in pool],
          ),
        ),
        (1,),
        judgements(range(len(lists)), padded[:, 0], len(lists)),
        lists=padded,
      ),
    ),
    sizes(len(queries), len(pool), (_QUERIES, None)),
  )


def _targets(row: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
  """The candidates of a row as (text, image); a lone string stands for no texts."""
  images, texts = row["tgt_img_path"], row["tgt_text"]
  counts = [len(x) for x in (images, texts) if isinstance(x, list)]
  if not counts or min(counts) == 0 or len(set(counts)) > 1:
    raise UserError(
      f"{where}: tgt_text and tgt_img_path must be lists of equal length, the answer "
      "first; download the file again."
    )
  return list(zip(_spread(texts, counts[0]), _spread(images, counts[0]), strict=True))


def _spread(values: Any, count: int) -> Sequence[str]:
  return values if isinstance(values, list) else [""] * count
