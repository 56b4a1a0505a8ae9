"""The loop: draw, step, log, save, evaluate. It knows nothing of losses or models."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from gcl_jax.errors import Preempted, UserError
from gcl_jax.processes import Stop
from gcl_jax.training.compiled import CompiledStep, Meter
from gcl_jax.training.state import State
from gcl_jax.training.writers import MetricWriter, ProgressLine


class Batches(Protocol):
  """What the loop asks of the data pipeline."""

  position: int  # records consumed globally by the batches handed out
  texts_cut: int  # of those of this process, since it started
  longest: int  # tokens of the longest texts

  def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]: ...
  def recent_errors(self) -> list[str]: ...


class Saver(Protocol):
  """What the loop asks of the checkpoints."""

  def save(self, step: int, state: State, position: int) -> None: ...
  def wait(self) -> None: ...


def run_loop(
  state: State,
  *,
  config: ConfigDict,
  total_steps: int,
  step_function: CompiledStep,
  meter: Meter,
  batches: Batches,
  place: Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]],
  constants: Any,
  checkpoints: Saver,
  evaluate: Callable[[State, int], None],
  writer: MetricWriter,
  watch: Callable[[int, Mapping[str, float]], None],
  stop: Stop,
  workdir: Path,
  records: int,
) -> State:
  """Trains from the state's step to `total_steps`.

  A checkpoint is written at every `config.checkpoint.every` steps, before every
  evaluation and at the end; never of a state in which something was not finite.

  Args:
    state: fresh or restored; donated.
    config: the run's.
    total_steps: where the run ends.
    step_function: of `make_step`, compiled when it is needed.
    meter: counts the work of the steps.
    batches: the pipeline, at the state's position.
    place: a batch of this process -> global arrays.
    constants: third argument of the step.
    checkpoints: where states are saved.
    evaluate: called with (state, step) after a step was saved.
    writer: where the numbers of a step go.
    watch: sees the same numbers.
    stop: asked after every step.
    workdir: the run's folder of this machine, for profiler traces.
    records: size of the training source.

  Returns:
    The state after the last step.

  Raises:
    UserError: the loss or an update stopped being finite, or too many records cannot
      be read. The last checkpoint is whole and from before.
    Preempted: the job was told to stop; the step is saved.
  """
  start = int(state["step"])
  progress = ProgressLine(total_steps, config.batch_size, start)
  guard = _Guard(config, batches, records)
  profiler = _Profiler(config, workdir)
  iterator, waited = iter(batches), 0.0
  for step in range(start + 1, total_steps + 1):
    profiler.before(step, state)
    asked = time.monotonic()
    batch = next(iterator)
    waited += time.monotonic() - asked
    compiling = step_function.compile_seconds
    placed = place(batch)
    state, metrics = step_function(state, placed, constants)
    progress.leave_out(step_function.compile_seconds - compiling)
    meter.add(placed)
    last = step == total_steps
    if last or step % config.log.every == 0:
      values = {name: float(value) for name, value in jax.device_get(metrics).items()}
      guard.check(state)
      values |= progress.rates(step, waited)
      values |= meter.utilization(progress.seconds)
      values["bad_records"] = float(guard.bad)
      writer.write(step, values)
      progress.show(step, values)
      watch(step, values)
      waited = 0.0
    evaluated = last or _due(step, config.eval.every)
    stopped = stop.asked()
    if stopped or evaluated or _due(step, config.checkpoint.every):
      guard.check(state)
      checkpoints.save(step, state, batches.position)
    if stopped:
      profiler.close()
      checkpoints.wait()
      raise Preempted(
        f"told to stop: step {step} is saved; the same command goes on from there"
      )
    if evaluated:
      asked = time.monotonic()
      evaluate(state, step)
      progress.leave_out(time.monotonic() - asked)
    epoch = step * config.batch_size // records
    if last or epoch > (step - 1) * config.batch_size // records:
      guard.check(state)
      guard.report(f"epoch {epoch} done" if not last else "done")
  profiler.close()
  checkpoints.wait()
  return state


def _due(step: int, every: int) -> bool:
  return bool(every) and step % every == 0


class _Guard:
  """Stops a run whose numbers or whose data went bad."""

  def __init__(self, config: ConfigDict, batches: Batches, records: int):
    self._config, self._batches, self._records = config, batches, records
    self.bad = 0

  def check(self, state: State) -> None:
    """Reads the counters of the state.

    Raises:
      UserError: see `run_loop`.
    """
    failed, self.bad, step = (
      int(jax.device_get(state[name]))
      for name in ("failed_step", "bad_records", "step")
    )
    if failed >= 0:
      raise UserError(
        f"the loss or an update was not finite at step {failed}; nothing from then on "
        "was saved. Start another --workdir with a lower "
        "config.optimizer.learning_rate, a longer warm-up or "
        "config.model.dtype=float32; --config.init.pretrained=<this run's folder> starts "
        "it from the last checkpoint."
      )
    seen = step * self._config.batch_size
    # A folder of which nothing can be read should not need a thousand records to show.
    allowed = self._config.data.max_bad_fraction * max(seen, min(1000, self._records))
    if self.bad > allowed:
      raise UserError(
        f"{self.bad} of {seen} records could not be read, more than "
        f"config.data.max_bad_fraction={self._config.data.max_bad_fraction} allows. "
        f"{self._examples()}Mend the data, or raise that field."
      )

  def report(self, when: str) -> None:
    """Says after an epoch and at the end how many records could not be read, and how
    often a text was cut."""
    if self.bad and jax.process_index() == 0:
      print(
        f"{when}: {self.bad} unreadable records so far (they were left "
        f"out). {self._examples()}",
        file=sys.stderr,
        flush=True,
      )
    if (cut := self._batches.texts_cut) and jax.process_index() == 0:
      print(
        f"{when}: cuts of texts in this process since it started: {cut}; they are longer "
        "than the model or config.data.text_buckets has room for "
        f"({self._batches.longest} tokens, or fewer beside an image).",
        file=sys.stderr,
        flush=True,
      )

  def _examples(self) -> str:
    examples = self._batches.recent_errors()[:3]
    return f"For example: {'; '.join(examples)}. " if examples else ""


class _Profiler:
  """Traces the steps that the config asks for; closed, it ends a trace cut short."""

  def __init__(self, config: ConfigDict, workdir: Path):
    self._first = config.log.profile_start
    self._end = self._first + config.log.profile_steps
    self._folder, self._running = str(workdir / "profile"), False

  def before(self, step: int, state: State) -> None:
    """Starts or stops the trace before a step."""
    if self._first and step == self._first:
      jax.profiler.start_trace(self._folder)
      self._running = True
    elif self._running and step == self._end:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    """Ends the trace, where one is running."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
