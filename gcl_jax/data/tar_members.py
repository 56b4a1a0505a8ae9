"""Where the members of a tar file lie. Nothing is unpacked, nothing is written.

`tarfile` makes an object of every member, at 20 to 30 microseconds each, while other
threads wait; a sample is three members, and a large set has tens of millions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

_BLOCK = 512
_FILE, _LONG_NAME, _PAX = b"0\0" b"7", b"L", b"x"
_MAX_NAME = 1 << 16


class TarError(ValueError):
  """Not a tar file, or a broken one."""


class Member(NamedTuple):
  """A regular file in a tar. Offsets are from the start of what is read."""

  name: str
  start: int  # of its first header
  data: int
  length: int
  end: int  # where the next member begins


def members(read: Callable[[int, int], bytes], size: int) -> Iterator[Member]:
  """The files of a tar in order; folders, links and devices are passed over.

  Args:
    read: (offset, length) -> bytes, fewer at the end.
    size: where the end is. A tar may end there, or at its own mark before it.

  Raises:
    TarError: it ends within a member, or a header is none.
  """
  at = start = 0
  long_name: str | None = None
  long_length: int | None = None
  while at < size:
    raw = read(at, _BLOCK)
    if len(raw) < _BLOCK:
      raise TarError(f"it ends within a header, at byte {at + len(raw):,}")
    if not any(raw[:8]) and not any(raw):
      return
    kind, name, length = _header(raw, at)
    data = at + _BLOCK
    if kind in _FILE and long_length is not None:
      length = long_length
    at = data + -(-length // _BLOCK) * _BLOCK
    if at > size:
      raise TarError(f"it ends within {long_name or name}, at byte {size:,}")
    if kind == _LONG_NAME:
      long_name = _text(read(data, min(length, _MAX_NAME)).rstrip(b"\0"))
    elif kind == _PAX:
      fields = _pax(read(data, min(length, _MAX_NAME)))
      long_name = fields.get("path", long_name)
      if "size" in fields:
        long_length = int(fields["size"])
    else:
      if kind in _FILE:
        yield Member(long_name or name, start, data, length, at)
      long_name, long_length, start = None, None, at


def _header(raw: bytes, at: int) -> tuple[bytes, str, int]:
  """Kind, name and length of the member whose header it is."""
  try:
    said = int(raw[148:156].rstrip(b"\0 ") or b"0", 8)
    if raw[124] & 0x80:  # 8 GiB and more
      length = int.from_bytes(raw[125:136], "big")
    else:
      length = int(raw[124:136].strip(b"\0 ") or b"0", 8)
  except ValueError:
    said, length = -1, 0
  if said != sum(raw) - sum(raw[148:156]) + 8 * 32:
    raise TarError(f"there is no header at byte {at:,}")
  name = raw[:100].split(b"\0", 1)[0]
  if raw[257:263] == b"ustar\0" and raw[345]:
    name = raw[345:500].split(b"\0", 1)[0] + b"/" + name
  return raw[156:157], _text(name), length


def _pax(raw: bytes) -> dict[str, str]:
  """The fields of an extended header: lines of `<length of the line> name=value`."""
  fields, at = {}, 0
  while at < len(raw):
    count, blank, _ = raw[at : at + 20].partition(b" ")
    if not blank or not count.isdigit() or int(count) < 1:
      break
    line = raw[at + len(count) + 1 : at + int(count)].rstrip(b"\n")
    name, _, value = line.partition(b"=")
    fields[_text(name)] = _text(value)
    at += int(count)
  return fields


def _text(raw: bytes) -> str:
  return raw.decode("utf-8", "replace")
