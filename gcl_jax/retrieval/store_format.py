"""The files of an index: their names, and what stands in them.

settings.json               what it is made from and how; there from the start
vectors-00000.npy           (n, D) float16 or float32 unit rows of one shard
documents-00000.parquet     what each row is: id, modality, text, image, record, picture
manifest.json               settings, counts, bad records, checksums; written last
faiss.index                 an approximate index over the same rows, where one was built
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 1
SETTINGS = "settings.json"
MANIFEST = "manifest.json"
FAISS_FILE = "faiss.index"
MODALITIES = ("image", "text", "fused")  # index 0, 1, 2
DTYPES = ("float32", "float16")
SHARD_KEY = b"gcl_jax"  # of a Parquet file's metadata


class Document(NamedTuple):
  """What one row of an index stands for.

  `image` is the picture's path where it is a file; `record` and `picture` find it again
  in the source, whatever that is (-1: no picture).
  """

  id: str
  modality: int  # in MODALITIES
  text: str | None
  image: str | None
  record: int
  picture: int


class Bad(NamedTuple):
  """A record, or a part of one, that is not in the index."""

  id: str
  reason: str


def vectors_name(shard: int) -> str:
  return f"vectors-{shard:05d}.npy"


def documents_name(shard: int) -> str:
  return f"documents-{shard:05d}.parquet"


def checksum(path: Path) -> str:
  """SHA-256 of a file."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: Any) -> str:
  return json.dumps(value, indent=1, sort_keys=True) + "\n"
