"""Where every row of a table lies, 22 bytes a row, kept on disk between runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, islice

import numpy as np

from gcl_jax.data.columns import Columns, split_of
from gcl_jax.paths import AnyPath, open_file, stamp
from gcl_jax.data.index_cache import Index, cache_file, read_index, write_index
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


def load_index(
  table: Table, path: AnyPath, columns: Columns, *, composed: AnyPath, cache_dir: str
) -> Index:
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
  key = [
    _VERSION,
    stamp(path),
    stamp(composed) if composed.is_file() else None,
    columns.image,
    columns.caption,
    columns.group,
    columns.id,
  ]
  cached = cache_file("tables", path.stem, key, cache_dir)
  index = read_index(cached, _ROW)
  if index is None:
    index = _build(table, path, columns, _composed_test(composed))
    write_index(cached, index)
  return index


def _build(
  table: Table, path: AnyPath, columns: Columns, references: frozenset[str]
) -> Index:
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
    group = columns.group_of(line.row, images, columns.id_of(line.row, f"row-{total}"))
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
  return Index(rows, names, bad, tuple(messages))


def _checked(lines: Iterator[Line], columns: Columns, path: AnyPath) -> Iterator[Line]:
  """The lines, once it is clear that the first ones have our columns."""
  head = list(islice(lines, 200))
  present = {name for line in head if line.row is not None for name in line.row}
  if present:
    columns.check(present, str(path))
  return chain(head, lines)


def _composed_test(composed: AnyPath) -> frozenset[str]:
  if not composed.is_file():
    return frozenset()
  references = set()
  with open_file(composed) as file:
    for raw in file:
      try:
        query = json.loads(raw)
        if query["split"] == "test":
          references.add(query["reference"])
      except (ValueError, KeyError, TypeError):
        continue  # it says nothing about a split
  return frozenset(references)
