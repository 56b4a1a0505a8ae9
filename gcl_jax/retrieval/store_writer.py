"""Writes an index shard by shard; after a kill it goes on with the first one missing."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.paths import is_remote, write_whole
from gcl_jax.retrieval.neighbours import check_finite
from gcl_jax.retrieval.store_format import (
  DTYPES,
  FORMAT,
  MANIFEST,
  MODALITIES,
  SETTINGS,
  SHARD_KEY,
  Bad,
  Document,
  checksum,
  documents_name,
  to_json,
  vectors_name,
)

_LISTED = 10_000  # bad records by message in the manifest; more are only counted


class IndexWriter:
  """A folder that becomes an index.

  A shard is there when its documents are: they are written last, whole, and carry the
  vectors' checksum. Several processes may write different shards of one folder.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    settings: Mapping[str, Any],
    shards: int,
    *,
    about: Mapping[str, Any] | None = None,
  ):
    """Starts the folder, or goes on with one that was started by the same settings.

    Args:
      folder: new, empty, or of the same index.
      settings: all that decides the rows, as JSON; `dtype` and `dimension` among them.
      shards: how many there will be.
      about: what the manifest says beside, and a later call may say otherwise.

    Raises:
      UserError: something else lies there, another index's settings, no permission.
    """
    if is_remote(folder):
      raise UserError(
        f"--output={folder}: an index is memory-mapped, so it lies in a folder of this "
        "machine; copy it to a store when it is whole."
      )
    self.folder = Path(folder)
    self.settings = json.loads(to_json({"format": FORMAT, **settings}))
    self.shards, self._about = shards, dict(about or {})
    if self.settings["dtype"] not in DTYPES:
      raise UserError(
        f"dtype {self.settings['dtype']!r} is none of {', '.join(DTYPES)}."
      )
    self._start()

  @property
  def complete(self) -> bool:
    """Whether the manifest is there."""
    return (self.folder / MANIFEST).is_file()

  def missing(self) -> list[int]:
    """The shards that are not there yet, ascending."""
    there = {path.name for path in self.folder.iterdir()}
    wanted = ({documents_name(k), vectors_name(k)} for k in range(self.shards))
    return [k for k, names in enumerate(wanted) if not names <= there]

  def write(
    self,
    shard: int,
    vectors: np.ndarray,
    documents: Sequence[Document],
    bad: Sequence[Bad],
  ) -> None:
    """Writes one shard.

    Args:
      vectors: (n, D) float32. documents: n of them. bad: what of its records is left out.

    Raises:
      UserError: vectors that are not finite, no room.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with np.errstate(over="ignore"):  # what float16 does not hold is refused below
      rows = np.ascontiguousarray(vectors, self.settings["dtype"])
    if rows.shape != (len(documents), self.settings["dimension"]):
      raise ValueError(f"vectors {rows.shape} for {len(documents)} documents")
    check_finite(rows, f"the model's output in shard {shard}: row")
    path = self.folder / vectors_name(shard)
    with _whole(path) as part, part.open("wb") as file:
      np.lib.format.write_array(file, rows, allow_pickle=False)
    about = {
      "rows": len(rows),
      "vectors_bytes": path.stat().st_size,
      "vectors_sha256": checksum(path),
      "bad": [list(entry) for entry in bad],
    }
    columns = list(zip(*documents, strict=True)) if documents else [[]] * 6
    names = [MODALITIES[m] for m in columns[1]]
    table = pa.table(
      {
        "id": pa.array(columns[0], pa.string()),
        "modality": pa.array(names, pa.string()),
        "text": pa.array(columns[2], pa.string()),
        "image": pa.array(columns[3], pa.string()),
        "record": pa.array(columns[4], pa.int64()),
        "picture": pa.array(columns[5], pa.int32()),
      }
    ).replace_schema_metadata({SHARD_KEY: json.dumps(about)})
    with _whole(self.folder / documents_name(shard)) as part:
      pq.write_table(table, part)

  def finish(self) -> dict[str, Any] | None:
    """Writes the manifest if all shards are there; returns it, or None."""
    if self.missing():
      return None
    shards, bad, counts, bad_count = [], [], Counter(), 0
    for k in range(self.shards):
      about, modalities, entries = self._read_shard(k)
      counts.update(modalities)
      bad_count += len(entries)
      bad += entries[: max(_LISTED - len(bad), 0)]
      shards.append(about)
    if not sum(counts.values()):
      reason = f": {bad[0].id}: {bad[0].reason}" if bad else ""
      raise UserError(
        f"nothing was embedded, all {bad_count:,} records are bad{reason}. Mend them, "
        f"delete {self.folder}, and run the command again."
      )
    manifest = {
      **self.settings,
      **self._about,
      "rows": sum(shard["rows"] for shard in shards),
      "modalities": {name: counts[name] for name in MODALITIES},
      "bad_count": bad_count,
      "bad": [entry._asdict() for entry in bad],
      "shards": shards,
    }
    for left in self.folder.glob("*.part"):  # by processes that were killed
      left.unlink(missing_ok=True)
    with _room(self.folder):
      write_whole(self.folder / MANIFEST, to_json(manifest))
    return manifest

  def _read_shard(self, shard: int) -> tuple[dict[str, Any], list[str], list[Bad]]:
    """What the manifest says of a written shard, its rows' modalities, what is bad.

    Raises:
      UserError: its documents cannot be read, its vectors are not those it was
        written with.
    """
    import pyarrow.parquet as pq

    path = self.folder / documents_name(shard)
    try:
      table = pq.read_table(path, columns=["modality"])
      about = json.loads(table.schema.metadata[SHARD_KEY])
      bad = [Bad(*entry) for entry in about.pop("bad")]
      size, digest = about["vectors_bytes"], about["vectors_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's are these
      raise _torn(
        path, str(error).partition("\n")[0] or type(error).__name__
      ) from error
    vectors = self.folder / vectors_name(shard)
    if vectors.stat().st_size != size:
      raise _torn(vectors, f"{vectors.stat().st_size} bytes, {size} were written")
    if checksum(vectors) != digest:
      raise _torn(vectors, "its checksum is another")
    about["documents_bytes"] = path.stat().st_size
    about["documents_sha256"] = checksum(path)
    return about, table["modality"].to_pylist(), bad

  def _start(self) -> None:
    folder, path = self.folder, self.folder / SETTINGS
    if folder.exists() and not folder.is_dir():
      raise UserError(f"--output={folder} is a file: name a folder.")
    if path.is_file():
      _check_same(folder, _read_settings(path), self.settings)
      return
    if folder.is_dir() and any(p.name != f"{SETTINGS}.part" for p in folder.iterdir()):
      raise UserError(
        f"--output={folder} is not empty and holds no index: name a folder that is not "
        "there yet."
      )
    with _room(folder):
      folder.mkdir(parents=True, exist_ok=True)
      write_whole(path, to_json(self.settings))


def _torn(path: Path, why: str) -> UserError:
  return UserError(
    f"{path} is damaged ({why}): delete it and run the same command again; its shard is "
    "embedded anew."
  )


def _read_settings(path: Path) -> dict[str, Any]:
  try:
    settings = json.loads(path.read_text())
    if isinstance(settings, dict):
      return settings
    why = "no settings in it"
  except (OSError, ValueError, RecursionError) as error:
    why = str(error)
  raise UserError(
    f"{path} cannot be read ({why}): restore it from a copy, or name another folder."
  )


def _check_same(folder: Path, then: Mapping, now: Mapping) -> None:
  then, now = dict(_flat(then)), dict(_flat(now))
  differing = [
    f"{name}: {then.get(name)!r} then, {now.get(name)!r} now"
    for name in sorted(then.keys() | now.keys())
    if then.get(name) != now.get(name)
  ]
  if differing:
    raise UserError(
      f"--output={folder} holds another index ({'; '.join(differing)}). Go on with what "
      "it was started with, or name another folder."
    )


def _flat(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", value


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
  """Another name to write under; renamed when all is written."""
  part = path.with_name(f"{path.name}.{os.getpid()}.part")
  with _room(path):
    try:
      yield part
      os.replace(part, path)
    finally:
      part.unlink(missing_ok=True)


@contextlib.contextmanager
def _room(path: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(
      f"{path} cannot be written ({error.strerror or error}): make room there, or mend "
      "what refuses; the same command goes on where it was."
    ) from error
