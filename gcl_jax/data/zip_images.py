"""Pictures of a zip file, read in place.

The directory is kept as arrays: `zipfile` holds an object of half a kilobyte for every
member, which for the half million pictures of the paper's training set is more than
the pictures of many a batch.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
import zlib

import numpy as np

from gcl_jax.paths import AnyPath, open_file
from gcl_jax.data.random_access import RandomFile
from gcl_jax.data.record import BadRecord
from gcl_jax.errors import UserError

_MEMBER = np.dtype(
  [
    ("name", "<u8"),
    ("offset", "<i8"),
    ("packed", "<i8"),
    ("size", "<i8"),
    ("crc", "<u4"),
    ("method", "<u2"),
    ("encrypted", "?"),
  ]
)
_MAX_BYTES = 1 << 28  # no picture file is that long; a zip bomb is
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class ZipImages:
  """The members of a zip file by name. Threads may read at the same time.

  Raises UserError when the file is not a zip.
  """

  def __init__(self, path: AnyPath):
    self._file = RandomFile(path)
    try:
      with open_file(path) as file, zipfile.ZipFile(file) as archive:
        members = [m for m in archive.infolist() if not m.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
      raise UserError(
        f"{path} cannot be read as a zip file ({error}); replace it, or unpack its "
        "pictures beside the table and move it away"
      ) from error
    rows = [
      (
        _key(m.filename),
        m.header_offset,
        m.compress_size,
        m.file_size,
        m.CRC,
        m.compress_type,
        bool(m.flag_bits & 1),
      )
      for m in members
    ]
    table = np.array(rows, _MEMBER)
    self._members = table[np.argsort(table["name"], kind="stable")]

  def __len__(self) -> int:
    return len(self._members)

  def __contains__(self, name: str) -> bool:
    return self._find(name) is not None

  def _find(self, name: str):
    key = np.uint64(_key(name))
    at = int(np.searchsorted(self._members["name"], key))
    if at == len(self._members) or self._members["name"][at] != key:
      return None
    return self._members[at]

  def read(self, name: str) -> bytes:
    """The bytes of one member.

    Raises:
      BadRecord: it is missing, damaged, encrypted, packed by an unknown method, or
        longer than any picture.
    """
    member = self._find(name)
    if member is None:
      raise BadRecord(f"{name} is not in {os.path.basename(self._file.path)}")
    size, packed = int(member["size"]), int(member["packed"])
    if max(size, packed) > _MAX_BYTES:
      raise BadRecord(f"{name} unpacks to {size:,} bytes: refused")
    if member["encrypted"]:
      raise BadRecord(f"{name} is encrypted")
    raw = self._packed_bytes(int(member["offset"]), packed, name)
    if member["method"] == zipfile.ZIP_DEFLATED:
      try:
        raw = zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, size + 1)
      except zlib.error as error:
        raise BadRecord(f"{name} is damaged in the zip: {error}") from error
    elif member["method"] != zipfile.ZIP_STORED:
      raise BadRecord(f"{name} is packed by method {member['method']}; use deflate")
    if len(raw) != size or zlib.crc32(raw) != member["crc"]:
      raise BadRecord(f"{name} is damaged in the zip: its checksum differs")
    return raw

  def _packed_bytes(self, offset: int, length: int, name: str) -> bytes:
    header = self._file.read(offset, _LOCAL_HEADER.size)
    if len(header) == _LOCAL_HEADER.size:
      mark, name_length, extra_length = _LOCAL_HEADER.unpack(header)
      if mark == b"PK\x03\x04":
        skip = _LOCAL_HEADER.size + name_length + extra_length
        return self._file.read(offset + skip, length)
    raise BadRecord(f"{name} is damaged in the zip: no header where it should start")


def _key(name: str) -> int:
  return int.from_bytes(
    hashlib.sha256(name.encode("utf-8", "replace")).digest()[:8], "little"
  )
