"""A small processor, and a cache of indexes that is not the user's."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from gcl_jax.processing import Processor, Tokenizer, default_clip_processor

SIDE = 16


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
  """Indexes of tables go to a folder of this test."""
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
  return folder


@pytest.fixture(scope="session")
def processor() -> Processor:
  """Pictures of 16 x 16 pixels and a vocabulary of bytes, at most 20 tokens."""
  return default_clip_processor(SIDE, Tokenizer.train(["a b"], 514, 20))


class FakeBucket(MemoryFileSystem):
  """A `gs://` that lives in memory, and counts the bytes that it gives out."""

  protocol = ("gs",)
  store: ClassVar[dict] = {}
  pseudo_dirs: ClassVar[list] = [""]
  ranges: ClassVar[list] = []
  opened: ClassVar[list] = []

  @classmethod
  def _strip_protocol(cls, path):
    path = str(path).removeprefix("gs://").strip("/")
    return f"/{path}" if path else ""

  def cat_file(self, path, start=None, end=None, **kwargs):
    raw = super().cat_file(path, start=start, end=end, **kwargs)
    self.ranges.append((path, len(raw)))
    return raw

  def _open(self, path, mode="rb", **kwargs):
    self.opened.append(path)
    return super()._open(path, mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch):
  """A function: copies a folder into a `gs://` without a network; gives its address."""
  for name in ("store", "pseudo_dirs", "ranges", "opened"):
    empty = {} if name == "store" else [""] if name == "pseudo_dirs" else []
    monkeypatch.setattr(FakeBucket, name, empty)
  monkeypatch.setitem(_registry, "gs", FakeBucket)

  def upload(folder) -> str:
    store = FakeBucket()
    for file in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
      store.pipe_file(f"/bucket/data/{file.relative_to(folder)}", file.read_bytes())
    FakeBucket.ranges.clear()
    FakeBucket.opened.clear()
    return "gs://bucket/data"

  return upload
