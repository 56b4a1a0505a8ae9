"""Other data than a config's own, as command lines take it: --data, --data_option."""

from __future__ import annotations

from collections.abc import Sequence

from ml_collections import ConfigDict

from gcl_jax.data.guess import guess_source
from gcl_jax.errors import UserError


def change_data(data: ConfigDict, path: str, options: Sequence[str]) -> None:
  """Points a run's config.data at other data, in place.

  Args:
    data: whatever the run was trained on.
    path: pairs of any source with files, which is guessed; "" keeps the run's own.
    options: field=value each; after the path, so that they have the last word.

  Raises:
    UserError: no such field, or a value that it cannot hold.
  """
  if path:
    data.path = path
    data.source = guess_source(path)
  for option in options:
    _set(data, option)


def _set(data: ConfigDict, option: str) -> None:
  name, equals, value = option.partition("=")
  if not equals or name not in data:
    raise UserError(
      f"--data_option={option}: write field=value with one of {', '.join(sorted(data))}."
    )
  old = data[name]
  try:
    data[name] = type(old)(value) if isinstance(old, (int, float)) else value
  except (TypeError, ValueError) as error:
    raise UserError(f"--data_option={option}: {error}.") from None
