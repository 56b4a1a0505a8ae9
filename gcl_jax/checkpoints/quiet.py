"""What Orbax says of a save that failed, beside raising it: a user needs it once.

It logs the error with a traceback from every thread that it passes. Of several writes
that fail asyncio tells of all but the first, and one that ends later finds its event
loop closed, which the interpreter tells.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

_LOGGERS = ("absl", "asyncio")
_before = None  # the interpreter's hook, while ours is in its place


def be_quiet() -> None:
  """Keeps what is raised anyway off the screen."""
  global _before
  for name in _LOGGERS:
    logging.getLogger(name).addFilter(_is_news)
  if _before is None:
    _before, sys.unraisablehook = sys.unraisablehook, _hook


def speak_again() -> None:
  """Undoes `be_quiet`."""
  global _before
  for name in _LOGGERS:
    logging.getLogger(name).removeFilter(_is_news)
  if sys.unraisablehook is _hook:
    sys.unraisablehook, _before = _before, None


def _is_news(record: logging.LogRecord) -> bool:
  if not record.exc_info:
    return True
  if record.name == "asyncio":
    return "os_error_code" not in str(record.exc_info[1])  # tensorstore's words
  return "orbax" not in record.pathname


def _hook(unraisable: Any) -> None:
  error = unraisable.exc_value
  loop_is_gone = isinstance(error, RuntimeError) and "loop is closed" in str(error)
  if not loop_is_gone and _before is not None:
    _before(unraisable)
