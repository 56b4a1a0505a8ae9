"""Evaluates a model in nine directions: python -m gcl_jax.evaluate --checkpoint=...

The checkpoint is a run's folder, a Hugging Face folder or a hub id; the data is any
source of pairs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from absl import flags

from gcl_jax import command_line
from gcl_jax.errors import UserError
from gcl_jax.open_model import open_model
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


def main() -> None:
  """Flags in, one evaluation, a table and a JSON file."""
  output = as_path(_FLAGS.output) if _FLAGS.output else None
  check_output(output)
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
  rows = {Path(_FLAGS.checkpoint).name: result}
  print(render(rows, center=_FLAGS.center, notes=model.notes))
  if output:
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
      ours = "checkpoint" in json.loads(output.read_text())
    except (OSError, ValueError):
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
