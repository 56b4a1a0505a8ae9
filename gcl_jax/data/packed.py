"""Packed shards as a source of records."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.paths import AnyPath, RemotePath, as_path, is_remote, size_of, stamp
from gcl_jax.data.index_cache import cache_folder
from gcl_jax.data.packed_format import (
  FORMAT,
  MANIFEST,
  ShardIndex,
  decode_index,
  decode_record,
  index_name,
  shard_name,
)
from gcl_jax.data.record import BadRecord, Record
from gcl_jax.data.settings import DataSettings
from gcl_jax.data.splits import choose_rows
from gcl_jax.errors import UserError


class PackedSource:
  """The records of one split of what `python -m gcl_jax.data.pack` wrote.

  Groups and splits are those of the source that was packed. Shards of a bucket are
  copied to `config.data.cache_dir` when first asked for: in random order every shard is
  wanted within a few batches, and a copy is a hundred times the speed of single reads.
  Threads may read at the same time, and it can be pickled.

  Raises:
    UserError: nothing packed there, packing is not finished, a shard is missing or cut,
      no room for the copies, an unknown split.
  """

  def __init__(self, settings: DataSettings, split: str):
    folder = _folder(settings)
    count = read_manifest(folder)["shards"]
    self._paths = [folder / shard_name(k, count) for k in range(count)]
    self._readers: list[Any] = [None] * count
    self._locks = [threading.Lock() for _ in range(count)]
    remote = is_remote(folder)
    with ThreadPoolExecutor(16 if remote else 1) as pool:
      indexes = list(pool.map(lambda k: _checked_index(folder, k, count), range(count)))
    self._cache = cache_folder(settings.cache_dir) / "shards" if remote else None
    if self._cache is not None:
      _check_room(self._cache, sum(index.size for index in indexes))
    self._starts = np.cumsum([0, *(len(index.groups) for index in indexes)])
    codes, self._splits = _joined(indexes)
    self._codes = codes
    self._chosen = choose_rows(
      split,
      names=self._splits,
      codes=codes,
      groups=np.concatenate([index.groups for index in indexes]),
      eval_fraction=settings.eval_fraction,
      where=str(folder),
    )

  def __len__(self) -> int:
    return len(self._chosen)

  def __getitem__(self, index: int) -> Record:
    """The record; its pictures are bytes. Raises BadRecord: the shard is damaged."""
    place = int(self._chosen[index])
    shard = int(np.searchsorted(self._starts, place, side="right")) - 1
    inside = place - int(self._starts[shard])
    reader = self._readers[shard] or self._open(shard)
    try:
      (raw,) = reader.read([inside])
    except (RuntimeError, IndexError, ValueError) as error:
      raise BadRecord(f"{self._paths[shard]}, record {inside}: {error}") from error
    record = decode_record(raw)
    if split := self._splits[self._codes[place]]:
      record["split"] = split
    return record

  def _open(self, shard: int) -> Any:
    from array_record.python import array_record_module

    with self._locks[shard]:
      if self._readers[shard] is None:
        path = self._paths[shard]
        if isinstance(path, RemotePath):
          path = _copied(path, self._cache)
        reader = array_record_module.ArrayRecordReader(
          str(path), options="readahead_buffer_size:0", file_reader_buffer_size=32768
        )
        expected = int(self._starts[shard + 1] - self._starts[shard])
        if reader.num_records() != expected:  # it raises nothing by itself
          raise UserError(
            f"{path} is damaged: {reader.num_records()} records and not {expected}. "
            "Remove it and pack again: only what is missing is written"
          )
        self._readers[shard] = reader
    return self._readers[shard]

  def __getstate__(self):
    return {**self.__dict__, "_readers": None, "_locks": None}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._readers = [None] * len(self._paths)
    self._locks = [threading.Lock() for _ in self._paths]


def read_manifest(folder: AnyPath) -> dict[str, Any]:
  """The manifest of packed data. Raises UserError: none there, or of another format."""
  path = folder / MANIFEST
  if not path.is_file():
    raise UserError(
      f"there is no {path}: pack a source with python -m gcl_jax.data.pack, and set "
      "config.data.path (or --data) to its output"
    )
  try:
    manifest = json.loads(path.read_bytes())
    found = manifest["format"]
    int(manifest["shards"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} is no manifest of packed data ({error!r})") from error
  if found != FORMAT:
    raise UserError(
      f"{path} says format {found}, and this version reads {FORMAT}; pack again"
    )
  return manifest


def read_shard_index(folder: AnyPath, number: int, count: int) -> ShardIndex:
  """The index of one shard. Raises UserError when it cannot be read."""
  path = folder / index_name(number, count)
  try:
    return decode_index(path.read_bytes())
  except (OSError, ValueError) as error:
    raise UserError(
      f"{path} cannot be read ({error}); remove the shard beside it and pack again: only "
      "what is missing is written"
    ) from error


def _folder(settings: DataSettings) -> AnyPath:
  if not settings.path:
    raise UserError(
      "config.data.path is empty; set it (or --data) to the output of python -m "
      "gcl_jax.data.pack"
    )
  folder = as_path(settings.path)
  return folder.parent if folder.name == MANIFEST else folder


def _checked_index(folder: AnyPath, number: int, count: int) -> ShardIndex:
  path = folder / shard_name(number, count)
  if not path.is_file():
    raise UserError(
      f"packing is not finished: there is no {path}. Run the same command again: it "
      "writes what is missing"
    )
  index = read_shard_index(folder, number, count)
  if (size := size_of(path)) != index.size:
    raise UserError(
      f"{path} is damaged: {size:,} bytes and not {index.size:,}. Remove it and pack "
      "again: only what is missing is written"
    )
  return index


def _joined(indexes: list[ShardIndex]) -> tuple[np.ndarray, tuple[str, ...]]:
  names: dict[str, int] = {}
  codes = []
  for index in indexes:
    places = [names.setdefault(name, len(names)) for name in index.splits]
    codes.append(np.array(places, np.int16)[index.codes])
  return np.concatenate(codes), tuple(names)


def _check_room(cache: Path, needed: int) -> None:
  folder = cache
  while not folder.exists():
    folder = folder.parent
  there = sum(p.stat().st_size for p in cache.glob("*.array_record"))
  free = shutil.disk_usage(folder).free
  if needed - there > free:
    raise UserError(
      f"the shards are copied to {cache}, which has {free / 1e9:.1f} GB left for "
      f"{needed / 1e9:.1f} GB; set config.data.cache_dir to a larger disk"
    )


def _copied(path: RemotePath, cache: Path) -> Path:
  """The shard on this machine, whole. Several processes may ask at once."""
  digest = hashlib.sha256(json.dumps(stamp(path)).encode()).hexdigest()[:24]
  target = cache / f"{path.stem}-{digest}.array_record"
  if not target.is_file():
    cache.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=cache, prefix=target.name)
    os.close(handle)
    try:
      path.fetch(Path(part))
      os.replace(part, target)
    except BaseException:
      os.unlink(part)
      raise
  return target
