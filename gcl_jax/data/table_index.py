"""Where every row of a table lies, 22 bytes a row, kept on disk between runs."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from gcl_jax.data.columns import Columns, split_of
from gcl_jax.data.record import BadRecord
from gcl_jax.data.splits import group_hash
from gcl_jax.data.table_formats import Line, Table, describe
from gcl_jax.errors import UserError

_VERSION = 1  # raise it when what an index holds changes
_ROW = np.dtype(
  [("offset", "<i8"), ("length", "<u4"), ("split", "<i2"), ("group", "<u8")]
)
_CHUNK = 1 << 16
_MESSAGES = 5


@dataclass(frozen=True)
class TableIndex:
  """`rows`: one entry per usable row; its split is a place in `splits`."""

  rows: np.ndarray
  splits: tuple[str, ...]
  bad: int
  messages: tuple[str, ...]  # of the first bad rows


def load_index(
  table: Table, path: Path, columns: Columns, *, composed: Path, cache_dir: str
) -> TableIndex:
  """The index of a table, from the cache when the file has not changed since.

  Args:
    table: the opened table.
    path: its file.
    columns: which column is what.
    composed: a file of composed queries beside it; where it exists and the table
      stores no splits, the groups of its `test` queries become the split `test`.
    cache_dir: where indexes are kept; "" is ~/.cache/gcl_jax.

  Raises:
    UserError: a column lacks altogether, or no row can be used.
  """
  cached = _cache_file(path, columns, composed, cache_dir)
  index = _read(cached)
  if index is None:
    index = _build(table, path, columns, _composed_test(composed))
    _write(cached, index)
  return index


def _build(
  table: Table, path: Path, columns: Columns, references: frozenset[str]
) -> TableIndex:
  if table.columns is not None:
    columns.check(table.columns, str(path))
  splits: dict[str, int] = {}
  bad, messages, total = 0, [], 0
  chunks, chunk, test_groups = [], [], set()
  for line in _checked(table.scan(), columns, path):
    try:
      if line.row is None:
        raise BadRecord(line.error)
      images, _ = columns.parse(line.row)
    except BadRecord as error:
      bad += 1
      if len(messages) < _MESSAGES:
        messages.append(describe(line._replace(error=str(error)), path))
      continue
    group = columns.group_of(line.row, images, columns.id_of(line.row, total))
    hashed = group_hash(group)
    if references and not references.isdisjoint(images):
      test_groups.add(hashed)
    code = splits.setdefault(split_of(line.row), len(splits))
    chunk.append((line.offset, line.length, code, hashed))
    total += 1
    if len(chunk) == _CHUNK:
      chunks.append(np.array(chunk, _ROW))
      chunk = []
  rows = np.concatenate([*chunks, np.array(chunk, _ROW)])
  if not len(rows):
    first = f" The first: {messages[0]}" if messages else ""
    raise UserError(f"{path} holds no usable row; {bad} are broken.{first}")
  names = tuple(splits)
  if test_groups and names == ("",):
    test = np.isin(rows["group"], np.array(sorted(test_groups), np.uint64))
    rows["split"], names = test, ("train", "test")
  return TableIndex(rows, names, bad, tuple(messages))


def _checked(lines: Iterator[Line], columns: Columns, path: Path) -> Iterator[Line]:
  """The lines, once it is clear that the first ones have our columns."""
  head = list(islice(lines, 200))
  present = {name for line in head if line.row is not None for name in line.row}
  if present:
    columns.check(present, str(path))
  return chain(head, lines)


def _composed_test(composed: Path) -> frozenset[str]:
  if not composed.is_file():
    return frozenset()
  references = set()
  with open(composed, "rb") as file:
    for raw in file:
      try:
        query = json.loads(raw)
        if query["split"] == "test":
          references.add(query["reference"])
      except (ValueError, KeyError, TypeError):
        continue  # it says nothing about a split
  return frozenset(references)


def _stamp(path: Path) -> list:
  stat = path.stat()
  return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def _cache_file(path: Path, columns: Columns, composed: Path, cache_dir: str) -> Path:
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  folder = Path(cache_dir) if cache_dir else Path(home) / "gcl_jax"
  key = [
    _VERSION,
    _stamp(path),
    _stamp(composed) if composed.is_file() else None,
    columns.image,
    columns.caption,
    columns.group,
    columns.id,
  ]
  digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
  return folder / "tables" / f"{path.stem}-{digest}.npy"


def _read(file: Path) -> TableIndex | None:
  """A cached index; None where there is none that can be read."""
  try:
    about = json.loads(file.with_suffix(".json").read_text())
    rows = np.load(file, mmap_mode="r", allow_pickle=False)
    if rows.dtype != _ROW or len(rows) != about["rows"]:
      return None
    return TableIndex(
      rows, tuple(about["splits"]), about["bad"], tuple(about["messages"])
    )
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _write(file: Path, index: TableIndex) -> None:
  """Keeps an index for the next run; a disk that refuses only costs the next scan."""
  about = {
    "rows": len(index.rows),
    "splits": index.splits,
    "bad": index.bad,
    "messages": index.messages,
  }
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    _replace(file.with_suffix(".json"), lambda f: f.write(json.dumps(about).encode()))
    _replace(file, lambda f: np.save(f, index.rows, allow_pickle=False))
  except OSError:
    return


def _replace(file: Path, write) -> None:
  handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
  try:
    with os.fdopen(handle, "wb") as temporary:
      write(temporary)
    os.replace(name, file)
  except BaseException:
    os.unlink(name)
    raise
