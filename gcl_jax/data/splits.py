"""Which rows of a source are its `train`, `eval` or otherwise named part."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from gcl_jax.data.settings import nearest
from gcl_jax.errors import UserError

EVAL_SPLITS = ("test", "dev", "val", "validation", "eval")  # the first there
ALL = "all"


def group_hash(group: str) -> int:
  """64 bits of the SHA-256 of a group's name, read as a fraction of 2^64."""
  digest = hashlib.sha256(group.encode("utf-8", "replace")).digest()
  return int.from_bytes(digest[:8], "big")


def in_eval_part(hashes: np.ndarray, fraction: float) -> np.ndarray:
  """bool: whether a group's hash (uint64) is in the first `fraction` of all hashes."""
  return hashes < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))


def stored_eval_split(names: Sequence[str]) -> str | None:
  """The stored split that serves for evaluation: the first of `EVAL_SPLITS`."""
  return next((name for name in EVAL_SPLITS if name in names), None)


def choose_rows(
  split: str,
  *,
  names: Sequence[str],
  codes: np.ndarray,
  groups: np.ndarray,
  eval_fraction: float,
  where: str,
) -> np.ndarray:
  """int64 indices of the rows of a split, ascending.

  `eval` is the stored `test`, else `dev`, else the rows whose group's hash falls into
  `eval_fraction`. `train` is what is stored as `train`, or everything else that is no
  evaluation split; never a row of `eval`. `all` is every row.

  Args:
    split: "train", "eval", "all" or a stored name.
    names: stored splits; "" for rows that have none.
    codes: int (rows,), places in `names`.
    groups: uint64 (rows,), hashes of the rows' groups.
    eval_fraction: see above.
    where: what the rows are of, for messages.

  Raises:
    UserError: an unknown split, or one without rows.
  """
  stored = [name for name in names if name]
  rows = np.zeros(len(codes), bool)
  if split in stored and split != "train":
    rows = codes == names.index(split)
  elif split == ALL:
    rows = ~rows
  elif split in ("train", "eval"):
    evaluation = stored_eval_split(stored)
    if evaluation is None:
      in_eval = in_eval_part(groups, eval_fraction)
    else:
      in_eval = codes == names.index(evaluation)
    if split == "eval":
      rows = in_eval
    elif "train" in stored:
      rows = (codes == names.index("train")) & ~in_eval
    else:
      held = [i for i, name in enumerate(names) if name in EVAL_SPLITS]
      rows = ~in_eval & ~np.isin(codes, held)
  else:
    known = [*dict.fromkeys([*stored, "train", "eval", ALL])]
    raise UserError(
      f'{where} has no split "{split}"{nearest(split, known)} Splits: '
      f"{', '.join(known)}"
    )
  chosen = np.flatnonzero(rows).astype(np.int64)
  if not len(chosen):
    raise UserError(_empty(split, stored, len(codes), eval_fraction, where))
  return chosen


def _empty(
  split: str, stored: Sequence[str], count: int, fraction: float, where: str
) -> str:
  if stored:
    there = ", ".join(stored)
    return f'{where} has no rows for split "{split}" (it stores {there}); name another'
  return (
    f'{where}: none of its {count} rows fall into split "{split}" at '
    f"config.data.eval_fraction={fraction:g}; change the fraction, add rows, or give "
    'the rows a "split"'
  )
