"""Flickr8k-Expert: three experts said how well captions describe photographs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks.documents import documents, places
from gcl_jax.evaluation.benchmarks.files import Files, distinct
from gcl_jax.evaluation.benchmarks.pictures import find_pictures
from gcl_jax.evaluation.benchmarks.task import (
  Agreement,
  Benchmark,
  Options,
  chosen,
)

LAYOUT = """\
  captions.jsonl      {"image": path, "captions": [...]} a line
  expert_scores.tsv   image, caption_of, caption_index, score_1, score_2, score_3; file
                      names without folders
  the photographs     as captions.jsonl says (or --images=<folder>)"""
_JUDGES = ("score_1", "score_2", "score_3")


def open_flickr8k_expert(root: str, options: Options) -> Benchmark:
  """The judged pairs.

  Raises:
    UserError: a file is missing, a line is not as it should be or names a photograph
      that the table lacks, none of the pictures is there.
  """
  files = Files(root, "Flickr8k with experts' scores", LAYOUT)
  chosen(options.tasks, ["expert"])
  paths, captions = {}, {}
  for entry in files.objects("captions.jsonl", {"image": str, "captions": list}):
    name = Path(entry["image"]).name
    paths[name] = entry["image"]
    captions[name] = files.strings(entry, "captions", "captions.jsonl")
  images, texts, scores = [], [], []
  for number, row in enumerate(files.rows("expert_scores.tsv", "\t"), start=2):
    try:
      images.append(paths[row["image"]])
      texts.append((row["caption_of"], int(row["caption_index"])))
      captions[texts[-1][0]][texts[-1][1]]
      scores.append([float(row[name]) for name in _JUDGES])
    except (KeyError, IndexError, TypeError, ValueError) as error:
      raise UserError(
        f"{files.root / 'expert_scores.tsv'}, line {number}: {error!r}; a folder of "
        f"these judgements holds\n{LAYOUT}"
      ) from None
  photographs = documents("the photographs", distinct(images), images=distinct(images))
  keys = [f"{name}#{index}" for name, index in texts]
  said = documents(
    "the captions",
    distinct(keys),
    texts=[captions[name][index] for name, index in dict.fromkeys(texts)],
  )
  own = [
    Path(image).name == name for image, (name, _) in zip(images, texts, strict=True)
  ]
  task = Agreement(
    "expert",
    photographs,
    said,
    np.stack([places(photographs.ids, images), places(said.ids, keys)], axis=1),
    np.array(scores),
    np.array(own, bool),
  )
  folder = Path(options.images).expanduser() if options.images else files.root
  return Benchmark(
    name="flickr8k_expert",
    tasks=[task],
    pictures=find_pictures([folder], distinct(images)),
    fusion="checkpoint",
    stored="float32",
    protocol={"score": "cosine similarity", "correlation": "Kendall's tau-c"},
    data_hash=files.digest(),
    summarise=_no_means,
  )


def _no_means(tasks: Mapping[str, Any]) -> dict[str, Any]:
  del tasks
  return {}
