"""One exception for a user's mistake, and how a command line ends on it.

A wrong path, an unknown field, a checkpoint of another model: the user gets one
message that says what is wrong, where, and how to mend it, and exit code 2. Anything
else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
  """A mistake that the user can mend. The text is the whole message."""


def exit_cleanly(main: Callable[[Sequence[str]], int | None]):
  """Wraps an absl `main`: a `UserError` becomes one message and exit code 2."""

  def wrapped(argv: Sequence[str]) -> int | None:
    try:
      return main(argv)
    except UserError as error:
      print(f"error: {error}", file=sys.stderr, flush=True)
      sys.exit(2)

  return wrapped
