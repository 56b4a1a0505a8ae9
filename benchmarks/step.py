"""Training pairs a second, beside the same step in PyTorch.

    python -m benchmarks.step --quick --output=step.json

Both sides take whole optimizer steps (both towers forward and backward, the loss,
clipping, AdamW) on the same weights and the same batches, which lie on the device
already: ours as a run does, the other with `transformers.CLIPModel` and the plain form
of the loss (`step_sides.py`). That both compute the same is checked first. They are timed
in turn (A B A B ...) in one process with as many threads, since machines are noisy;
medians are shown, and `ratio` is the median over the turns of the time of `ratio_to`
divided by the side's own in that turn. Texts are padded to 77 tokens, as PyTorch's users
have them, or cut to the shortest bucket that holds the batch's longest, as a run of ours
has them. Weights are random.

`--startup` measures instead how long a run takes to its first step, with the compilation
cache empty and then filled (`step_startup.py`).
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import statistics
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks.input import cores
from gcl_jax import command_line
from gcl_jax.errors import UserError

_FLAGS = flags.FLAGS
_MODELS = ("TinyCLIP-ViT-8M-16-Text-3M", "ViT-B/32")
_KEYS = ("pixels", "tokens", "has_image", "has_text", "pair_ids")
_LOOKED_AT = 8  # batches, for the most usual length of the longest text
_TRIED = 64  # at most, to find them
# What two orders of summation may do: to the loss, and to a first step of Adam, in which
# a gradient near zero counts almost as much as any other.
_APART = {"float32": (1e-4, 0.05), "bfloat16": (0.05, 1.0)}


def _define_flags() -> None:
  flags.DEFINE_bool(
    "quick", False, "the first model, smaller batches, under two minutes"
  )
  flags.DEFINE_list("models", list(_MODELS), "named shapes, or files of weights")
  flags.DEFINE_string(
    "data",
    os.environ.get("GCL_JAX_DATA", "../shared/data"),
    "holds flickr8k and clip_tokenizer; where it does not, pairs are made up",
  )
  flags.DEFINE_string("tokenizer", "", "a text encoder's folder, for models VISTA-...")
  flags.DEFINE_integer("batch_size", 64, "pairs")
  flags.DEFINE_integer("repeats", 7, "turns")
  flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the towers")
  flags.DEFINE_bool("startup", False, "measure the time to the first step instead")
  flags.DEFINE_string("output", "", "the JSON file of rows")


def main() -> None:
  """Measures, prints the table and writes the rows."""
  models, batch_size, repeats = _FLAGS.models, _FLAGS.batch_size, _FLAGS.repeats
  if _FLAGS.quick:
    models, batch_size, repeats = models[:1], min(batch_size, 16), min(repeats, 3)
  rows: list[dict[str, Any]] = []
  for name in models:
    config = recipe(name, Path(_FLAGS.data), batch_size, _FLAGS.dtype, _FLAGS.tokenizer)
    if _FLAGS.startup:
      from benchmarks import step_startup

      rows += step_startup.measure(config)
      text = step_startup.table(rows)
    else:
      rows += measure(config, repeats=repeats)
      text = table(rows)
    print(text, flush=True)
    if _FLAGS.output:
      Path(_FLAGS.output).write_text(json.dumps(rows, indent=1) + "\n")


def recipe(
  name: str, data: Path, batch_size: int, dtype: str = "float32", tokenizer: str = ""
) -> ConfigDict:
  """A run's config: a named shape from random weights, or a file of weights; on Flickr8k
  where it is there.

  `VISTA-small` is the form of VISTA at the sizes of `step_vista.SMALL`.

  Raises:
    UserError: a VISTA without a tokenizer.
  """
  from gcl_jax.training.config import default_config

  config = default_config()
  config.model.dtype = dtype
  if Path(name).exists():
    config.init.pretrained = name
  else:
    config.model.name = name
  if name.startswith("VISTA"):
    if not tokenizer:
      raise UserError("--tokenizer: a VISTA's texts need a text encoder's folder.")
    config.temperature.mode = "fixed"
  if name == "VISTA-small":
    from benchmarks.step_vista import SMALL

    config.name, config.model.name, config.model.hf = name, "", SMALL
  config.batch_size = batch_size
  if (data / "flickr8k").is_dir() and (data / "clip_tokenizer").is_dir():
    config.data.path = str(data / "flickr8k")
    config.tokenizer.path = tokenizer or str(data / "clip_tokenizer")
  else:
    config.data.source = "scenes"
  return config


def measure(config: ConfigDict, *, repeats: int) -> list[dict[str, Any]]:
  """The JSON rows of one model.

  Raises:
    UserError: PyTorch is not installed, or the data does not fill a batch.
  """
  if find_spec("torch") is None:
    raise UserError("the other side of this benchmark needs PyTorch: pip install torch")
  import jax
  import torch

  from benchmarks.step_sides import Ours, PyTorch, agreement
  from gcl_jax.data import open_source
  from gcl_jax.training.start import make_start

  threads = cores()
  torch.set_num_threads(threads)
  source = open_source(config.data, split=config.data.train_split)
  start = make_start(config, source, None, False)
  # A CLIP's users pad to its context, a BERT's to the longest of a batch.
  longest = min(start.model.config.text.context, max(config.data.text_buckets))
  cut = usual_batch(config, source, start.processor)
  padding = ((0, 0), (0, longest - cut["tokens"].shape[1]))
  pad_id = start.processor.tokenizer.pad_id
  padded = cut | {"tokens": np.pad(cut["tokens"], padding, constant_values=pad_id)}
  parts = (config, start.model, start.processor.image, start.params())
  sides = {"pytorch": PyTorch(*parts), "gcl_jax": Ours(*parts)}
  found = agreement(sides["gcl_jax"], sides["pytorch"], padded)
  if any(a > most for a, most in zip(found, _APART[config.model.dtype], strict=True)):
    raise AssertionError(f"the two sides do not compute the same: {found}")

  runs = {}
  for batch in (padded, cut):
    for side in sides:
      runs[side, batch["tokens"].shape[1]] = sides[side].place(batch)
  seconds: dict[tuple[str, int], list[float]] = {run: [] for run in runs}
  for repeat in range(repeats + 1):
    for (side, length), placed in runs.items():
      began = time.perf_counter()
      sides[side].step(placed)
      if repeat:  # the first of each compiles and warms up
        seconds[side, length].append(time.perf_counter() - began)
  shared = {
    "model": config.model.name or Path(config.init.pretrained).name or config.name,
    "batch": config.batch_size,
    "dtype": config.model.dtype,
    "data": (config.data.path and Path(config.data.path).name) or "made up",
    "device": jax.devices()[0].device_kind,
    "threads": threads,
    "turns": repeats,
    "load": os.getloadavg()[0],
    "loss_apart": found.loss,
    "movement_apart": found.movement,
  }

  def ratio(run: tuple[str, int], to: tuple[str, int]) -> float:
    turns = zip(seconds[to], seconds[run], strict=True)
    return statistics.median(other / own for other, own in turns)

  baseline = ("pytorch", longest)
  return [
    {
      **shared,
      "side": side,
      "text_length": length,
      "pairs_per_s": config.batch_size / statistics.median(seconds[side, length]),
      "ratio": ratio((side, length), baseline),
      "ratio_to": " ".join(map(str, baseline)),
      "ratio_same_length": ratio((side, length), ("pytorch", length)),
    }
    for side, length in seconds
  ]


def usual_batch(config: ConfigDict, source: Any, processor: Any) -> dict[str, Any]:
  """A batch of the run's pipeline whose texts are cut to the most usual bucket.

  No two of its pairs share a picture or a caption: the plain form of the loss does not
  know of such pairs.
  """
  from gcl_jax.data import Pipeline

  pipeline = Pipeline(
    source,
    processor,
    batch_size=config.batch_size,
    seed=config.seed,
    buckets=tuple(config.data.text_buckets),
  )
  some = itertools.islice(pipeline, _TRIED)
  batches = list(itertools.islice(filter(_distinct, some), _LOOKED_AT))
  pipeline.close()
  if not batches:
    raise UserError(
      f"--batch_size={config.batch_size}: no batch of so many pairs without two that "
      "share a picture or a caption. A smaller one would do, or more --data."
    )
  lengths = collections.Counter(batch["tokens"].shape[1] for batch in batches)
  (length, _), *_ = lengths.most_common(1)
  found = next(batch for batch in batches if batch["tokens"].shape[1] == length)
  return {name: found[name] for name in _KEYS}


def _distinct(batch: dict[str, Any]) -> bool:
  """Whether no id is there twice."""
  ids = batch["pair_ids"]
  return all(len(np.unique(column)) == len(ids) for column in ids.T)


def table(rows: Sequence[dict[str, Any]]) -> str:
  """The rows in Markdown."""
  lines = [
    "| model | side | batch | tokens | pairs/s | times as fast as | at the same length |",
    "|---|---|---:|---:|---:|---|---:|",
  ]
  for row in rows:
    lines.append(
      f"| {row['model']} | {row['side']} | {row['batch']} | {row['text_length']} | "
      f"{row['pairs_per_s']:.1f} | {row['ratio']:.2f} x {row['ratio_to']} | "
      f"{row['ratio_same_length']:.2f} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  _define_flags()
  command_line.run(main)
