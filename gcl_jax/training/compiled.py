"""The step as it is used: compiled once for each shape of a batch, and measured.

A compilation is seen on the screen, is left out of the rates, and tells what a device
will hold before the first step runs.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from gcl_jax.models import Model
from gcl_jax.processes import is_first
from gcl_jax.training.chips import chip_of
from gcl_jax.training.flops import pair_flops
from gcl_jax.training.state import State, Step


class CompiledStep:
  """A jitted step, compiled when a batch of another shape comes.

  Attributes:
    compile_seconds: spent on it so far.
  """

  def __init__(self, step: Step, report: Callable[[Any, float], None]):
    """Args:
    step: of `make_step`.
    report: called with what was compiled first, and the seconds that it took.
    """
    self._step, self._report = step, report
    self._compiled: dict[tuple, Any] = {}
    self.compile_seconds = 0.0

  def __call__(
    self, state: State, batch: dict[str, jax.Array], constants: Any
  ) -> tuple[State, dict[str, jax.Array]]:
    """As the step."""
    shapes = tuple((name, batch[name].shape) for name in sorted(batch))
    if shapes not in self._compiled:
      start = time.monotonic()
      compiled = self._step.lower(state, batch, constants).compile()
      seconds = time.monotonic() - start
      self.compile_seconds += seconds
      if not self._compiled:
        self._report(compiled, seconds)
      self._compiled[shapes] = compiled
    return self._compiled[shapes](state, batch, constants)


class Meter:
  """The operations that training needs, and the share of the devices' best that it is.

  Those of `pair_flops`, at the width that the texts are cut to; what is computed again
  to save memory does not count (MFU's convention).
  """

  def __init__(self, model: Model, mesh: Mesh, pairs: int, **options: Any):
    """Args:
    model: whose towers. mesh: the devices. pairs: of a step, over all devices.
    options: of `pair_flops`.
    """
    chip = chip_of(mesh.devices.flat[0].device_kind)
    self.peak = chip.flops * mesh.size if chip else 0.0
    self._pairs, self._done = pairs, 0
    self.of_a_pair = functools.cache(lambda width: pair_flops(model, width, **options))

  def add(self, batch: dict[str, jax.Array]) -> None:
    """Counts a step."""
    self._done += self._pairs * self.of_a_pair(batch["tokens"].shape[-1])

  def utilization(self, seconds: float) -> dict[str, float]:
    """`mfu` since the last call; nothing for devices whose best is not known."""
    done, self._done = self._done, 0
    return {"mfu": done / seconds / self.peak} if self.peak else {}


def report_step(meter: Meter, mesh: Mesh, width: int) -> Callable[[Any, float], None]:
  """What to print of the first compiled step.

  Args:
    meter: of the run. mesh: its devices. width: tokens of the longest texts.
  """

  def report(compiled: Any, seconds: float) -> None:
    memory = compiled.memory_analysis()
    if not is_first() or memory is None:
      return
    rate = (
      f"MFU is of {meter.peak / 1e12:,.0f} TFLOP/s"
      if meter.peak
      else f"no MFU: the best of a {mesh.devices.flat[0].device_kind} is not known"
    )
    print(
      f"step compiled in {seconds:.0f} s; a device holds "
      f"{memory.argument_size_in_bytes / 1e9:.2f} GB of state and batch and "
      f"{memory.temp_size_in_bytes / 1e9:.2f} GB of temporaries; "
      f"{meter.of_a_pair(width) / 1e9:.2f} GFLOP a pair of {width} tokens; {rate}",
      file=sys.stderr,
      flush=True,
    )

  return report
