"""Indexes of sources, kept on disk between runs."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Index:
  """`rows`: one entry per usable row; its split is a place in `splits`."""

  rows: np.ndarray
  splits: tuple[str, ...]
  bad: int
  messages: tuple[str, ...]  # of the first bad rows


def cache_folder(cache_dir: str) -> Path:
  """The folder of what is kept between runs: `cache_dir`, or ~/.cache/gcl_jax."""
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return Path(cache_dir) if cache_dir else Path(home) / "gcl_jax"


def cache_file(kind: str, stem: str, key: Any, cache_dir: str) -> Path:
  """Where an index is kept: `key` (plain JSON) is all that it depends on."""
  digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
  return cache_folder(cache_dir) / kind / f"{stem}-{digest}.npy"


def read_index(file: Path, dtype: np.dtype) -> Index | None:
  """A cached index; None where there is none that can be read."""
  try:
    about = json.loads(file.with_suffix(".json").read_text())
    rows = np.load(file, mmap_mode="r", allow_pickle=False)
    if rows.dtype != dtype or len(rows) != about["rows"]:
      return None
    return Index(rows, tuple(about["splits"]), about["bad"], tuple(about["messages"]))
  except (OSError, ValueError, KeyError, TypeError):
    return None


def write_index(file: Path, index: Index) -> None:
  """Keeps an index for the next run; a disk that refuses only costs the next scan."""
  about = {
    "rows": len(index.rows),
    "splits": index.splits,
    "bad": index.bad,
    "messages": index.messages,
  }
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    _replace(file.with_suffix(".json"), lambda f: f.write(json.dumps(about).encode()))
    _replace(file, lambda f: np.save(f, index.rows, allow_pickle=False))
  except OSError:
    return


def _replace(file: Path, write) -> None:
  handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
  try:
    with os.fdopen(handle, "wb") as temporary:
      write(temporary)
    os.replace(name, file)
  except BaseException:
    os.unlink(name)
    raise
