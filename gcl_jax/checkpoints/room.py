"""Room for checkpoints: asked for before a run begins, and missed while one is written."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from gcl_jax.errors import UserError

# Full; over a quota; over the largest file that a process or a file system allows.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNFINISHED = "*.orbax-checkpoint-tmp*"
# Tensorstore gives the number of an operating system's error in its text only.
_NUMBER = re.compile(r"os_error_code='(\d+)'")
_STORES = re.compile(
  r"(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|"
  r"RESOURCE_EXHAUSTED|ABORTED): [^\n]{,200}"
)


def check_room(folder: epath.Path, size: int, kept: int) -> None:
  """Refuses a disk that does not hold two checkpoints; a store is not asked.

  Args:
    folder: where steps are saved.
    size: bytes of one checkpoint.
    kept: how many are there already. A new one is whole before an old one goes, so one
      more must always fit.

  Raises:
    UserError: with both figures.
  """
  if str(folder).startswith("gs://"):
    return
  needed = max(2 - kept, 1) * size
  # What a save that failed left behind goes before the next one begins.
  left = sum(file.stat().st_size for file in _unfinished(Path(folder)))
  free = shutil.disk_usage(folder).free + left
  if free < needed:
    count = "two checkpoints" if kept == 0 else "one more checkpoint"
    raise UserError(
      f"{folder} is on a disk with {_in_words(free)} free, and {count} of this run need "
      f"{_in_words(needed)}: make room there, or name another --workdir."
    )


def no_room_for(
  step: int, size: int, folder: epath.Path, saved: Sequence[int], error: BaseException
) -> str | None:
  """What to tell a user whose step could not be written; None where it is a bug of ours.

  Args:
    step: the one that could not.
    size: its bytes.
    folder: where steps are saved.
    saved: the steps that are whole.
    error: what the writing ended with.
  """
  number, reason = _of_the_system(error)
  if reason is None:
    return None
  last = (
    f"Step {saved[-1]}, the last good checkpoint, is whole"
    if saved
    else "There is no earlier checkpoint"
  )
  if number not in _NO_ROOM:
    return (
      f"step {step} could not be saved in {folder} ({reason}). {last}; mend what refuses, "
      f"and the same command goes on from {'there' if saved else 'the start'}."
    )
  free = ""
  if number != errno.EFBIG and not str(folder).startswith("gs://"):
    free = f", {_in_words(shutil.disk_usage(folder).free)} are free"
  return (
    f"there is no room for step {step} in {folder} ({reason}): it needs about "
    f"{_in_words(size)}{free}. {last}; make room, and the same command goes on from "
    f"{'there' if saved else 'the start'}."
  )


def _of_the_system(error: BaseException | None) -> tuple[int | None, str | None]:
  """The operating system's number and words, if an error is at all of its making."""
  while error is not None:
    found = _NUMBER.search(str(error))
    if found:
      number = int(found[1])
      return number, os.strerror(number)
    if found := _STORES.search(str(error)):
      return None, found[0]
    if isinstance(error, OSError):
      return error.errno, error.strerror or str(error)
    error = error.__cause__ or error.__context__
  return None, None


def _unfinished(folder: Path) -> Iterator[Path]:
  for half in folder.glob(_UNFINISHED):
    yield from (file for file in half.rglob("*") if file.is_file())


def _in_words(size: int) -> str:
  power = min(len(str(size)) - 1, 14) // 3
  return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
