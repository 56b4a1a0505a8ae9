"""Folders of Hugging Face's `datasets`, read without that library."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gcl_jax.data.columnar import ColumnarSource
from gcl_jax.paths import AnyPath, RemotePath, as_path
from gcl_jax.data.parquet import SUFFIXES, parquet_source
from gcl_jax.data.settings import DataSettings, nearest
from gcl_jax.data.shards import Shard, find_shards
from gcl_jax.errors import UserError

_DICT, _STATE, _CARD = "dataset_dict.json", "state.json", "README.md"


def open_huggingface(settings: DataSettings, split: str) -> ColumnarSource:
  """The rows of one split of a folder that `datasets` or the hub made.

  One of: what `save_to_disk` writes of a DatasetDict or a Dataset; a folder of
  `datasets`' cache; a snapshot of a hub repository with Parquet files, whose card or
  file names tell the splits (of several configurations `config.data.table` names one).
  Arrow files are mapped into memory, so they must be on this machine.

  Raises:
    UserError: nothing of the kind there, and what `ColumnarSource` raises.
  """
  if not settings.path:
    raise UserError(
      "config.data.path is empty; set it (or --data) to a folder that save_to_disk "
      "wrote, or to a snapshot of a hub repository"
    )
  folder = as_path(settings.path)
  if not folder.is_dir():
    raise UserError(f"there is no folder {folder}; set config.data.path (or --data)")
  shards = _arrow_shards(folder)
  if shards:
    if isinstance(folder, RemotePath):
      raise UserError(
        f"{folder} holds Arrow files, which are read in place from a disk of this "
        "machine: copy the folder here, or save it with to_parquet and set "
        "config.data.source=parquet"
      )
    files = [ArrowRows(shard) for shard in shards]
    return ColumnarSource(settings, split, files, folder, settings.path)
  return parquet_source(settings, split, _parquet_shards(folder, settings), folder)


def _arrow_shards(folder: AnyPath) -> list[Shard]:
  """The Arrow files of a folder in order; none where it holds something else."""
  if (folder / _DICT).is_file():
    names = _read_json(folder / _DICT).get("splits", [])
    return [
      Shard(shard.path, f"{name}/{shard.name}", name)
      for name in names
      for shard in _saved(folder / name)
    ]
  if (folder / _STATE).is_file():
    return _saved(folder)
  found = [p for p in folder.iterdir() if p.suffix == ".arrow"]
  if any(not p.name.startswith("cache-") for p in found):  # those hold intermediate steps
    found = [p for p in found if not p.name.startswith("cache-")]
    return [s for s in find_shards(str(folder), (".arrow",)) if s.path in found]
  return []


def _saved(folder: AnyPath) -> list[Shard]:
  """What `save_to_disk` wrote of one Dataset, which has no split of its own."""
  if not (folder / _STATE).is_file():
    raise UserError(f"{folder} has no {_STATE}: it was not written whole; save it again")
  state = _read_json(folder / _STATE)
  if state.get("_indices_data_files"):
    raise UserError(
      f"{folder} was saved with a list of indices by an old version of datasets; load "
      "it there, call flatten_indices(), and save it again"
    )
  paths = [folder / entry["filename"] for entry in state.get("_data_files", [])]
  missing = [path for path in paths if not path.is_file()]
  if missing:
    raise UserError(f"there is no {missing[0]}, which {_STATE} beside it names")
  return [Shard(path, path.stem, "") for path in paths]


def _parquet_shards(folder: AnyPath, settings: DataSettings) -> list[Shard]:
  patterns = _card_patterns(folder, settings.table)
  if patterns:
    return [
      shard._replace(split=split)
      for split, pattern in patterns
      for shard in find_shards(f"{folder}/{pattern}", SUFFIXES)
    ]
  try:
    return find_shards(str(folder), SUFFIXES)
  except UserError:
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:10])
    raise UserError(
      f"{folder} holds neither what save_to_disk writes nor Parquet files (there: "
      f"{there or 'nothing'}); set config.data.path to such a folder, or "
      "config.data.source to what it is"
    ) from None


def _card_patterns(folder: AnyPath, wanted: str) -> list[tuple[str, str]]:
  """(split, pattern) of one configuration of a dataset card; [] where it tells none."""
  configs = [c for c in _card(folder).get("configs") or [] if c.get("data_files")]
  names = [str(c.get("config_name", "default")) for c in configs]
  if not configs:
    return []
  if wanted in names:
    config = configs[names.index(wanted)]
  elif wanted or (len(configs) > 1 and "default" not in names):
    said = f'has no configuration "{wanted}"' if wanted else "has several configurations"
    raise UserError(
      f"{folder} {said}{nearest(wanted, names) if wanted else ''}: name one of "
      f"{', '.join(names)} in config.data.table"
    )
  else:
    config = configs[names.index("default") if "default" in names else 0]
  files = config["data_files"]
  if isinstance(files, (str, list)) and not any(isinstance(f, dict) for f in files):
    files = {"train": files}
  if isinstance(files, dict):
    files = [{"split": split, "path": path} for split, path in files.items()]
  return [
    (str(entry["split"]), str(pattern))
    for entry in files
    for pattern in ([entry["path"]] if isinstance(entry["path"], str) else entry["path"])
  ]


def _card(folder: AnyPath) -> Mapping[str, Any]:
  """The fields at the head of a dataset card."""
  import yaml

  if not (folder / _CARD).is_file():
    return {}
  parts = (folder / _CARD).read_text().split("---\n", 2)
  if len(parts) < 3 or parts[0].strip():
    return {}
  try:
    fields = yaml.safe_load(parts[1])
  except yaml.YAMLError as error:
    raise UserError(f"the head of {folder / _CARD} is no YAML: {error}") from error
  return fields if isinstance(fields, dict) else {}


def _read_json(path: AnyPath) -> Mapping[str, Any]:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read: {error}") from error


class ArrowRows:
  """The rows of one Arrow file, mapped into memory. UserError when it is none."""

  def __init__(self, shard: Shard):
    self.shard = shard
    self._lock, self._batches = threading.Lock(), None
    try:
      batches = self._opened()
      schema = self._schema
    except (OSError, ValueError) as error:
      raise UserError(f"{shard.path} cannot be read as Arrow: {error}") from error
    self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
    self.num_rows = int(self._starts[-1])
    self.column_types = dict(zip(schema.names, schema.types, strict=True))

  def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]:
    """One row's values."""
    number = int(np.searchsorted(self._starts, index, side="right")) - 1
    batch, inside = self._opened()[number], index - int(self._starts[number])
    return {name: batch.column(name)[inside].as_py() for name in columns}

  def rows(self, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """All rows' values of some columns, in order."""
    for batch in self._opened():
      yield from batch.select(list(columns)).to_pylist()

  def _opened(self) -> list[Any]:
    import pyarrow as pa

    if self._batches is None:
      with self._lock:
        if self._batches is None:
          file = pa.memory_map(str(self.shard.path))
          reader = pa.ipc.open_stream(file)
          self._schema = reader.schema
          self._batches = list(reader)
    return self._batches

  def __getstate__(self):
    return {**self.__dict__, "_lock": None, "_batches": None, "_schema": None}

  def __setstate__(self, state):
    self.__dict__.update(state, _lock=threading.Lock())
