"""Tables as files: JSON lines, JSON arrays, CSV and TSV.

Each format can be scanned once from the start, which yields where every row lies, and
then gives any row by its place.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from gcl_jax.paths import AnyPath, open_file, stamp
from gcl_jax.data.random_access import RandomFile
from gcl_jax.data.record import BadRecord
from gcl_jax.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_MAX_QUOTED = 1 << 17  # bytes of one quoted record; more is a quote that never closes

Row = Mapping[str, Any]


class Line(NamedTuple):
  """One row of a table, or why it is none."""

  number: int  # of its first line in the file, from 1; its place in an array, from 0
  offset: int
  length: int
  row: Row | None
  error: str


class Table(Protocol):
  """A table file."""

  columns: tuple[str, ...] | None  # where the file has a header

  def scan(self) -> Iterator[Line]: ...
  def read(self, offset: int, length: int) -> Row: ...


def open_table(path: AnyPath) -> Table:
  """The table in a file, by its suffix; `.json` holds an array or JSON lines.

  Raises:
    UserError: an unknown suffix, an empty file, or not such a file at all.
  """
  suffix = path.suffix.lower()
  if suffix not in SUFFIXES:
    raise UserError(f"{path} is no table that can be read: use {', '.join(SUFFIXES)}")
  try:
    with open_file(path) as file:
      start = file.read(4096)
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
  if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
    raise UserError(f"{path} is UTF-16; save it as UTF-8")
  start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
  if not start:
    raise UserError(f"{path} is empty; it should hold one row per image-caption record")
  if suffix in (".csv", ".tsv"):
    return DelimitedTable(path, "," if suffix == ".csv" else "\t")
  if suffix == ".json" and start[:1] == b"[":
    return JsonArrayTable(path)
  return JsonLinesTable(path)


def _object(raw: bytes | str) -> Row:
  try:
    row = json.loads(raw)
  except (ValueError, RecursionError) as error:
    raise BadRecord(f"not JSON ({error})") from error
  if not isinstance(row, dict):
    raise BadRecord(f"JSON, but a {type(row).__name__} and not an object")
  return row


class JsonLinesTable:
  """One JSON object a line; blank lines are passed over."""

  columns = None

  def __init__(self, path: AnyPath):
    self._path, self._file = path, RandomFile(path)

  def scan(self) -> Iterator[Line]:
    offset = 0
    with open_file(self._path) as file:
      for number, raw in enumerate(file, start=1):
        if raw.strip():
          try:
            yield Line(number, offset, len(raw), _object(raw), "")
          except BadRecord as error:
            yield Line(number, offset, len(raw), None, str(error))
        offset += len(raw)

  def read(self, offset: int, length: int) -> Row:
    return _object(self._file.read(offset, length))


class JsonArrayTable:
  """A JSON array of objects, held in memory whole; an offset is a place in it."""

  columns = None

  def __init__(self, path: AnyPath):
    self._rows = _array(path, *stamp(path)[1:])

  def scan(self) -> Iterator[Line]:
    for place, row in enumerate(self._rows):
      if isinstance(row, dict):
        yield Line(place, place, 0, row, "")
      else:
        yield Line(place, place, 0, None, f"a {type(row).__name__} and not an object")

  def read(self, offset: int, length: int) -> Row:
    del length
    return self._rows[offset]


@functools.lru_cache(maxsize=1)  # the splits of one table share its rows
def _array(path: AnyPath, size: int, changed: int | str) -> list[Any]:
  del size, changed  # parts of the key
  try:
    rows = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise UserError(
      f"{path} is not JSON ({error}). An array [{{...}}, ...] is needed, or one object "
      "a line"
    ) from error
  if not isinstance(rows, list):
    raise UserError(f"{path} holds no JSON array of objects")
  return rows


class DelimitedTable:
  """CSV or TSV with a header line; quoted fields may hold separators and new lines.

  A quote that never closes costs one row: the line is read again with its quotes taken
  as they are, and is bad only where that does not give the header's number of fields.
  """

  def __init__(self, path: AnyPath, delimiter: str):
    self._path, self._file, self._delimiter = path, RandomFile(path), delimiter
    with open_file(path) as file:
      raw = file.readline().removeprefix(b"\xef\xbb\xbf")
      self._body = file.tell()
    try:
      self.columns: tuple[str, ...] = tuple(
        name.strip() for name in self._split(raw.decode(), strict=True)
      )
    except (ValueError, csv.Error) as error:
      raise UserError(
        f"the header of {path} cannot be read ({error}); its first line should name "
        "the columns"
      ) from error

  def scan(self) -> Iterator[Line]:
    offset, number = self._body, 2
    with open_file(self._path) as file:
      file.seek(offset)
      while raw := file.readline():
        lines, fields = 1, None
        row, error = None, ""
        if b'"' in raw:
          raw, lines, fields = self._to_closing_quote(file, raw)
          file.seek(offset + len(raw))  # it looks ahead
        if raw.strip():
          try:
            row = self._row(raw, fields)
          except BadRecord as problem:
            error = str(problem)
          yield Line(number, offset, len(raw), row, error)
        offset, number = offset + len(raw), number + lines

  def read(self, offset: int, length: int) -> Row:
    return self._row(self._file.read(offset, length))

  def _to_closing_quote(
    self, file, first: bytes
  ) -> tuple[bytes, int, list[str] | None]:
    """The record that begins with the line `first`: bytes, lines, fields if closed."""
    raw, lines, more = first, 1, first
    while True:
      if b'"' in more:
        try:
          return raw, lines, self._split(raw.decode(), strict=True)
        except UnicodeDecodeError:
          return first, 1, None
        except csv.Error as error:
          if "unexpected end of data" not in str(error):
            return first, 1, None
      more = file.readline()
      if not more or len(raw) > _MAX_QUOTED:
        return first, 1, None
      raw, lines = raw + more, lines + 1

  def _row(self, raw: bytes, fields: list[str] | None = None) -> Row:
    if fields is None:
      try:
        text = raw.decode()
      except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 ({error.reason})") from error
      try:
        fields = self._split(text, strict=True)
      except csv.Error:
        fields = self._split_loosely(text)
    if len(fields) != len(self.columns):
      raise BadRecord(f"{len(fields)} fields, the header has {len(self.columns)}")
    return dict(zip(self.columns, fields, strict=True))

  def _split(self, text: str, *, strict: bool) -> list[str]:
    quoting = csv.QUOTE_MINIMAL if strict else csv.QUOTE_NONE
    lines = [text.rstrip("\r\n")]
    return next(
      csv.reader(lines, delimiter=self._delimiter, strict=strict, quoting=quoting), []
    )

  def _split_loosely(self, text: str) -> list[str]:
    try:
      return self._split(text, strict=False)
    except csv.Error as error:
      raise BadRecord(f"not a row ({error})") from error


def describe(line: Line, path: AnyPath) -> str:
  """A short message for a line that is no row."""
  return f"{path.name} line {line.number}: {line.error}"
