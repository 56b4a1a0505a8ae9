"""What a run's folder holds beside the checkpoints, written and read.

run.json                 the marker, the config, the model's shape, the data's size
processor/               image processor and tokenizer files, as Hugging Face's
checkpoints/<step>/      Orbax
results/<step>.json      what the evaluation found at that step
metrics.jsonl, tensorboard/
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings
from gcl_jax.models import CLIPConfig
from gcl_jax.processing import Processor

RUN_FILE = "run.json"
_MARKER = "gcl_jax_run"
_LAYOUT = 1


@dataclasses.dataclass(frozen=True)
class RunDescription:
  """All of a run that is decided before its first step."""

  config: ConfigDict
  model: CLIPConfig
  fusion: FusionSettings
  processor: Processor
  steps: int  # length of the run
  records: int  # in the training source: a resume on other data is refused


def is_run(folder: str | os.PathLike) -> bool:
  """Whether a folder is a run's."""
  return (Path(folder) / RUN_FILE).is_file()


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file whole or not at all; of several processes the first writes."""
  if jax.process_index():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + ".part")
  part.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
  os.replace(part, path)


def write_description(folder: str | os.PathLike, run: RunDescription) -> None:
  """Starts a run's folder, or describes it anew (a longer run).

  Raises:
    UserError: the folder exists, is not empty and is not a run's.
  """
  folder = Path(folder)
  check_free(folder)
  if jax.process_index() == 0:
    run.processor.save(folder / "processor")
  description = {
    _MARKER: _LAYOUT,
    "config": json.loads(run.config.to_json_best_effort()),
    "model": run.model.to_hf(),
    "fusion": run.fusion.to_dict(),
    "steps": run.steps,
    "records": run.records,
  }
  write_json(folder / RUN_FILE, description)  # last: it makes the folder a run's


def check_free(folder: str | os.PathLike) -> None:
  """Refuses a folder that holds something other than a run, or cannot be written.

  Raises:
    UserError: it is, or lies below, a file; it holds other things; no permission.
  """
  folder = Path(folder)
  if re.match(r"\w+:/", str(folder)):  # a Path has lost the second slash
    raise UserError(f"--workdir={folder}: runs live in local or mounted folders.")
  there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
  if not there.is_dir():
    raise UserError(f"--workdir={folder}: {there} is a file: name a folder.")
  if not os.access(there, os.W_OK):
    raise UserError(f"--workdir={folder}: {there} may not be written to: name another.")
  # A run that was killed while it wrote its first files leaves only these.
  first = {"processor", "initial", f"{RUN_FILE}.part"}
  if folder.is_dir() and not is_run(folder):
    others = sorted(p.name for p in folder.iterdir() if p.name not in first)
    if others:
      raise UserError(
        f"--workdir={folder} holds something else ({', '.join(others[:3])}, ...) and no "
        f"{RUN_FILE}: name a new or empty folder."
      )


def read_description(folder: str | os.PathLike) -> RunDescription:
  """Reads what `write_description` wrote.

  Raises:
    UserError: no run is there, or its description is damaged or of a newer layout.
  """
  path = Path(folder) / RUN_FILE
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
  return RunDescription(
    config=ConfigDict(stored["config"]),
    model=CLIPConfig.from_hf(stored["model"]),
    fusion=FusionSettings.from_dict(stored["fusion"]),
    processor=Processor.from_folder(Path(folder) / "processor"),
    steps=stored["steps"],
    records=stored["records"],
  )


def write_result(folder: str | os.PathLike, step: int, result: Any) -> None:
  """Keeps what the evaluation found at a step."""
  write_json(Path(folder) / "results" / f"{step:09d}.json", result)


def read_results(folder: str | os.PathLike) -> dict[int, Any]:
  """Every evaluation of the run, by step."""
  files = sorted((Path(folder) / "results").glob("*.json"))
  return {int(path.stem): json.loads(path.read_text()) for path in files}
