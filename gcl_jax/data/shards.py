"""The files of a data set that comes in several: folders, patterns, names of splits."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from gcl_jax.paths import AnyPath, RemotePath, as_path, is_remote
from gcl_jax.data.settings import nearest
from gcl_jax.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)$")
_SPLIT = re.compile(
  r"(?:^|[-_.])(train|training|valid|validation|val|dev|test|eval)(?=[-_.\d]|$)", re.I
)
_SAME = {"training": "train", "valid": "validation"}


class Shard(NamedTuple):
  """One file. `name` tells it from the others: its path below what they share."""

  path: AnyPath
  name: str
  split: str  # as file and folder names say; "" where they say nothing


def find_shards(
  given: str, suffixes: Sequence[str], *, compressed: Sequence[str] = ()
) -> list[Shard]:
  """The files that a path stands for, sorted by name.

  Args:
    given: a file, a folder (searched with its subfolders), or a pattern of `{000..012}`,
      `{a,b}`, `*`, `?`, `**`.
    suffixes: of the files wanted, in lower case; the first serves in messages.
    compressed: suffixes of the same in a compressed form, which are refused by name.

  Raises:
    UserError: nothing there, a file of a range is missing, or one is compressed.
  """
  if not given:
    raise UserError(
      f"config.data.path is empty; set it (or --data) to a folder of {suffixes[0]} "
      f"files, to one of them, or to a pattern such as data/{{000..012}}{suffixes[0]}"
    )
  parts = expand_braces(given)
  found = list(dict.fromkeys(itertools.chain(*(_files(p, suffixes) for p in parts))))
  packed = [p for p in found if str(p).lower().endswith(tuple(compressed))]
  wanted = [p for p in found if str(p).lower().endswith(tuple(suffixes))]
  if packed and (not wanted or len(parts) > 1 or len(found) == 1):
    raise UserError(
      f"{packed[0]} is compressed, so that no record can be reached without reading all "
      f"before it; unpack it to {suffixes[0]}"
    )
  if not wanted:
    there = sorted(p.name for p in found)[:10]
    raise UserError(
      f"{given}: there is no {suffixes[0]} file"
      + (f", only {', '.join(there)}" if there else "")
      + "; set config.data.path (or --data) to them, and config.data.source to what "
      "they are"
    )
  root = os.path.commonpath([_place(path.parent) for path in wanted])
  return [_shard(path, root) for path in wanted]


def expand_braces(pattern: str) -> list[str]:
  """`a{01..03}` to a01, a02, a03; `{x,y}` to x, y; as a shell does, in order."""
  braces = _BRACES.search(pattern)
  if braces is None:
    return [pattern]
  inside = braces[1]
  if numbers := _RANGE.match(inside):
    first, last = numbers[1], numbers[2]
    width = len(first) if first.startswith("0") else 0
    step = 1 if int(first) <= int(last) else -1
    choices = [
      str(n).zfill(width) for n in range(int(first), int(last) + step, step)
    ]
  elif "," in inside:
    choices = inside.split(",")
  else:
    raise UserError(
      f"{pattern}: {{{inside}}} is no range; write {{000..012}} or {{train,val}}"
    )
  head, tail = pattern[: braces.start()], pattern[braces.end() :]
  return [head + choice + rest for choice in choices for rest in expand_braces(tail)]


def split_in_name(name: str) -> str:
  """The split that a file's name, else a folder's above it, begins a word with; or ""."""
  for part in reversed(re.split(r"[/\\]", name)):
    if found := _SPLIT.search(part):
      said = found[1].lower()
      return _SAME.get(said, said)
  return ""


def _files(part: str, suffixes: Sequence[str]) -> list[AnyPath]:
  path = as_path(part)
  if glob.has_magic(part):
    if isinstance(path, RemotePath):
      return path.glob_self()
    return [as_path(p) for p in sorted(glob.glob(str(path), recursive=True))]
  if path.is_dir():
    if isinstance(path, RemotePath):
      return path.walk()
    return sorted(p for p in path.rglob("*") if p.is_file())
  if path.is_file():
    return [path]
  near = ""
  if path.parent.is_dir():
    names = [p.name for p in path.parent.iterdir() if p.suffix in suffixes]
    near = nearest(path.name, names).rstrip(".")
  raise UserError(f"there is no {path}{near}; set config.data.path (or --data)")


def _place(path: AnyPath) -> str:
  return "/" + str(path).partition("://")[2] if is_remote(path) else str(path)


def _shard(path: AnyPath, root: str) -> Shard:
  relative = os.path.relpath(_place(path), root).replace(os.sep, "/")
  name = relative[: -len(path.suffix)] if path.suffix else relative
  return Shard(path, name, split_in_name(relative))
