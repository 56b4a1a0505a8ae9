"""What every source of records agrees on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, Protocol, TypedDict

from PIL import Image

ImageLike = bytes | str | os.PathLike | Image.Image


class Record(TypedDict):
  """One document: pictures and texts that say the same.

  `images` and `texts` may be lazy: their length is known at once, an entry is read or
  drawn when it is asked for. Either may be empty, not both. Records that share `group`
  are one item. `id` is unique within the source.
  """

  id: str
  images: Sequence[ImageLike]
  texts: Sequence[str]
  group: NotRequired[str]
  split: NotRequired[str]
  meta: NotRequired[Mapping[str, Any]]


class Source(Protocol):
  """Random access to records. Threads may read at the same time."""

  def __len__(self) -> int: ...
  def __getitem__(self, index: int, /) -> Record: ...


class BadRecord(ValueError):
  """One record that cannot be used. The run goes on without it and counts it."""
