"""FashionIQ (arXiv 1905.12794): a garment and how the wanted one differs.

The original protocol searches each category's own validation list; the reference stays
among the candidates in some papers and not in others, so both are given. The task
`mbeir` is M-BEIR's form: all categories and splits in one pool, nothing masked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks.documents import documents, judgements, places
from gcl_jax.evaluation.benchmarks.files import Files, distinct
from gcl_jax.evaluation.benchmarks.mbeir_text import clean
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
  captions/cap.<dress|shirt|toptee>.val.json
  image_splits/split.<dress|shirt|toptee>.<train|val|test>.json  (train, test: task mbeir)
  images/<id>.jpg or .png                                 (or --images=<folder>)
from https://github.com/XiaoxiaoGuo/fashion-iq"""
CATEGORIES = ("dress", "shirt", "toptee")
SPLITS = ("train", "val", "test")
CUTOFFS = (10, 50)
_BLANKED = re.compile(r"[.!\"()*#:;~]")
_WORDS = 30
_SIZES = {  # queries, garments
  "dress": (2_017, 3_817),
  "shirt": (2_038, 6_346),
  "toptee": (1_961, 5_373),
  "mbeir": (6_003, 74_381),
}


def open_fashioniq(root: str, options: Options) -> Benchmark:
  """The categories asked for, by default all three; and `mbeir` where asked for.

  Raises:
    UserError: a file is missing, an entry names a garment that its split lacks, none of
      the pictures is there.
  """
  files = Files(root, "FashionIQ", LAYOUT)
  names = chosen(options.tasks, [*CATEGORIES, "mbeir"], CATEGORIES)
  tasks = [_mbeir(files) if n == "mbeir" else _category(files, n) for n in names]
  folders = [files.root / "images", files.root]
  if options.images:
    folders = [Path(options.images).expanduser()]
  some = [i for task in tasks for i in task.queries.images.to_pylist()]
  return Benchmark(
    name="fashioniq",
    tasks=tasks,
    pictures=find_pictures(folders, some, any_suffix=True),
    fusion="checkpoint",
    stored="float32",
    protocol={
      "gallery": "the category's validation list; of mbeir all nine lists",
      "masked": "given both ways",
      "text": "both captions joined by 'and', cleaned; of mbeir as M-BEIR does",
    },
    data_hash=files.digest(),
    summarise=summarise,
  )


def summarise(tasks: Mapping[str, Any]) -> dict[str, Any]:
  """Plain means over the three categories, where all three are there and whole."""
  out = {}
  for scoring in ("unmasked", "masked"):
    for k in CUTOFFS:
      rows = [recall_of(tasks, name, scoring, k) for name in CATEGORIES]
      out[f"mean of 3 categories, {scoring}, R@{k}"] = mean_of(rows)
  return out


def joined(captions: list[str]) -> str:
  """The captions of a query as one text: in lower case, without . ! " ( ) * # : ; ~,
  blanks collapsed, at most 30 words (CoVR's form)."""
  return clean_caption(" and ".join(captions))


def clean_caption(text: str) -> str:
  """CoVR's clean-up of captions."""
  return " ".join(_BLANKED.sub(" ", text.lower()).split()[:_WORDS])


def mbeir_text(captions: list[str]) -> str:
  """M-BEIR's: each with a small first letter and without one final full stop, joined,
  cleaned."""
  return clean(" and ".join(_begun_small(caption) for caption in captions))


def _begun_small(text: str) -> str:
  return text[:1].lower() + text[1:].removesuffix(".")


def read_list(files: Files, category: str, split: str) -> list[str]:
  """The garments of one split list, in its order."""
  name = f"image_splits/split.{category}.{split}.json"
  names = files.json(name)
  if not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
    raise UserError(f"{files.root / name} is no list of names: is it FashionIQ's?")
  return names


def read_captions(files: Files, category: str) -> list[dict[str, Any]]:
  """The validation queries of a category."""
  name = f"captions/cap.{category}.val.json"
  entries = files.entries(name)
  for entry in entries:
    for field in ("candidate", "target"):
      files.field(entry, field, name, str)
    files.strings(entry, "captions", name)
  return entries


def merged_queries(files: Files) -> dict[tuple[str, str], list[str]]:
  """M-BEIR's queries: (text, reference) -> targets, over all categories."""
  queries: dict[tuple[str, str], list[str]] = {}
  for category in CATEGORIES:
    for entry in read_captions(files, category):
      key = mbeir_text(entry["captions"]), entry["candidate"]
      queries.setdefault(key, []).append(entry["target"])
  return queries


def all_garments(files: Files) -> list[str]:
  """M-BEIR's pool: the nine lists, each garment once."""
  return distinct(
    name for c in CATEGORIES for split in SPLITS for name in read_list(files, c, split)
  )


def _category(files: Files, category: str) -> Task:
  entries, names = read_captions(files, category), read_list(files, category, "val")
  return _task(
    category,
    names,
    [joined(entry["captions"]) for entry in entries],
    [entry["candidate"] for entry in entries],
    [[entry["target"]] for entry in entries],
    CUTOFFS,
  )


def _mbeir(files: Files) -> Task:
  queries = merged_queries(files)
  return _task(
    "mbeir",
    all_garments(files),
    [text for text, _ in queries],
    [reference for _, reference in queries],
    list(queries.values()),
    (10, 20, 50),
  )


def _task(
  name: str,
  garments: list[str],
  texts: list[str],
  references: list[str],
  targets: list[list[str]],
  cutoffs: tuple[int, ...],
) -> Task:
  gallery = documents(f"the gallery of {name}", garments, images=garments)
  flat = [(q, target) for q, found in enumerate(targets) for target in found]
  rows = places(gallery.ids, [target for _, target in flat])
  if (rows < 0).any():
    raise UserError(
      f"the target {flat[int(np.argmin(rows))][1]} of {name} is in none of its split "
      "lists: take captions and lists from one release."
    )
  relevant = judgements([q for q, _ in flat], rows, len(targets))
  queries = documents(
    f"the queries of {name}",
    [f"{name}-{k}" for k in range(len(texts))],
    images=references,
    texts=texts,
  )
  own = places(gallery.ids, references)[:, None]
  return Task(
    name,
    (BOTH, IMAGE),
    queries,
    (
      Scoring("unmasked", (gallery,), cutoffs, relevant),
      Scoring("masked", (gallery,), cutoffs, relevant, excluded=own),
    ),
    sizes(len(queries), len(gallery), _SIZES[name]),
  )
