"""Writes one shard of packed records, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.paths import AnyPath, RemotePath
from gcl_jax.data.pack_records import Packed
from gcl_jax.data.packed_format import (
  WRITER_OPTIONS,
  ShardIndex,
  encode_index,
  index_name,
  shard_name,
)
from gcl_jax.data.splits import ALL
from gcl_jax.errors import UserError


class ShardWriter:
  """Writes one shard and its index under other names, and renames them when whole."""

  def __init__(self, folder: AnyPath, number: int, count: int, split: str):
    self._folder, self._split = folder, split
    self._name, self._index = shard_name(number, count), index_name(number, count)
    own = f".{socket.gethostname()}-{os.getpid()}.part"
    self._temporary = None
    if isinstance(folder, RemotePath):
      self._temporary = tempfile.TemporaryDirectory(prefix="gcl_jax_pack")
    here = Path(self._temporary.name) if self._temporary else folder
    self._part = here / (self._name + own)
    self._groups: list[int] = []
    self._codes: list[int] = []
    self._splits: dict[str, int] = {}
    self.bad: list[str] = []

  def add(self, packed: Packed) -> None:
    """Appends a record, or notes why it is left out."""
    self.bad += packed.errors
    if packed.raw:
      split = packed.split or ("" if self._split == ALL else self._split)
      self._groups.append(packed.group)
      self._codes.append(self._splits.setdefault(split, len(self._splits)))
      self._call(self._writer.write, packed.raw)

  def __enter__(self) -> ShardWriter:
    from array_record.python import array_record_module

    try:
      self._part.touch()
    except OSError as error:
      raise UserError(f"--output={self._folder} cannot be written: {error}") from error
    self._writer = array_record_module.ArrayRecordWriter(
      str(self._part), WRITER_OPTIONS
    )
    return self

  def __exit__(self, kind, error, trace) -> None:
    try:
      if kind is None:
        self._call(self._writer.close)
        self._publish()
      else:
        with contextlib.suppress(RuntimeError):
          self._writer.close()
    finally:
      self._part.unlink(missing_ok=True)
      if self._temporary:
        self._temporary.cleanup()

  def _call(self, write, *arguments) -> None:
    try:
      write(*arguments)
    except RuntimeError as error:
      raise UserError(_no_room(self._part, error)) from error

  def _publish(self) -> None:
    from array_record.python import array_record_module

    # A full disk is not always said by the writer; the count tells.
    written = array_record_module.ArrayRecordReader(str(self._part)).num_records()
    if written != len(self._groups):
      raise UserError(_no_room(self._part, f"{written} of {len(self._groups)} records"))
    index = ShardIndex(
      np.array(self._groups, np.uint64),
      np.array(self._codes, np.int16),
      tuple(self._splits),
      self._part.stat().st_size,
      tuple(self.bad),
    )
    # The index first: a shard that is there is complete.
    write_file(self._folder / self._index, encode_index(index))
    if isinstance(self._folder, RemotePath):
      (self._folder / self._name).put(self._part)
    else:
      os.replace(self._part, self._folder / self._name)
      for left in self._folder.glob(f"{self._name}.*.part"):
        left.unlink(missing_ok=True)  # by a process that was killed


def _no_room(path: AnyPath, error: Any) -> str:
  return (
    f"{path} cannot be written ({error}): is the disk full? Make room and run the same "
    "command again; it goes on where it was"
  )


def write_file(path: AnyPath, content: bytes) -> None:
  """Writes a file that appears whole or not at all."""
  remote = isinstance(path, RemotePath)
  folder = None if remote else path.parent
  try:
    handle, name = tempfile.mkstemp(dir=folder, prefix=path.name, suffix=".part")
    try:
      with os.fdopen(handle, "wb") as file:
        file.write(content)
      if remote:
        path.put(Path(name))
      else:
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(name)
  except OSError as error:
    raise UserError(_no_room(path, error)) from error
