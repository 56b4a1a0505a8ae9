"""How a command line of this package starts and ends: flags, one call, exit codes.

0: done. 2: a user's mistake, one message. 130: stopped by the keyboard. Anything else
is a bug, with its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from gcl_jax.errors import UserError


def run(main: Callable[[], None]) -> None:
  """Parses the flags and calls `main`; ends the process."""
  # The libraries narrate every file that they write; --verbosity=0 shows it.
  flags.FLAGS.set_default("verbosity", logging.WARNING)
  app.run(lambda _: _guarded(main), flags_parser=_parse)


def _guarded(main: Callable[[], None]) -> None:
  try:
    main()
  except UserError as error:
    _fail(str(error))
  except KeyboardInterrupt:
    print(
      "\nstopped; the same command goes on from the last checkpoint", file=sys.stderr
    )
    sys.exit(130)


def _parse(argv: Sequence[str]) -> Sequence[str]:
  """Absl's parser, whose every complaint becomes one message."""
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    _fail(f"{error}. See --help.")
  except (AttributeError, KeyError, TypeError) as error:
    # ml_collections: an unknown field (it names the nearest) or a value of another type.
    _fail(f"{error}".strip("\"'"))
  except (FileNotFoundError, ImportError, SyntaxError) as error:
    _fail(f"--config cannot be read: {error}")
  except ValueError as error:
    _fail(str(error))
  except UserError as error:
    _fail(str(error))
  if len(rest) > 1:
    _fail(f"{rest[1]!r} is not a flag: flags begin with --. See --help.")
  return rest


def _fail(message: str) -> None:
  print(f"error: {message}", file=sys.stderr, flush=True)
  sys.exit(2)
