"""An index's manifest, read back; it may have been damaged or edited since."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gcl_jax.errors import UserError
from gcl_jax.retrieval.store_format import DTYPES, FORMAT, MANIFEST, SETTINGS

_FIELDS = {
  "dimension": int,
  "dtype": str,
  "model": dict,
  "data": dict,
  "split": str,
  "rows": int,
  "modalities": dict,
  "bad_count": int,
  "bad": list,
  "shards": list,
}
_SHARD = {
  "rows": int,
  "vectors_bytes": int,
  "vectors_sha256": str,
  "documents_bytes": int,
  "documents_sha256": str,
}
_FAISS = {"factory": str, "search": str, "bytes": int, "sha256": str}


def read_manifest(folder: Path) -> dict[str, Any]:
  """The manifest of a whole index, every field that the code reads checked.

  Raises:
    UserError: no index is there, it is not whole, its manifest cannot be read, is of
      another version, or damaged.
  """
  path = folder / MANIFEST
  if not path.is_file():
    if (folder / SETTINGS).is_file():
      raise UserError(
        f"the index {folder} is not whole: run the command that started it again; it "
        "goes on where it was."
      )
    raise UserError(
      f"{folder} holds no index (no {MANIFEST}): make one with python -m gcl_jax.embed "
      f"--output={folder}."
    )
  try:
    manifest = json.loads(path.read_text())
    version = manifest["format"]
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(
      f"{path} cannot be read ({type(error).__name__}: {error}): restore it from a copy, "
      "or delete it and run embed again."
    ) from error
  if version != FORMAT:
    raise UserError(
      f"{path} is of format {version!r}, this version reads {FORMAT}: use the version of "
      "gcl_jax that wrote it."
    )
  _check(path, manifest)
  return manifest


def _check(path: Path, manifest: Mapping[str, Any]) -> None:
  _check_fields(path, "", manifest, _FIELDS)
  if manifest["dtype"] not in DTYPES:
    raise _damaged(path, "dtype", manifest["dtype"])
  if "checkpoint" in manifest:
    _check_fields(path, "", manifest, {"checkpoint": str})
  counts = manifest["modalities"]
  _check_fields(path, "modalities.", counts, dict.fromkeys(counts, int))
  for k, shard in enumerate(manifest["shards"]):
    _check_fields(path, f"shards[{k}].", shard, _SHARD)
  for k, bad in enumerate(manifest["bad"]):
    _check_fields(path, f"bad[{k}].", bad, {"id": str, "reason": str})
  if "faiss" in manifest:
    _check_fields(path, "faiss.", manifest["faiss"], _FAISS)


def _check_fields(
  path: Path, where: str, about: Any, fields: Mapping[str, type]
) -> None:
  """Each there and of its type; whole numbers no less than 0."""
  if not isinstance(about, dict):
    raise _damaged(path, where.rstrip("."), about)
  for name, kind in fields.items():
    value = about.get(name)
    if type(value) is not kind or (kind is int and value < 0):
      raise _damaged(path, f"{where}{name}", value)


def _damaged(path: Path, where: str, value: Any) -> UserError:
  return UserError(
    f"{path} is damaged ({where} is {repr(value)[:40]}): restore it from a copy, or "
    "delete it and run embed again."
  )
