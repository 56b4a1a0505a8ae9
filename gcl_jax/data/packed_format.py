"""How packed data lies on disk: a manifest, shards, and an index beside each shard.

A shard is an ArrayRecord file with one record a group, not compressed (pictures are). A
record is four bytes, little-endian: the length of a JSON header; the header; then the
encoded pictures, one after the other.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gcl_jax.data.record import BadRecord, Record

MANIFEST = "packed.json"
FORMAT = 1  # raise it when shards are written otherwise
WRITER_OPTIONS = "group_size:1,uncompressed"
_LENGTH = struct.Struct("<I")


class ShardIndex(NamedTuple):
  """What is known of a shard without reading it."""

  groups: np.ndarray  # uint64 (records,), hashes
  codes: np.ndarray  # int16 (records,), places in `splits`
  splits: tuple[str, ...]
  size: int  # bytes of the shard
  bad: tuple[str, ...]  # messages of what was left out


def shard_name(number: int, count: int) -> str:
  """`pairs-00003-of-00128.array_record`."""
  return f"pairs-{number:05d}-of-{count:05d}.array_record"


def index_name(number: int, count: int) -> str:
  """The name of the index beside a shard."""
  return f"pairs-{number:05d}-of-{count:05d}.index.npz"


def encode_record(record: Mapping[str, Any], images: Sequence[bytes]) -> bytes:
  """The bytes of a record whose pictures are `images`."""
  header = {
    name: record[name] for name in ("id", "group", "split", "meta") if record.get(name)
  }
  header["texts"] = list(record["texts"])
  header["images"] = [len(image) for image in images]
  text = json.dumps(header, ensure_ascii=False, default=str)
  raw = text.encode("utf-8", "surrogatepass")
  return b"".join([_LENGTH.pack(len(raw)), raw, *images])


def decode_record(raw: bytes) -> Record:
  """The record again. Raises BadRecord when the bytes are none."""
  try:
    (length,) = _LENGTH.unpack_from(raw)
    at = _LENGTH.size + length
    header = json.loads(raw[_LENGTH.size : at].decode("utf-8", "surrogatepass"))
    sizes = header.pop("images")
    if at + sum(sizes) != len(raw):
      raise ValueError(f"{len(raw)} bytes")
    images = []
    for size in sizes:
      images.append(raw[at : at + size])
      at += size
    record: Record = {"meta": {}, **header, "images": images}
  except (ValueError, KeyError, TypeError, struct.error) as error:
    raise BadRecord(f"no packed record ({error})") from error
  return record


def encode_index(index: ShardIndex) -> bytes:
  """The bytes of an index file."""
  file = io.BytesIO()
  about = {"splits": index.splits, "size": index.size, "bad": index.bad}
  np.savez(
    file,
    groups=index.groups,
    codes=index.codes,
    about=np.frombuffer(json.dumps(about).encode(), np.uint8),
  )
  return file.getvalue()


def decode_index(raw: bytes) -> ShardIndex:
  """The index again. Raises ValueError when the bytes are none."""
  try:
    with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
      about = json.loads(arrays["about"].tobytes())
      return ShardIndex(
        arrays["groups"],
        arrays["codes"],
        tuple(about["splits"]),
        about["size"],
        tuple(about["bad"]),
      )
  except (KeyError, OSError, EOFError, ValueError) as error:
    raise ValueError(f"no index of a packed shard ({error})") from error
