"""Where a run's numbers go: JSON lines, TensorBoard, Weights & Biases, the screen."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from ml_collections import ConfigDict

from gcl_jax.checkpoints.folder import keeping
from gcl_jax.paths import write_whole


class MetricWriter:
  """Writes scalars of a step to every place that the config asks for.

  The file of JSON lines is cut back to the step from which a run goes on, so that a
  step never stands in it twice. Of several processes the first writes. Every method
  raises UserError where the disk is full or refuses.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    config: ConfigDict,
    start_step: int,
    *,
    run: str = "",
  ):
    """Args:
    folder: the run's, or its `Spool`'s: of this machine.
    config: the run's.
    start_step: the step that was restored, 0 for a new run.
    run: what Weights & Biases knows the run by: its folder, as it was named.
    """
    self._lines = self._board = self._wandb = None
    if jax.process_index():
      return
    folder = Path(folder)
    self._path = folder / "metrics.jsonl"
    with keeping(folder):
      folder.mkdir(parents=True, exist_ok=True)
      _keep_lines_up_to(self._path, start_step)
      self._lines = self._path.open("a", buffering=1)
      if config.log.tensorboard:
        self._board = _Board(folder / "tensorboard", start_step)
    if config.log.wandb:
      self._wandb = _start_wandb(config, folder, run)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One line of scalars; names with slashes group on the boards."""
    if self._lines:
      with keeping(self._path):
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
    if self._board:
      with keeping(self._path.with_name("tensorboard")):
        self._board.write(step, values)
    if self._wandb:
      self._wandb.log(dict(values), step=step)

  def close(self) -> None:
    """Flushes and closes every place."""
    with keeping(self._path) if self._lines else contextlib.nullcontext():
      for place in filter(None, (self._lines, self._board)):
        place.close()
    if self._wandb:
      self._wandb.finish()


class _Board:
  """TensorBoard's file of scalars, each step on disk when `write` returns.

  TensorboardX's own writer has a thread behind a short queue: it dies of a full disk,
  and the run then waits for ever to put into the queue.
  """

  def __init__(self, folder: Path, start_step: int):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder.mkdir(parents=True, exist_ok=True)
    self._event, self._file = Event, EventsWriter(str(folder / "events"))
    if start_step:  # the board forgets what an earlier file says of later steps
      self._put(start_step + 1, session_log=SessionLog(status=SessionLog.START))
    self._file.flush()

  def write(self, step: int, values: Mapping[str, float]) -> None:
    from tensorboardX.proto.summary_pb2 import Summary

    scalars = [Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
    self._put(step, summary=Summary(value=scalars))
    self._file.flush()

  def _put(self, step: int, **what) -> None:
    self._file.write_event(self._event(wall_time=time.time(), step=step, **what))

  def close(self) -> None:
    self._file.close()


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
  write_whole(path, "".join(kept))


def _start_wandb(config: ConfigDict, folder: Path, run: str):
  import wandb  # `check_numbers` has seen that it is installed

  return wandb.init(
    project=config.log.wandb,
    name=config.name,
    dir=str(folder),
    # The same folder is the same run on the board when it is resumed.
    id=hashlib.sha256((run or str(folder.absolute())).encode()).hexdigest()[:16],
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
