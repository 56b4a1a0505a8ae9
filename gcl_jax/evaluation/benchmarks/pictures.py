"""Where a benchmark's pictures are: files in a folder, members of a zip."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gcl_jax.errors import UserError

_SUFFIXES = (".jpg", ".png", ".jpeg", ".webp")


class Pictures(Protocol):
  """References, as documents name pictures, to what an embedder takes.

  `chunk`: how many may be in memory together.
  """

  chunk: int

  def missing(self, references: Sequence[str]) -> np.ndarray:
    """(n,) bool: which are not there."""

  def load(self, references: Sequence[str]) -> list[Any]:
    """Paths, bytes or PIL images; None for one that cannot be loaded."""


class NoPictures:
  """Of a benchmark without any."""

  chunk = 4096

  def missing(self, references: Sequence[str]) -> np.ndarray:
    return np.ones(len(references), bool)

  def load(self, references: Sequence[str]) -> list[Any]:
    return [None] * len(references)


class FolderPictures:
  """Files under a folder. With `any_suffix` references lack their suffix."""

  chunk = 4096  # paths: the embedder decodes them batch by batch

  def __init__(self, folder: Path, *, any_suffix: bool = False):
    self._folder, self._names = str(folder), None
    if any_suffix:
      with os.scandir(folder) as entries:
        files = {e.name for e in entries if e.name.lower().endswith(_SUFFIXES)}
      self._names = {name.rpartition(".")[0]: name for name in sorted(files)}

  def path(self, reference: str) -> str | None:
    """Where it is, or would be; None where no file of that stem is."""
    name = reference if self._names is None else self._names.get(reference)
    return None if name is None else os.path.join(self._folder, name)

  def missing(self, references: Sequence[str]) -> np.ndarray:
    paths = map(self.path, references)
    return np.array([p is None or not os.path.isfile(p) for p in paths], bool)

  def load(self, references: Sequence[str]) -> list[Any]:
    return [self.path(reference) for reference in references]


class ZipPictures:
  """Members of a zip file, by name."""

  chunk = 512

  def __init__(self, path: Path):
    from gcl_jax.data.zip_images import ZipImages

    self._zip = ZipImages(path)

  def missing(self, references: Sequence[str]) -> np.ndarray:
    return np.array([name not in self._zip for name in references], bool)

  def load(self, references: Sequence[str]) -> list[Any]:
    from gcl_jax.data.record import BadRecord

    def read(name):
      try:
        return self._zip.read(name)
      except BadRecord:
        return None

    return [read(name) for name in references]


def find_pictures(
  folders: Sequence[Path], references: Sequence[str], *, any_suffix: bool = False
) -> FolderPictures:
  """The first folder that holds any of the references.

  Raises:
    UserError: none does; says where the first reference was looked for.
  """
  for folder in folders:
    if not folder.is_dir():
      continue
    pictures = FolderPictures(folder, any_suffix=any_suffix)
    if any(not pictures.missing([name])[0] for name in islice(references, 10_000)):
      return pictures
  first = next(iter(references), "any")
  raise UserError(
    f"no picture of this benchmark is there: {first}{'.jpg or .png' if any_suffix else ''}"
    f" and others were looked for in {', '.join(map(str, folders))}. Unpack the pictures "
    "there, or name their folder: --images=<folder>"
  )
