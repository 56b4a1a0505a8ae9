"""The two numbers by which pairs of a batch are recognised as about the same thing."""

from __future__ import annotations

import hashlib

import numpy as np


def collapse(text: str) -> str:
  """A text with case folded and runs of blanks made one, to compare captions by."""
  return " ".join(text.split()).casefold()


def hash31(name: str) -> int:
  """31 bits of a name's SHA-256: the same on every machine, never negative."""
  return (
    int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:4], "big")
    & 0x7FFFFFFF
  )


def pair_ids(group: str, caption: str | None, record_id: str) -> np.ndarray:
  """int32 (2,): a hash of the group, and one of the caption.

  Pairs are neither positive nor negative to each other when either column agrees; so
  the same photo and the same caption are told apart, and the relation is not
  transitive. Without a caption the second column hashes the record's id.
  """
  said = f"id\0{record_id}" if caption is None else f"caption\0{collapse(caption)}"
  return np.array([hash31(group), hash31(said)], np.int32)


def padding_ids(position: int) -> np.ndarray:
  """int32 (2,), negative: no real id, and unique among any 2^31 records in a row."""
  return np.full(2, -1 - (position & 0x7FFFFFFF), np.int32)
