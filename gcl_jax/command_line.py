"""How a command line of this package starts and ends: flags, one call, exit codes.

0: done. 2: a user's mistake, one message. 75: told to stop, all is saved, run the same
command again. 130: stopped by the keyboard. Anything else is a bug, with its traceback.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging

from gcl_jax.errors import Preempted, UserError

RESTART_ME = os.EX_TEMPFAIL


def run(
  main: Callable[..., None], *, resumable: bool = False, takes_files: bool = False
) -> None:
  """Parses the flags and calls `main`; ends the process.

  Args:
    main: the command.
    resumable: whether the same command goes on after it was stopped, and says so.
    takes_files: whether `main` is called with the arguments that are no flags.
  """

  def start(argv: Sequence[str]) -> None:
    called = functools.partial(main, argv[1:]) if takes_files else main
    _guarded(called, resumable)

  app.run(start, flags_parser=functools.partial(_parse, takes_files=takes_files))


def _guarded(main: Callable[[], None], resumable: bool) -> None:
  try:
    _ended_well(main, resumable)
  except SystemExit as end:
    if end.code != RESTART_ME:  # where all of them end together
      _leave_if_one_of_several(end.code)
    raise
  except Exception:
    if _is_one_of_several():
      traceback.print_exc()
      _leave_if_one_of_several(1)
    raise


def _is_one_of_several() -> bool:
  if "jax" not in sys.modules:
    return False
  from gcl_jax.processes import is_one_of_several

  return is_one_of_several()


def _leave_if_one_of_several(code: int) -> None:
  """An exit would wait minutes for processes that wait for this one."""
  if _is_one_of_several():
    from gcl_jax.processes import leave

    leave(code)


def _ended_well(main: Callable[[], None], resumable: bool) -> None:
  if not any(given.lstrip("-").startswith("verbosity") for given in sys.argv):
    # The libraries narrate every file that they write; --verbosity=0 shows it.
    logging.set_verbosity(logging.WARNING)
  try:
    main()
  except UserError as error:
    _fail(str(error))
  except Preempted as stop:
    print(f"\n{stop}", file=sys.stderr)
    sys.exit(RESTART_ME)
  except KeyboardInterrupt:
    more = "; the same command goes on where it was saved" if resumable else ""
    print(f"\nstopped{more}", file=sys.stderr)
    sys.exit(130)


def _parse(argv: Sequence[str], takes_files: bool) -> Sequence[str]:
  """Absl's parser, whose every complaint becomes one message."""
  try:
    _check_recipe(argv)
    rest = flags.FLAGS(argv)
  except UserError as error:
    _fail(str(error))
  except AttributeError as error:
    _fail(_unknown_field(argv, error))
  except flags.Error as error:
    _fail(f"{error}. See --help.")
  except KeyError as error:  # ml_collections, of a group of fields
    _fail(_unknown_field(argv, error))
  except (TypeError, ValueError) as error:
    _fail(f"{error}. See --help.")
  if len(rest) > 1 and not takes_files:
    _fail(f"{rest[1]!r} is not a flag: flags begin with --. See --help.")
  return rest


def _check_recipe(argv: Sequence[str]) -> None:
  """ml_collections reports a recipe that is not there only when it is first used."""
  for given, following in zip(argv, (*argv[1:], ""), strict=True):
    name, equals, value = given.lstrip("-").partition("=")
    if name == "config" and given.startswith("-"):
      path = (value if equals else following).split(":")[0]
      if not Path(path).is_file():
        near = ", ".join(sorted(str(p) for p in Path(path).parent.glob("*.py"))[:9])
        there = (
          f" There are {near}." if near else " Start in the root of the repository."
        )
        raise UserError(f"--config={path}: there is no such file.{there}")


def _unknown_field(argv: Sequence[str], error: Exception) -> str:
  """Which flag names a field that the config lacks, and the nearest field."""
  said = str(error).replace("\\", "")
  found = re.search(r"'(\w+)'", said)
  near = re.search(r'Did you mean "(\w+)"', said)
  field = found[1] if found else said
  pattern = rf"--?(config\.[\w.]*\b{field}\b)"
  flag = next((m[1] for m in map(re.compile(pattern).match, argv) if m), field)
  hint = f' Did you mean "{near[1]}"?' if near else ""
  return f"--{flag}: there is no such field.{hint}"


def _fail(message: str) -> None:
  print(f"error: {message}", file=sys.stderr, flush=True)
  sys.exit(2)
