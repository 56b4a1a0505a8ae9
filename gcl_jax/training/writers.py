"""Where a run's numbers go: JSON lines, TensorBoard, Weights & Biases, the screen."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from ml_collections import ConfigDict


class MetricWriter:
  """Writes scalars of a step to every place that the config asks for.

  The file of JSON lines is cut back to the step from which a run goes on, so that a
  step never stands in it twice. Of several processes the first writes.
  """

  def __init__(self, workdir: str | os.PathLike, config: ConfigDict, start_step: int):
    """Args:
    workdir: the run's folder.
    config: the run's.
    start_step: the step that was restored, 0 for a new run.
    """
    self._lines = self._board = self._wandb = None
    if jax.process_index():
      return
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    _keep_lines_up_to(path, start_step)
    self._lines = path.open("a", buffering=1)
    if config.log.tensorboard:
      from tensorboardX import SummaryWriter

      purge = start_step + 1 if start_step else None
      self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
    if config.log.wandb:
      self._wandb = _start_wandb(config, folder)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One line of scalars; names with slashes group on the boards."""
    if self._lines:
      self._lines.write(json.dumps({"step": step, **values}) + "\n")
    if self._board:
      for name, value in values.items():
        self._board.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.log(dict(values), step=step)

  def close(self) -> None:
    """Flushes and closes every place."""
    if self._lines:
      self._lines.close()
    if self._board:
      self._board.close()
    if self._wandb:
      self._wandb.finish()


def _keep_lines_up_to(path: Path, step: int) -> None:
  if not path.is_file():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line + "\n")
    except (ValueError, KeyError):
      continue  # a line that a kill cut short
  part = path.with_name(path.name + ".part")
  part.write_text("".join(kept))
  os.replace(part, path)


def _start_wandb(config: ConfigDict, folder: Path):
  import wandb  # `check_numbers` has seen that it is installed

  return wandb.init(
    project=config.log.wandb,
    name=config.name,
    dir=str(folder),
    # The same folder is the same run on the board when it is resumed.
    id=hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16],
    resume="allow",
    config=json.loads(config.to_json_best_effort()),
  )


class ProgressLine:
  """Step, loss, pairs/s, share of time waiting for data, time left.

  On a terminal one line that is written over; elsewhere a line each time. `seconds` is
  the length of the time that the last rates are of.
  """

  def __init__(self, total_steps: int, pairs_per_step: int, start_step: int):
    self._total, self._pairs = total_steps, pairs_per_step
    self._last_step, self._last_time = start_step, time.monotonic()
    self.seconds = 0.0
    self._live, self._shown = sys.stderr.isatty(), jax.process_index() == 0

  def rates(self, step: int, waited: float) -> dict[str, float]:
    """Pairs/s and share of time spent waiting for data, since the last call."""
    now = time.monotonic()
    self.seconds = seconds = max(now - self._last_time, 1e-9)
    steps = step - self._last_step
    self._last_step, self._last_time = step, now
    return {
      "pairs_per_second": steps * self._pairs / seconds,
      "data_wait": min(waited / seconds, 1.0),
    }

  def leave_out(self, seconds: float) -> None:
    """Takes time off the clock that was not training."""
    self._last_time += seconds

  def reset(self) -> None:
    """Restarts the clock, after time that was not training."""
    self._last_time = time.monotonic()

  def show(self, step: int, values: Mapping[str, float]) -> None:
    """Prints the line for a step, on the first process."""
    if not self._shown:
      return
    left = (self._total - step) * self._pairs / max(values["pairs_per_second"], 1e-9)
    text = (
      f"step {step}/{self._total}  loss {values['loss']:.4f}  "
      f"{values['pairs_per_second']:.0f} pairs/s  "
      f"waiting for data {values['data_wait']:.0%}  "
      + (f"MFU {values['mfu']:.0%}  " if "mfu" in values else "")
      + f"{_clock(left)} left"
    )
    if self._live:
      end = "\n" if step == self._total else ""
      print(f"\r\x1b[K{text}", end=end, file=sys.stderr, flush=True)
    else:
      print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
  hours, rest = divmod(int(seconds), 3600)
  minutes, rest = divmod(rest, 60)
  return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
