"""Pictures that a table names: files below its folder, or members of a zip there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from gcl_jax.paths import AnyPath, as_path, is_remote
from gcl_jax.data.record import BadRecord
from gcl_jax.data.zip_images import ZipImages

ARCHIVE = "images.zip"


class PictureFolder:
  """Where the pictures of a table are: on disk, else in the zip beside the table."""

  def __init__(self, folder: AnyPath, root: str):
    self._folder, self._root = str(folder), root.strip("/") if root else ""
    if root.startswith("/") or is_remote(root):
      self._folder, self._root = root, ""
    self._remote = is_remote(self._folder)
    archive = folder / ARCHIVE
    self._zip = ZipImages(archive) if archive.is_file() else None

  def place(self, name: str) -> str:
    """The path of a picture on disk."""
    return os.path.join(self._folder, self._root, name)

  def has(self, name: str) -> bool:
    """Whether there is such a picture."""
    if self._remote:
      return self._member(name) is not None or as_path(self.place(name)).is_file()
    return os.path.isfile(self.place(name)) or self._member(name) is not None

  def get(self, name: str) -> str | bytes:
    """The path of a picture, or its bytes. Raises BadRecord when it is missing."""
    path = self.place(name)
    if not self._remote and os.path.isfile(path):
      return path
    member = self._member(name)
    if member is not None:
      return self._zip.read(member)
    if self._remote:  # to ask first whether it is there would cost a request more
      with contextlib.suppress(FileNotFoundError):
        return as_path(path).read_bytes()
    raise BadRecord(f"{path} is not there")

  def _member(self, name: str) -> str | None:
    if self._zip is None:
      return None
    name = name.removeprefix("./")
    inside = (f"{self._root}/{name}" if self._root else name, name)
    return next((member for member in inside if member in self._zip), None)


class Pictures(Sequence):
  """The pictures of one record, found when asked for; bytes among `names` are some."""

  def __init__(self, folder: PictureFolder, names: Sequence[str | bytes]):
    self._folder, self.names = folder, names

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, k):
    if isinstance(k, slice):
      return [self._get(name) for name in self.names[k]]
    return self._get(self.names[k])

  def _get(self, name: str | bytes) -> str | bytes:
    return name if isinstance(name, bytes) else self._folder.get(name)
