"""A file that threads read at any place, and that can be pickled."""

from __future__ import annotations

import os
import threading

from gcl_jax.paths import AnyPath, RemotePath, as_path, is_remote


class RandomFile:
  """Opens when first read, once per process; closes with the object.

  Of a remote file each read is one request for a range.
  """

  def __init__(self, path: str | os.PathLike | AnyPath):
    self.path = str(path)
    self._lock = threading.Lock()
    self._file = None
    self._remote: RemotePath | None = as_path(self.path) if is_remote(path) else None

  def read(self, offset: int, length: int) -> bytes:
    """The bytes there; fewer at the file's end. OSError when it cannot be read."""
    if self._remote is not None:
      return self._remote.read_range(offset, length)
    if self._file is None:
      with self._lock:
        if self._file is None:
          self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (see __del__)
    if hasattr(os, "pread"):
      return self._pread(offset, length)
    with self._lock:  # Windows has no read that leaves the shared position alone
      self._file.seek(offset)
      return self._file.read(length)

  def _pread(self, offset: int, length: int) -> bytes:
    parts = []
    while length > 0:  # one call returns at most 2 GiB, or less on some file systems
      part = os.pread(self._file.fileno(), length, offset)
      if not part:
        break
      parts.append(part)
      offset, length = offset + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)

  def __reduce__(self):
    return (RandomFile, (self.path,))

  def __del__(self):
    if getattr(self, "_file", None) is not None:
      self._file.close()
