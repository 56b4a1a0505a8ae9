"""Parquet files as a source of records."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from gcl_jax.data.columnar import ColumnarSource
from gcl_jax.paths import AnyPath, RemotePath, as_path
from gcl_jax.data.settings import DataSettings
from gcl_jax.data.shards import Shard, find_shards
from gcl_jax.errors import UserError

SUFFIXES = (".parquet",)
_KEPT_BYTES = 256 << 20  # of row groups in memory, over all files of a source
_HEAVY_BYTES = 8 << 20  # a row group above it makes random order slow


def open_parquet(settings: DataSettings, split: str) -> ColumnarSource:
  """The rows of one split of a Parquet file, a folder of them, or a pattern.

  A row group is read whole and a few are kept, so that reading in order is fast;
  reading in random order costs a row group a record, which is warned of where they are
  large.

  Raises:
    UserError: no file or a broken one, and what `ColumnarSource` raises.
  """
  shards = find_shards(settings.path, SUFFIXES)
  return parquet_source(settings, split, shards, as_path(settings.path))


def parquet_source(
  settings: DataSettings, split: str, shards: Sequence[Shard], folder: AnyPath
) -> ColumnarSource:
  """The same of files that are known. `folder`: where pictures that are named lie."""
  kept = RowGroups()
  files = [ParquetRows(shard, kept) for shard in shards]
  heaviest = max(files, key=lambda file: file.heaviest_group)
  if heaviest.heaviest_group > _HEAVY_BYTES:
    logging.warning(
      "%s has row groups of up to %.0f MB, and a record in random order costs one: "
      "training from it will be slow. Pack it once with python -m gcl_jax.data.pack, or "
      "write it with fewer rows a group.",
      heaviest.shard.path,
      heaviest.heaviest_group / 1e6,
    )
  if folder.is_file() or not folder.is_dir():
    folder = shards[0].path.parent
  return ColumnarSource(settings, split, files, folder, settings.path)


class RowGroups:
  """Row groups read lately, up to so many bytes, at least one."""

  def __init__(self, limit: int = _KEPT_BYTES):
    self._limit, self._bytes = limit, 0
    self._kept: collections.OrderedDict[Any, Any] = collections.OrderedDict()
    self._lock = threading.Lock()

  def get(self, key: Any) -> Any:
    """The table kept under a key, or None."""
    with self._lock:
      if key in self._kept:
        self._kept.move_to_end(key)
      return self._kept.get(key)

  def put(self, key: Any, table: Any) -> None:
    """Keeps a table, and lets go of those not asked for longest."""
    with self._lock:
      if key not in self._kept:
        self._bytes += table.nbytes
      self._kept[key] = table
      while self._bytes > self._limit and len(self._kept) > 1:
        self._bytes -= self._kept.popitem(last=False)[1].nbytes

  def __reduce__(self):
    return (RowGroups, (self._limit,))


class ParquetRows:
  """The rows of one file. Raises UserError when it is no Parquet file."""

  def __init__(self, shard: Shard, kept: RowGroups):
    self.shard, self._kept = shard, kept
    self._lock, self._file = threading.Lock(), None
    try:
      file = self._opened()
      about, schema = file.metadata, file.schema_arrow
    except (OSError, ValueError) as error:  # pyarrow's are among them
      raise UserError(f"{shard.path} cannot be read as Parquet: {error}") from error
    self.num_rows = about.num_rows
    self.column_types = dict(zip(schema.names, schema.types, strict=True))
    groups = [about.row_group(k) for k in range(about.num_row_groups)]
    self._starts = np.cumsum([0, *(group.num_rows for group in groups)])
    self.heaviest_group = max((group.total_byte_size for group in groups), default=0)
    self._file = None  # opened again when a row is asked for: files may be many

  def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]:
    """One row's values. OSError when the file can no longer be read."""
    group = int(np.searchsorted(self._starts, index, side="right")) - 1
    key = (str(self.shard.path), group)
    table = self._kept.get(key)
    if table is None:
      with self._lock:  # one reads, and the others find it
        table = self._kept.get(key)
        if table is None:
          file = self._opened()
          table = file.read_row_group(group, columns=list(columns), use_threads=False)
          self._kept.put(key, table)
    return table.slice(index - int(self._starts[group]), 1).to_pylist()[0]

  def rows(self, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """All rows' values of some columns, in order."""
    with self._lock:
      for batch in self._opened().iter_batches(columns=list(columns)):
        yield from batch.to_pylist()

  def _opened(self):
    import pyarrow.parquet

    if self._file is None:
      path = self.shard.path
      remote = isinstance(path, RemotePath)
      # Of a remote file exactly what is needed, in few requests.
      where = path.open_exact() if remote else str(path)
      self._file = pyarrow.parquet.ParquetFile(where, pre_buffer=remote)
    return self._file

  def __getstate__(self):
    return {**self.__dict__, "_lock": None, "_file": None}

  def __setstate__(self, state):
    self.__dict__.update(state, _lock=threading.Lock())
