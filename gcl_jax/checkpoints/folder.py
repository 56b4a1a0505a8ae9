"""What a run's folder holds beside the checkpoints, written and read.

run.json                 the marker, the config, the model's shape, the data's size
processor/               image processor and tokenizer files, as Hugging Face's
checkpoints/<step>/      Orbax
results/<step>.json      what the evaluation found at that step
metrics.jsonl, tensorboard/

The folder lies on this machine or in a bucket (`gs://`). Files are written whole or not
at all: here they are renamed, and a store shows them when it has all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings
from gcl_jax.models import Config, config_from_dict
from gcl_jax.paths import (
  AnyPath,
  RemotePath,
  as_path,
  local_copy,
  local_draft,
  write_whole,
)
from gcl_jax.processing import Processor

RUN_FILE = "run.json"
_MARKER = "gcl_jax_run"
_LAYOUT = 1


@dataclasses.dataclass(frozen=True)
class RunDescription:
  """All of a run that is decided before its first step."""

  config: ConfigDict
  model: Config
  fusion: FusionSettings
  processor: Processor
  steps: int  # length of the run
  records: int  # in the training source: a resume on other data is refused


# What a store may be for a run, unlike for data, is what Orbax writes to.
_STORE = "gs://"
Folder = str | os.PathLike | RemotePath


def run_folder(workdir: Folder) -> AnyPath:
  """The path of a run's folder, from what a user wrote.

  Raises:
    UserError: an address other than `gs://`, or gcsfs is not installed.
  """
  text = str(workdir)
  if re.match(r"\w+:/", text) and not re.match(f"{_STORE}[^/]", text):
    slash = "; give it as a string, a Path loses a slash" if text[:4] == "gs:/" else ""
    raise UserError(
      f"{text}: runs live in local or mounted folders and in buckets "
      f"({_STORE}bucket/runs/a{slash})."
    )
  return as_path(text)


def is_run(folder: Folder) -> bool:
  """Whether a folder is a run's."""
  return (run_folder(folder) / RUN_FILE).is_file()


@contextlib.contextmanager
def keeping(what: Any) -> Iterator[None]:
  """Turns a refusal of the disk or the store, while this is written, into a message.

  Raises:
    UserError: no room, no permission, no network.
  """
  try:
    yield
  except OSError as error:
    raise UserError(
      f"{what} cannot be written ({error.strerror or error}): make room there, or mend "
      "what refuses; checkpoints are whole, and the same command goes on from the last."
    ) from error


def write_json(path: AnyPath, value: Any) -> None:
  """Writes a JSON file whole or not at all; of several processes the first writes.

  Raises:
    UserError: it cannot be written.
  """
  if jax.process_index():
    return
  with keeping(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_description(folder: Folder, run: RunDescription) -> None:
  """Starts a run's folder, or describes it anew (a longer run).

  Raises:
    UserError: the folder exists, is not empty and is not a run's; or it cannot be
      written.
  """
  folder = run_folder(folder)
  if jax.process_index() == 0:
    check_free(folder)  # the others would look while it is being written
    with keeping(folder / "processor"), local_draft(folder / "processor") as here:
      run.processor.save(here)
  description = {
    _MARKER: _LAYOUT,
    "config": json.loads(run.config.to_json_best_effort()),
    "model": run.model.to_hf(),
    "fusion": run.fusion.to_dict(),
    "steps": run.steps,
    "records": run.records,
  }
  write_json(folder / RUN_FILE, description)  # last: it makes the folder a run's


def check_free(folder: Folder) -> None:
  """Refuses a folder that holds something other than a run, or cannot be written.

  Raises:
    UserError: it is, or lies below, a file; it holds other things; no permission; a
      store that cannot be reached, or is not `gs://`.
  """
  folder = run_folder(folder)
  if not isinstance(folder, RemotePath):
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
      raise UserError(f"--workdir={folder}: {there} is a file: name a folder.")
    if not os.access(there, os.W_OK):
      raise UserError(
        f"--workdir={folder}: {there} may not be written to: name another."
      )
  # A run that was killed while it wrote its first files leaves only these.
  first = {"processor", "initial", "teacher", f"{RUN_FILE}.part"}
  if folder.is_dir() and not is_run(folder):
    others = sorted(p.name for p in folder.iterdir() if p.name not in first)
    if others:
      raise UserError(
        f"--workdir={folder} holds something else ({', '.join(others[:3])}, ...) and no "
        f"{RUN_FILE}: name a new or empty folder."
      )


def read_description(folder: Folder) -> RunDescription:
  """Reads what `write_description` wrote.

  Raises:
    UserError: no run is there, or its description is damaged or of a newer layout.
  """
  folder = run_folder(folder)
  path = folder / RUN_FILE
  try:
    stored = json.loads(path.read_text())
  except FileNotFoundError:
    raise UserError(
      f"{folder} holds no {RUN_FILE}: name the --workdir of a training run."
    ) from None
  except (OSError, ValueError) as error:
    raise UserError(
      f"{path} cannot be read ({error}): restore it from a copy."
    ) from None
  if stored.get(_MARKER) != _LAYOUT:
    raise UserError(
      f"{path} is of layout {stored.get(_MARKER)!r}, this version reads {_LAYOUT}: use "
      "the version of gcl_jax that wrote it."
    )
  with local_copy(folder / "processor") as here:
    processor = Processor.from_folder(here)
  return RunDescription(
    config=ConfigDict(stored["config"]),
    model=config_from_dict(stored["model"]),
    fusion=FusionSettings.from_dict(stored["fusion"]),
    processor=processor,
    steps=stored["steps"],
    records=stored["records"],
  )


def write_result(folder: Folder, step: int, result: Any) -> None:
  """Keeps what the evaluation found at a step. UserError as `write_json`."""
  write_json(run_folder(folder) / "results" / f"{step:09d}.json", result)


def read_results(folder: Folder) -> dict[int, Any]:
  """Every evaluation of the run, by step."""
  files = sorted((run_folder(folder) / "results").glob("*.json"))
  return {int(path.stem): json.loads(path.read_text()) for path in files}
