"""The processes of one job: how they meet, agree on a number, wait, and are told to stop.

Numbers and barriers go through JAX's coordination service, from host to host: a device
collective would have to wait for the steps that are already on the device.
"""

from __future__ import annotations

import collections
import signal
import threading
from types import FrameType, TracebackType
from typing import ClassVar

import jax

from gcl_jax.errors import UserError

_PATIENCE_MS = 30 * 60_000  # a process may be compiling, or reading a slow disk


def join(coordinator: str = "", processes: int = 0, process_id: int = -1) -> None:
  """Joins the other processes of the job, before anything touches a device.

  Args:
    coordinator: `host:port` of process 0. "": what the cluster says (TPU pods, SLURM,
      GKE, Open MPI).
    processes: how many there are. process_id: which this is, from 0.

  Raises:
    UserError: no cluster is described here, or half of a description is given.
  """
  given = (bool(coordinator), processes > 0, process_id >= 0)
  if any(given) and not all(given):
    raise UserError(
      "--coordinator=host:port, --processes=N and --process_id=i go together: give all "
      "three, or --distributed alone where the cluster says who is who."
    )
  if any(given) and process_id >= processes:
    raise UserError(
      f"--process_id is {process_id} of --processes={processes}: it counts from 0."
    )
  try:
    if any(given):
      jax.distributed.initialize(coordinator, processes, process_id)
    else:
      jax.distributed.initialize()
  except (ValueError, RuntimeError) as error:
    raise UserError(
      f"the processes of this job cannot meet ({str(error).splitlines()[0]}). Outside "
      "a TPU pod, SLURM or GKE say who is who: --coordinator=host:port --processes=N "
      "--process_id=i."
    ) from error


def is_first() -> bool:
  """Whether this process writes and prints for all."""
  return jax.process_index() == 0


def _service():
  """JAX's client of the coordination service; None where there is one process.

  Orbax, Flax and others read the same place: there is no public name for it.
  """
  from jax._src import distributed

  return distributed.global_state.client if jax.process_count() > 1 else None


def barrier(name: str) -> None:
  """Returns when every process has come to it. A name serves once."""
  service = _service()
  if service is not None:
    service.wait_at_barrier(f"gcl_jax/{name}", _PATIENCE_MS)


class Largest:
  """The largest of the processes' numbers, asked for by all of them in one order.

  Every process makes as many of a name, in one order too.
  """

  _made: ClassVar[collections.Counter[str]] = collections.Counter()

  def __init__(self, name: str):
    """Args:
    name: what the numbers are.
    """
    self._name, self._asked = f"gcl_jax/{name}/{self._made[name]}", 0
    self._made[name] += 1

  def __call__(self, number: int) -> int:
    """Tells the others, and waits for theirs."""
    service = _service()
    if service is None:
      return number
    me, asked = jax.process_index(), self._asked
    service.key_value_set(f"{self._name}/{asked}/{me}", str(number))
    others = (p for p in range(jax.process_count()) if p != me)
    for other in others:
      key = f"{self._name}/{asked}/{other}"
      number = max(number, int(service.blocking_key_value_get(key, _PATIENCE_MS)))
    if asked:
      # Whoever told this round's number has read all of the last round's.
      service.key_value_delete(f"{self._name}/{asked - 1}/{me}")
    self._asked += 1
    return number


class Stop:
  """Whether the job was told to stop (SIGTERM: preemption, a scheduler's end).

  `asked` must be called by every process, as often and in one order; all get the same
  answer, so that they save the same step.
  """

  def __init__(self):
    self._told, self._asked, self._before = False, 0, None

  def __enter__(self) -> Stop:
    # With several processes JAX has a handler of its own, which tells the others.
    here = threading.current_thread() is threading.main_thread()
    if jax.process_count() == 1 and here:
      self._before = signal.signal(signal.SIGTERM, self._hear)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _hear(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self._told = True

  def asked(self) -> bool:
    """Whether to save and end now; a later answer may be the first True."""
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      self._asked += 1
      self._told |= multihost_utils.reached_preemption_sync_point(self._asked)
    return self._told
