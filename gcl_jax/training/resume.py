"""Whether a run may go on under a config: what may differ, and what must not."""

from __future__ import annotations

import json
from typing import Any

from ml_collections import ConfigDict

from gcl_jax.checkpoints import RunDescription
from gcl_jax.errors import UserError
from gcl_jax.training.config import MAY_CHANGE, default_config


def check_resumable(
  stored: RunDescription, config: ConfigDict, records: int, workdir: str
) -> None:
  """Compares the config and the data of a run with those of its continuation.

  A field that the stored config lacks, for it was written before there was one, counts
  as its default: a new field's default is what runs did without it.

  Raises:
    UserError: names every field that differs and may not, or the size of the data.
  """
  defaults = flat_fields(json.loads(default_config().to_json_best_effort()))
  then = defaults | flat_fields(json.loads(stored.config.to_json_best_effort()))
  now = flat_fields(json.loads(config.to_json_best_effort()))
  differing = [
    name
    for name in sorted(then.keys() | now.keys())
    if then.get(name) != now.get(name) and not _may_change(name)
  ]
  if differing:
    lines = "\n".join(
      f"  config.{name}: {then.get(name)!r} then, {now.get(name)!r} now"
      for name in differing
    )
    raise UserError(
      f"{workdir} holds a run with another config:\n{lines}\nGo on with the fields it "
      "was started with, or start anew with another --workdir."
    )
  if stored.records != records:
    raise UserError(
      f"{workdir} was trained on {stored.records} records and the data now holds "
      f"{records}: restore the data, or start anew with another --workdir."
    )


def _may_change(name: str) -> bool:
  return any(name == free or name.startswith(f"{free}.") for free in MAY_CHANGE)


def changed_fields(config: ConfigDict) -> dict[str, Any]:
  """What a config says other than `default_config`: field -> value, JSON's types."""
  defaults = flat_fields(json.loads(default_config().to_json_best_effort()))
  now = flat_fields(json.loads(config.to_json_best_effort()))
  return {k: v for k, v in now.items() if k not in defaults or defaults[k] != v}


def flat_fields(tree: Any, prefix: str = "") -> dict[str, Any]:
  """A nested dict as `a.b.c` -> value."""
  if not isinstance(tree, dict):
    return {prefix: tree}
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    flat |= flat_fields(value, f"{prefix}.{name}" if prefix else name)
  return flat
