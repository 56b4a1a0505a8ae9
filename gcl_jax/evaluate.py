"""Evaluates a model: python -m gcl_jax.evaluate --checkpoint=...

In nine directions on any source of pairs (--data), or on a public benchmark in its
official files (--benchmark, --root). The checkpoint is a run's folder, a Hugging Face
folder or a hub id.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

from absl import flags

from gcl_jax import command_line
from gcl_jax.errors import UserError
from gcl_jax.fusion import ENCODER, FusionSettings
from gcl_jax.open_model import Opened, open_model
from gcl_jax.paths import AnyPath, as_path, write_whole

_FLAGS = flags.FLAGS
POINTS = 100  # items of each bank that the report's plot of the banks shows


def _define_flags() -> None:
  flags.DEFINE_string(
    "checkpoint", "", "a run's folder, a Hugging Face folder, a hub id"
  )
  flags.DEFINE_string("step", "latest", "of a run's folder: latest, best, or a number")
  flags.DEFINE_string(
    "data", "", "the pairs, of any source with files; by default the run's own"
  )
  flags.DEFINE_multi_string(
    "data_option", [], "a field of config.data, as in caption_column=blip_caption"
  )
  flags.DEFINE_string(
    "split", "eval", "test, dev, ...; eval: test, else dev, else hashed"
  )
  flags.DEFINE_string("output", "", "the JSON file to write")
  flags.DEFINE_bool("center", False, "also after subtracting each modality's mean")
  flags.DEFINE_integer("items", 0, "at most so many items; 0: all")
  flags.DEFINE_integer(
    "examples", 0, "so many queries with what they found, for gcl_jax.report", 0
  )
  flags.DEFINE_integer("batch_size", 64, "documents embedded at a time")
  _define_benchmark_flags()


def _define_benchmark_flags() -> None:
  flags.DEFINE_string(
    "benchmark",
    "",
    "mbeir, mmeb, covr, cirr, fashioniq, coco, flickr30k, flickr8k_expert, composed",
  )
  flags.DEFINE_string("root", "", "the benchmark's folder, laid out as published")
  flags.DEFINE_string("images", "", "where its pictures or videos are, if not there")
  flags.DEFINE_list("tasks", [], "some of the benchmark's tasks, as cirr_task7")
  flags.DEFINE_string("pool", "", "of mbeir: local (the default), union, both")
  flags.DEFINE_string(
    "instructions", "", "of mbeir: first, random, none; of mmeb: stored, none"
  )
  flags.DEFINE_integer("prompt_seed", 2023, "of --instructions=random")
  flags.DEFINE_string("mode", "", "of mmeb: multimodal, unimodal")
  flags.DEFINE_string("targets", "", "of covr: mean of the frames, query, middle")
  flags.DEFINE_string(
    "fusion",
    "",
    "raw, unit, checkpoint; by default the benchmark's official one, and checkpoint of a "
    "model that fuses by itself (VISTA)",
  )
  flags.DEFINE_string("stored", "", "float16, float32: what embeddings are kept in")
  flags.DEFINE_string(
    "export_run", "", "a new folder for embeddings, qrels and TREC runs"
  )


_OF_PAIRS = ("data", "data_option", "split", "center", "items", "examples")
_OF_BENCHMARKS = ("root", "images", "tasks", "pool", "instructions", "prompt_seed")
_OF_BENCHMARKS += ("mode", "targets", "fusion", "stored", "export_run")


def main() -> None:
  """Flags in, one evaluation, a table and a JSON file."""
  _check_flags()
  output = as_path(_FLAGS.output) if _FLAGS.output else None
  check_output(output)
  if _FLAGS.benchmark:
    _evaluate_benchmark(output)
  else:
    _evaluate_pairs(output)


def _check_flags() -> None:
  """Refuses what would be ignored: numbers of other data than was meant.

  Raises:
    UserError: a flag of the other kind of evaluation, or a batch of nothing.
  """
  if _FLAGS.batch_size < 1:
    raise UserError(f"--batch_size={_FLAGS.batch_size}: at least one document.")
  benchmark = _FLAGS.benchmark
  unused = _OF_PAIRS if benchmark else _OF_BENCHMARKS
  for name in unused:
    if _FLAGS[name].present:
      raise UserError(
        f"--{name} does nothing with --benchmark={benchmark}: leave it out."
        if benchmark
        else f"--{name} does nothing without --benchmark: name one (mbeir, cirr, ...), or "
        "leave it out to evaluate on pairs."
      )


def _evaluate_pairs(output: AnyPath | None) -> None:
  model = open_model(_FLAGS.checkpoint, _FLAGS.step, batch_size=_FLAGS.batch_size)
  if not (model.is_run or _FLAGS.data):
    raise UserError(
      "name the pairs to evaluate on: --data=<folder with captions.jsonl>"
    )

  from gcl_jax.data import change_data, open_source
  from gcl_jax.evaluation import build_items, evaluate_nine, render

  change_data(model.data, _FLAGS.data, _FLAGS.data_option)
  items = build_items(
    open_source(model.data, split=_FLAGS.split), limit=_FLAGS.items or None
  )
  result = evaluate_nine(
    items,
    model.embedder.embed,
    progress=_progress,
    points=POINTS,
    examples=_FLAGS.examples,
  )
  result["checkpoint"] = _FLAGS.checkpoint
  result["split"] = _FLAGS.split
  notes = [*model.notes, *cut_notes(model)]
  rows = {Path(_FLAGS.checkpoint).name: result}
  print(render(rows, center=_FLAGS.center, notes=notes))
  _write(output, result)


def _evaluate_benchmark(output: AnyPath | None) -> None:
  from gcl_jax.evaluation.benchmarks import (
    Options,
    evaluate_benchmark,
    open_benchmark,
    table_of,
  )
  from gcl_jax.retrieval.identity import identity

  options = Options(
    tasks=tuple(_FLAGS.tasks),
    **{
      name: _FLAGS[name].value
      for name in ("images", "pool", "instructions", "prompt_seed", "mode", "targets")
    },
  )
  benchmark = open_benchmark(_FLAGS.benchmark, _FLAGS.root, options)
  model = open_model(_FLAGS.checkpoint, _FLAGS.step, batch_size=_FLAGS.batch_size)
  result = evaluate_benchmark(
    benchmark,
    model.embedder,
    fusion=_FLAGS.fusion,
    stored=_FLAGS.stored,
    export_run=_FLAGS.export_run,
    progress=_progress,
  )
  result["checkpoint"] = _FLAGS.checkpoint
  result["step"] = model.step
  result["model"] = identity(model.embedder)
  result["config_sha256"] = _digest(model.embedder.config)
  result["notes"] = [*model.notes, *cut_notes(model), *fusion_notes(result)]
  print(table_of(result))
  _write(output, result)


def cut_notes(model: Opened) -> list[str]:
  """Says how often a text that was embedded was too long for the model."""
  cut = model.embedder.processor.tokenizer.texts_cut
  note = (
    f"{cut:,} times a text was longer than the model takes and was cut (alone and beside an "
    "image counts twice)."
  )
  return [note] * bool(cut)


def fusion_notes(result: dict) -> list[str]:
  """Says where documents were fused otherwise than the model was trained to."""
  used, own = result["protocol"]["fusion"], result["model"]["fusion"]
  if used == "checkpoint":
    return []
  if own["of"] == ENCODER:
    return [
      f"documents were fused by adding vectors of image and text ({used}); this model's "
      "own encoder fuses, and was not asked to: leave --fusion out"
    ]
  if used == own["of"] and own == FusionSettings(of=used).to_dict():
    return []
  return [
    f"documents were fused by score fusion ({used}, weights 1 and 1); this model's own is "
    f"{own['of']}, weights {own['image_weight']:g} and {own['text_weight']:g}: "
    "--fusion=checkpoint"
  ]


def _digest(config) -> str:
  """SHA-256 of a run's config, or of a Hugging Face model's."""
  if dataclasses.is_dataclass(config):
    config = dataclasses.asdict(config)
  fields = config.to_dict() if hasattr(config, "to_dict") else config
  text = json.dumps(fields, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()


def _write(output: AnyPath | None, result: dict) -> None:
  if output is None:
    return
  try:
    write_whole(output, json.dumps(result, indent=1) + "\n")
  except OSError as error:
    raise UserError(f"--output={output} cannot be written: {error}.") from error
  print(f"written: {output}")


def check_output(output: AnyPath | None) -> None:
  """Refuses an output that could not be written, or that is something else.

  Raises:
    UserError: a folder, a file that is not an evaluation, or no folder to hold it.
  """
  if output is None:
    return
  if output.is_dir():
    raise UserError(f"--output={output} is a folder: name a .json file.")
  if output.exists():
    try:
      found = json.loads(output.read_text())
      ours = isinstance(found, dict) and "checkpoint" in found
    except (OSError, ValueError, RecursionError):
      ours = False
    if not ours:
      raise UserError(
        f"--output={output} exists and is no evaluation of ours: name another file."
      )
  try:
    output.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--output={output} cannot be written: {error}.") from None


def _progress(done: int, total: int) -> None:
  if sys.stderr.isatty():
    end = "\n" if done == total else ""
    print(f"\r\x1b[Kembedded {done}/{total}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
  _define_flags()
  command_line.run(main)
