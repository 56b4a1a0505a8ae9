"""One run's folder under several processes: what the first sees there, all must see.

A network disk shows another machine's files late, by its cache; a folder of one machine
alone never does.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from gcl_jax.checkpoints.folder import (
  RUN_FILE,
  Folder,
  RunDescription,
  is_run,
  read_description,
  read_results,
  run_folder,
)
from gcl_jax.checkpoints.whole import saved_steps
from gcl_jax.errors import UserError
from gcl_jax.processes import Largest, told_by_first

_PATIENCE = 90.0  # seconds; NFS may keep what it knows of a folder for sixty
_PAUSE = 1.0


class Contents(NamedTuple):
  """What is in a run's folder; of a folder that is no run's yet, nothing."""

  stored: RunDescription | None
  steps: list[int]  # whole checkpoints, ascending
  results: dict[int, Any]  # of the evaluations, by step


def read_contents(workdir: Folder, patience: float = _PATIENCE) -> Contents:
  """Reads a run's folder; every process must call this, and all get the same.

  Args:
    workdir: the run's folder.
    patience: seconds that a process waits to see what the first one saw.

  Raises:
    UserError: this process sees something else there than the first.
  """
  contents, digest = _look(workdir)
  wanted = told_by_first("what the run's folder holds", digest)

  def look_again() -> bool:
    nonlocal contents, digest
    if digest != wanted:
      contents, digest = _look(workdir)
    return digest == wanted

  _wait(look_again, workdir, "something else than", patience)
  return contents


def wait_for_run(workdir: Folder, patience: float = _PATIENCE) -> None:
  """Returns when this process sees that the folder, which the first began, is a run's.

  Raises:
    UserError: it does not come to see it.
  """
  _wait(lambda: is_run(workdir), workdir, f"no {RUN_FILE} from", patience)


def _look(workdir: Folder) -> tuple[Contents, str]:
  # In this order on disk too: a step is whole before its result is written.
  stored = read_description(workdir) if is_run(workdir) else None
  steps, results = saved_steps(workdir), read_results(workdir)
  run = (run_folder(workdir) / RUN_FILE).read_text() if stored else ""
  seen = json.dumps([run, steps, sorted(results)])
  return Contents(stored, steps, results), hashlib.sha256(seen.encode()).hexdigest()


def _wait(
  done: Callable[[], bool], workdir: Folder, what: str, patience: float
) -> None:
  """Until it is done; where it is not so on one process all of them raise."""
  until = time.monotonic() + patience
  while not (here := done()) and time.monotonic() <= until:
    time.sleep(min(_PAUSE, patience))
  if not Largest("the run's folder")(int(not here)):
    return
  me = jax.process_index()
  raise UserError(
    f"{'another process' if here else f'process {me}'} sees {what} process 0 in the "
    f"run's folder {workdir}: give a --workdir that all machines share, a network disk "
    "or gs://bucket/runs/name."
  )
