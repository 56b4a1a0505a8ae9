"""Records of files that store rows by columns: Parquet, and Arrow as `datasets` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from gcl_jax.data.columns import SPLIT_COLUMN, Columns
from gcl_jax.paths import AnyPath, is_remote, stamp
from gcl_jax.data.index_cache import Index, cache_file, read_index, write_index
from gcl_jax.data.picture_folder import PictureFolder, Pictures
from gcl_jax.data.record import BadRecord, Record
from gcl_jax.data.settings import DataSettings
from gcl_jax.data.shards import Shard
from gcl_jax.data.splits import choose_rows, group_hash, stored_eval_split
from gcl_jax.errors import UserError

_VERSION = 1  # raise it when what an index holds changes
_ROW = np.dtype([("split", "<i2"), ("group", "<u8")])
_PROBES = 4  # each may cost a row group


class ColumnFile(Protocol):
  """One file of rows. Threads may read at the same time; it can be pickled."""

  shard: Shard
  num_rows: int
  column_types: Mapping[str, Any]  # pyarrow's types by the names of columns

  def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]: ...
  def rows(self, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]: ...


class ColumnarSource:
  """The rows of one split of several files.

  The image column holds encoded bytes, `{"bytes": ..., "path": ...}` as `datasets`
  stores pictures, a name below the folder as in a table, or a list of these; a caption
  column holds a text or a list. The split of a row is its column `split`, else its
  file's. The group is `config.data.group_column`, else the picture's name where the
  picture is not stored in the row, else the row by itself. Other columns become `meta`
  where they hold single numbers, texts or dates.

  Args:
    settings: of the config.
    split: see `choose_rows`.
    files: in order.
    folder: where named pictures are.
    where: what the rows are of, for messages.

  Raises:
    UserError: a column lacks, an unknown split, no row, no picture where it is said to
      be.
  """

  def __init__(
    self,
    settings: DataSettings,
    split: str,
    files: Sequence[ColumnFile],
    folder: AnyPath,
    where: str,
  ):
    self._columns, self._files = Columns(settings), list(files)
    for file in self._files:
      self._columns.check(file.column_types, str(file.shard.path))
    self._starts = np.cumsum([0, *(file.num_rows for file in self._files)])
    if not self._starts[-1]:
      raise UserError(f"{where} holds no row")
    self._used = [self._used_columns(file) for file in self._files]
    index = self._load_index(settings)
    self._codes, self._splits = index.rows["split"], index.splits
    self._chosen = choose_rows(
      split,
      names=index.splits,
      codes=index.rows["split"],
      groups=index.rows["group"],
      eval_fraction=settings.eval_fraction,
      where=where,
    )
    self._pictures = PictureFolder(folder, settings.image_root)
    self._probe(where)

  def __len__(self) -> int:
    return len(self._chosen)

  def __getitem__(self, index: int) -> Record:
    """The record. Raises BadRecord: neither picture nor text, or no text where one is."""
    return self._record(int(self._chosen[index]))

  def _record(self, place: int) -> Record:
    number = int(np.searchsorted(self._starts, place, side="right")) - 1
    file, index = self._files[number], place - int(self._starts[number])
    row = file.row(index, self._used[number])
    pictures, texts = self._columns.pictures(row), self._columns.texts(row)
    if not pictures and not texts:
      raise BadRecord(f"{_name(file, index)} has neither an image nor a caption")
    images = Pictures(self._pictures, pictures)
    split = self._splits[self._codes[place]]
    return self._columns.record(row, images, texts, _name(file, index), split)

  def _used_columns(self, file: ColumnFile) -> list[str]:
    import pyarrow.types as kinds

    columns = self._columns
    named = {*columns.image, *columns.caption, columns.group, columns.id, SPLIT_COLUMN}
    return [
      name
      for name, kind in file.column_types.items()
      if name in named or not (kinds.is_nested(kind) or _is_binary(kind))
    ]

  def _light_columns(self, file: ColumnFile) -> list[str]:
    """What tells the group: pictures only where they are names."""
    columns = self._columns
    light = [columns.group, columns.id]
    for name in columns.image:
      if name in file.column_types and _holds_names(file.column_types[name]):
        light.append(name)
    return [name for name in light if name in file.column_types]

  def _load_index(self, settings: DataSettings) -> Index:
    shards = [file.shard for file in self._files]
    with ThreadPoolExecutor(16 if is_remote(shards[0].path) else 1) as pool:
      stamps = list(pool.map(lambda shard: [*stamp(shard.path), shard.split], shards))
      columns = self._columns
      key = [_VERSION, stamps, columns.group, columns.id, columns.image]
      cached = cache_file("columns", shards[0].path.stem, key, settings.cache_dir)
      index = read_index(cached, _ROW)
      if index is None:
        splits = [s for part in pool.map(_splits_of, self._files) for s in part]
        names = tuple(dict.fromkeys(splits))
        rows = np.zeros(len(splits), _ROW)
        places = {name: place for place, name in enumerate(names)}
        rows["split"] = [places[name] for name in splits]
        if stored_eval_split(names) is None:  # else no split depends on them
          groups = pool.map(self._groups_of, self._files)
          rows["group"] = [group for part in groups for group in part]
        index = Index(rows, names, 0, ())
        write_index(cached, index)
    return index

  def _groups_of(self, file: ColumnFile) -> list[int]:
    light = self._light_columns(file)
    rows = file.rows(light) if light else [{}] * file.num_rows
    return [group_hash(self._group(row, _name(file, i))) for i, row in enumerate(rows)]

  def _group(self, row: Mapping[str, Any], place: str) -> str:
    try:
      pictures = self._columns.pictures(row)
    except BadRecord:
      pictures = []
    names = [name for name in pictures if isinstance(name, str)]
    return self._columns.group_of(row, names, self._columns.id_of(row, place))

  def _probe(self, where: str) -> None:
    """One message when no picture can be had at all, before anything compiles."""
    problem = ""
    for index in np.linspace(0, len(self) - 1, _PROBES).astype(int):
      try:
        images = self[index]["images"]
        if len(images) and images[0]:
          return
      except BadRecord as error:
        problem = problem or str(error)
    if problem:
      raise UserError(
        f"{where}: none of {_PROBES} rows tried can be used: {problem}. Pictures should "
        "be stored in the rows, or lie below the folder (config.data.image_root)"
      )


def _splits_of(file: ColumnFile) -> list[str]:
  if SPLIT_COLUMN not in file.column_types:
    return [file.shard.split] * file.num_rows
  stored = (row[SPLIT_COLUMN] for row in file.rows([SPLIT_COLUMN]))
  return [
    file.shard.split if split is None else str(split).strip() or file.shard.split
    for split in stored
  ]


def _name(file: ColumnFile, index: int) -> str:
  return f"{file.shard.name}/{index}"


def _is_binary(kind: Any) -> bool:
  import pyarrow.types as kinds

  return kinds.is_binary(kind) or kinds.is_large_binary(kind)


def _holds_names(kind: Any) -> bool:
  """Whether values are names of pictures, or lists of such."""
  import pyarrow.types as kinds

  if kinds.is_list(kind) or kinds.is_large_list(kind):
    kind = kind.value_type
  return kinds.is_string(kind) or kinds.is_large_string(kind)
