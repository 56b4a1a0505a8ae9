"""Frames of videos: decoded from files, or taken from folders of extracted frames.

A reference is `<video>#<frame>`, the video relative to a folder and without a suffix:
`<video>.mp4` (or another container) is decoded through PyAV, a folder `<video>/` holds
frames as pictures, in the order of their names.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gcl_jax.errors import UserError

_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def middle(total: int) -> int:
  """The frame in the middle, as CoVR takes it."""
  return total // 2


def spread(total: int, wanted: int) -> list[int]:
  """At most `wanted` frames: the midpoints of as many equal intervals."""
  edges = np.linspace(0, total, min(wanted, total) + 1).astype(int)
  return [int(low + high - 1) // 2 for low, high in itertools.pairwise(edges)]


class VideoPictures:
  """Frames as pictures of a benchmark."""

  chunk = 128  # decoded frames in memory together

  def __init__(self, folder: Path):
    self._folder = folder
    self._counts: dict[str, int] = {}

  def count(self, video: str) -> int:
    """How many frames a video has; 0 where it is missing or cannot be read.

    Raises:
      UserError: a video file is there but no decoder is installed.
    """
    if video not in self._counts:
      path = self._find(video)
      self._counts[video] = 0 if path is None else _count(path)
    return self._counts[video]

  def missing(self, references: Sequence[str]) -> np.ndarray:
    parts = (reference.rpartition("#") for reference in references)
    return np.array([int(n) >= self.count(video) for video, _, n in parts], bool)

  def load(self, references: Sequence[str]) -> list[Any]:
    """Every video is opened once for the frames of it that stand together."""
    out = []
    split = [reference.rpartition("#")[::2] for reference in references]
    for video, group in itertools.groupby(split, key=lambda pair: pair[0]):
      frames = [int(frame) for _, frame in group]
      path = self._find(video)
      out += [None] * len(frames) if path is None else _frames(path, frames)
    return out

  def _find(self, video: str) -> Path | None:
    place = self._folder / video
    if place.is_dir():
      return place
    for suffix in _SUFFIXES:
      path = place.with_name(place.name + suffix)
      if path.is_file():
        return path
    return None


def _pictures(folder: Path) -> list[Path]:
  with os.scandir(folder) as entries:
    names = [e.name for e in entries if e.name.lower().endswith(_PICTURES)]
  return [folder / name for name in sorted(names)]


def _count(path: Path) -> int:
  if path.is_dir():
    return len(_pictures(path))
  av = _import_av()
  try:
    with av.open(str(path)) as container:
      stream = container.streams.video[0]
      return stream.frames or sum(1 for _ in container.decode(stream))
  except (av.FFmpegError, IndexError):
    return 0


def _frames(path: Path, wanted: list[int]) -> list[Any]:
  """These frames; None for those that the file ends before."""
  if path.is_dir():
    files = _pictures(path)
    return [files[n] if n < len(files) else None for n in wanted]
  found: dict[int, Image.Image] = {}
  for number, frame in _decoded(path, max(wanted)):
    if number in wanted:
      found[number] = frame.to_image()
  return [found.get(number) for number in wanted]


def _decoded(path: Path, last: int) -> Iterator[tuple[int, Any]]:
  av = _import_av()
  try:
    with av.open(str(path)) as container:
      yield from enumerate(itertools.islice(container.decode(video=0), last + 1))
  except (av.FFmpegError, IndexError):
    return  # what was decoded stands; the rest counts as missing


def _import_av():
  try:
    import av
  except ImportError as error:
    raise UserError(
      "these videos need PyAV, which is not installed: pip install av; or extract the "
      "frames into a folder for each video, <folder>/<id>/*.jpg"
    ) from error
  return av
