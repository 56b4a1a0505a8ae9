"""Official folders: which file is missing, and how the folder should look."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json

from gcl_jax.errors import UserError

_BROKEN = (OSError, EOFError, zlib.error, ValueError, RecursionError)
_BLOCK = 1 << 24  # bytes; a line longer than this is no line of these files


class Files:
  """The files of one benchmark folder; remembers which were read, for the data's hash.

  A file may also be there gzipped, with `.gz` after its name.
  """

  def __init__(self, root: str | Path, benchmark: str, layout: str):
    """`layout`: the folder as it should look, lines for a message.

    Raises:
      UserError: no root, or it is no folder.
    """
    if not root:
      raise UserError(f"name the folder of {benchmark}: --root=<folder>\n{layout}")
    self.root = Path(root).expanduser()
    self._benchmark, self._layout = benchmark, layout
    self._read: dict[str, Path] = {}
    if not self.root.is_dir():
      raise UserError(
        f"--root={root} is not a folder; a folder of {benchmark} holds\n{layout}"
      )

  def find(self, *names: str) -> Path:
    """The first of these that is there. Raises UserError with the layout if none is."""
    for name in names:
      for path in (self.root / name, self.root / f"{name}.gz"):
        if path.is_file():
          self._read[name] = path
          return path
    other = f" (or {', '.join(names[1:])})" if names[1:] else ""
    raise UserError(
      f"{self.root} lacks {names[0]}{other}; a folder of {self._benchmark} holds\n"
      f"{self._layout}"
    )

  def has(self, name: str) -> bool:
    return any((self.root / n).is_file() for n in (name, f"{name}.gz"))

  def text(self, *names: str) -> str:
    path = self.find(*names)
    try:
      return _bytes(path).decode("utf-8-sig")
    except _BROKEN as error:
      raise self.bad(path, error) from error

  def json(self, *names: str) -> Any:
    path = self.find(*names)
    try:
      return json.loads(_bytes(path))
    except _BROKEN as error:
      raise self.bad(path, error) from error

  def rows(self, name: str, delimiter: str = ",") -> list[dict[str, str]]:
    """A table with a header line, as dicts. Tab-separated files have no quotes."""
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    lines = io.StringIO(self.text(name), newline="")
    try:
      return list(csv.DictReader(lines, delimiter=delimiter, quoting=quoting))
    except csv.Error as error:
      raise self.bad(self.find(name), error) from error

  def lines(self, name: str) -> list[str]:
    """The lines of a file. Only a line feed ends one: texts hold the ends of others."""
    return self.text(name).split("\n")

  def entries(self, *names: str) -> list[Any]:
    """A file that is one JSON list, not an empty one."""
    path = self.find(*names)
    if not (found := self.items(self.json(*names), path)):
      raise UserError(f"{path} holds no entries: is it the official file?")
    return found

  def items(self, value: Any, path: Path) -> list[Any]:
    """`value`, or the UserError that says that this file has no list there."""
    if not isinstance(value, list):
      raise UserError(f"{path} holds no list of entries: is it the official file?")
    return value

  def objects(self, name: str, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """A file with an object a line, each with these fields of these types."""
    out = []
    for number, line in enumerate(self.lines(name), start=1):
      if not line.strip():
        continue
      try:
        entry = json.loads(line)
      except (ValueError, RecursionError) as error:
        raise UserError(f"{self.root / name}, line {number}: {error}.") from error
      for field, kind in fields.items():
        if not isinstance(self.field(entry, field, name), kind):
          raise UserError(
            f"{self.root / name}, line {number}: {field} is not a {kind.__name__}."
          )
      out.append(entry)
    return out

  def json_lines(self, name: str, fields: dict[str, pa.DataType]) -> pa.Table:
    """These fields of a file with an object a line; null where one lacks them."""
    path = self.find(name)
    options = pa.json.ParseOptions(
      explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore"
    )
    try:
      with pa.OSFile(str(path)) if path.suffix != ".gz" else gzip.open(path) as file:
        table = pa.json.read_json(file, pa.json.ReadOptions(block_size=_BLOCK), options)
    except (*_BROKEN, pa.ArrowException) as error:
      raise self.bad(path, error) from error
    return table.select(list(fields))

  def bad(self, path: Path, error: Exception | str) -> UserError:
    return UserError(f"{path} cannot be read: {error}; download it again.")

  def field(self, entry: Any, name: str, where: str, kind: type = object) -> Any:
    """entry[name], or the UserError that says which file lacks it or has another kind."""
    value = entry.get(name) if isinstance(entry, dict) else None
    if value is None:
      raise UserError(
        f"{self.root / where}: an entry lacks {name!r}; is it the official file?"
      )
    if not isinstance(value, kind):
      raise UserError(
        f"{self.root / where}: {name} is not a {kind.__name__} in an entry; is it the "
        "official file?"
      )
    return value

  def strings(self, entry: Any, name: str, where: str) -> list[str]:
    """entry[name] where it is a list of strings; UserError as `field`."""
    values = self.field(entry, name, where, list)
    if not all(isinstance(value, str) for value in values):
      raise UserError(f"{self.root / where}: {name} is not a list of strings.")
    return values

  def digest(self) -> str:
    """SHA-256 over the names and contents of all files that were read."""
    whole = hashlib.sha256()
    for name, path in sorted(self._read.items()):
      with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        whole.update(
          f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
        )
    return whole.hexdigest()


def _bytes(path: Path) -> bytes:
  if path.suffix != ".gz":
    return path.read_bytes()
  with gzip.open(path) as file:
    return file.read()


def distinct(values: Iterable[str]) -> list[str]:
  """Each value once, in the order of first appearance."""
  return list(dict.fromkeys(values))
