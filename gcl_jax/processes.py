"""The processes of one job: how they meet, agree on a number, wait, and are told to stop.

Numbers and barriers go through JAX's coordination service, from host to host: a device
collective would have to wait for the steps that are already on the device.
"""

from __future__ import annotations

import collections
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import ClassVar, NoReturn

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
    first = str(error).partition("\n")[0]
    raise UserError(
      f"the processes of this job cannot meet ({first}). Outside "
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


_times: collections.Counter[str] = collections.Counter()


def barrier(name: str) -> None:
  """Returns when every process has come to it, as often as all the others."""
  service = _service()
  if service is not None:
    _times[name] += 1
    service.wait_at_barrier(f"gcl_jax/{name}/{_times[name]}", _PATIENCE_MS)


def told_by_first(name: str, text: str) -> str:
  """The first process's text, on every process; all must ask, as often as the others."""
  service = _service()
  if service is None:
    return text
  key = f"gcl_jax/{name}/{_times[name]}"
  _times[name] += 1
  if is_first():
    service.key_value_set(key, text)
    return text
  return service.blocking_key_value_get(key, _PATIENCE_MS)


def leave(code: int) -> NoReturn:
  """Ends this process at once, without waiting for the others as an exit would.

  They hear of it from the service, or from whoever started them.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def is_one_of_several() -> bool:
  """Whether this process has joined others; starts no backend."""
  from jax._src import distributed

  return (distributed.global_state.num_processes or 1) > 1


class Largest:
  """The largest of the processes' numbers, asked for by all of them in one order.

  Every process first asks those of a name in one order too.
  """

  _used: ClassVar[collections.Counter[str]] = collections.Counter()

  def __init__(self, name: str):
    """Args:
    name: what the numbers are.
    """
    self._name, self._folder, self._asked = name, "", 0

  def __call__(self, number: int) -> int:
    """Tells the first process, which tells all of them the largest."""
    service = _service()
    if service is None:
      return number
    if not self._folder:
      self._folder = f"gcl_jax/{self._name}/{self._used[self._name]}"
      self._used[self._name] += 1
    me, asked = jax.process_index(), self._asked
    told, answer = f"{self._folder}/{asked}", f"{self._folder}/{asked}/answer"
    if me == 0:
      for other in range(1, jax.process_count()):
        said = service.blocking_key_value_get(f"{told}/{other}", _PATIENCE_MS)
        number = max(number, int(said))
      service.key_value_set(answer, str(number))
      if asked:
        # Whoever told this round's number has read the last round's answer.
        service.key_value_delete(f"{self._folder}/{asked - 1}")
    else:
      service.key_value_set(f"{told}/{me}", str(number))
      number = int(service.blocking_key_value_get(answer, _PATIENCE_MS))
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
