"""A saved index: vectors on disk, what they stand for, and the search over them."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.retrieval.embedder import Embedder
from gcl_jax.retrieval.flat import nearest
from gcl_jax.retrieval.identity import identity
from gcl_jax.retrieval.manifest import read_manifest
from gcl_jax.retrieval.neighbours import Neighbours, checked
from gcl_jax.retrieval.store_format import (
  MODALITIES,
  checksum,
  documents_name,
  vectors_name,
)


def read_index(folder: str | os.PathLike, *, verify: bool = True) -> Index:
  """Opens what `python -m gcl_jax.embed` wrote; reads no vectors yet.

  Args:
    folder: its `--output`.
    verify: whether every shard's checksum is compared, at about a second per GB; sizes
      and row counts always are.

  Raises:
    UserError: no index is there, it is not whole, a shard is missing or damaged.
  """
  folder = Path(folder)
  manifest = read_manifest(folder)
  for number, shard in enumerate(manifest["shards"]):
    for part, name in (
      ("vectors", vectors_name(number)),
      ("documents", documents_name(number)),
    ):
      path = folder / name
      if not path.is_file():
        raise UserError(
          f"{path} is missing: copy the whole folder, or run embed again into a new one."
        )
      size = path.stat().st_size
      if size != shard[f"{part}_bytes"]:
        _damaged(path, f"{size} bytes, {shard[f'{part}_bytes']} were written")
      if verify and checksum(path) != shard[f"{part}_sha256"]:
        _damaged(path, "its checksum is another")
  return Index(folder, manifest)


class ShardedVectors:
  """Shards, one below the other, as one array that is read by slices."""

  def __init__(self, shards: Sequence[np.ndarray], dimension: int, dtype: str):
    self.shards = shards
    self.starts = [0, *itertools.accumulate(map(len, shards))]
    self.shape = (self.starts[-1], dimension)
    self.dtype = np.dtype(dtype)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: slice | Sequence[int]) -> np.ndarray:
    """Rows of a slice, a view where they lie in one shard; or a copy of chosen rows."""
    if isinstance(rows, slice):
      first, last, step = rows.indices(len(self))
      if step == 1:
        return self._between(first, last)
      rows = range(first, last, step)
    rows = np.asarray(rows, np.int64)
    out = np.empty((len(rows), self.shape[1]), self.dtype)
    shard_of = np.searchsorted(self.starts, rows, side="right") - 1
    for k in np.unique(shard_of):
      mine = shard_of == k
      out[mine] = self.shards[k][rows[mine] - self.starts[k]]
    return out

  def _between(self, first: int, last: int) -> np.ndarray:
    parts = [
      shard[max(first - start, 0) : max(last - start, 0)]
      for start, shard in zip(self.starts, self.shards, strict=False)
      if start < last and first < start + len(shard)
    ]
    if len(parts) == 1:
      return parts[0]
    return np.concatenate(parts) if parts else np.empty((0, self.shape[1]), self.dtype)


class Index:
  """N documents with their vectors; made by `read_index`.

  Attributes:
    folder, manifest: where it lies and what its manifest says.
    vectors: (N, D) float16 or float32, memory-mapped.
    modalities: (N,) int8: 0 image, 1 text, 2 fused.
    ids: (N,) str, the ids of the records.
  """

  def __init__(self, folder: Path, manifest: Mapping[str, Any]):
    self.folder, self.manifest = folder, manifest
    self._tables: dict[int, Any] = {}
    self._found_finite, self._faiss = False, None
    self.vectors = ShardedVectors(
      [_open_vectors(folder, k, manifest) for k in range(len(manifest["shards"]))],
      manifest["dimension"],
      manifest["dtype"],
    )

  def __len__(self) -> int:
    return len(self.vectors)

  @functools.cached_property
  def modalities(self) -> np.ndarray:
    names = self._column("modality")
    return np.array([MODALITIES.index(name) for name in names], np.int8)

  @functools.cached_property
  def ids(self) -> np.ndarray:
    return np.array(self._column("id"), object)

  def documents(self, rows: Sequence[int]) -> list[dict[str, Any]]:
    """What rows stand for: id, modality, text, image, record and picture of each.

    `text` is None where the document has none; `image` is a path, None where there is no
    picture or it is no file (`picture` reads that).
    """
    starts = self.vectors.starts
    out = []
    for row in rows:
      if not 0 <= row < len(self):
        raise IndexError(f"row {row} of {len(self)}")
      shard = int(np.searchsorted(starts, row, side="right")) - 1
      out += self._table(shard).slice(int(row) - starts[shard], 1).to_pylist()
    return out

  def picture(self, row: int) -> Any:
    """The picture of a row, as `decode_image` reads it: a path, bytes, a PIL image.

    None where it has none, or it is no longer where it was.
    """
    document = self.documents([row])[0]
    if document["picture"] < 0:
      return None
    if document["image"] and Path(document["image"]).is_file():
      return document["image"]
    try:
      record = self._source[document["record"]]
      return record["images"][document["picture"]]
    except (ValueError, OSError, IndexError, UserError):
      return None

  def search(
    self,
    queries: np.ndarray,
    k: int,
    *,
    modality: str | Collection[str] | None = None,
    exclude: np.ndarray | None = None,
    exact: bool = True,
    engine: str = "auto",
  ) -> Neighbours:
    """The k documents nearest to each query.

    Args:
      queries: (Q, D) of the same model.
      modality: finds only documents of it, or of these.
      exclude: (Q, m) rows that a query does not find; -1 for none.
      exact: False asks the approximate index that `embed --faiss` has built.
      engine: of `nearest`, where exact.

    Raises:
      UserError: as `nearest`; an unknown modality; no approximate index.
    """
    allowed = None if modality is None else self._allowed(modality)
    if not exact:
      from gcl_jax.retrieval import approximate

      if self._faiss is None:
        self._faiss = approximate.open_faiss(self)
      queries, exclude, allowed = checked(queries, self.vectors, k, exclude, allowed)
      return approximate.search(
        self, self._faiss, queries, k, excluded=exclude, allowed=allowed
      )
    found = nearest(
      queries,
      self.vectors,
      k,
      engine=engine,
      excluded=exclude,
      allowed=allowed,
      check=not self._found_finite,
    )
    self._found_finite = self._found_finite or allowed is None
    return found

  def check_model(self, embedder: Embedder) -> None:
    """Raises UserError where queries of this embedder do not fit the index."""
    made, given = self.manifest["model"], identity(embedder)
    differing = [name for name in given if given[name] != made.get(name)]
    if differing:
      raise UserError(
        f"the index {self.folder} was made by another model "
        f"({self.manifest.get('checkpoint', 'unknown')}; what differs: "
        f"{', '.join(differing)}): give that model to the queries, or embed the corpus "
        "with this one."
      )

  def _allowed(self, modality: str | Collection[str]) -> np.ndarray:
    names = [modality] if isinstance(modality, str) else list(modality)
    for name in names:
      if name not in MODALITIES:
        raise UserError(f"modality {name!r} is none of {', '.join(MODALITIES)}.")
    return np.isin(self.modalities, [MODALITIES.index(name) for name in names])

  @functools.cached_property
  def _source(self):
    from gcl_jax.data import open_source

    return open_source(self.manifest["data"], split=self.manifest["split"])

  def _table(self, shard: int):
    if shard not in self._tables:
      import pyarrow.parquet as pq

      path = self.folder / documents_name(shard)
      try:
        table = pq.read_table(path)
      except (OSError, ValueError) as error:  # pyarrow's errors are these
        _damaged(path, str(error))
      if len(table) != len(self.vectors.shards[shard]):
        _damaged(path, f"{len(table)} rows, {len(self.vectors.shards[shard])} vectors")
      self._tables[shard] = table
    return self._tables[shard]

  def _column(self, name: str) -> list[str]:
    shards = range(len(self.vectors.shards))
    return [value for k in shards for value in self._table(k)[name].to_pylist()]


def _open_vectors(folder: Path, shard: int, manifest: Mapping[str, Any]) -> np.ndarray:
  path = folder / vectors_name(shard)
  rows = manifest["shards"][shard]["rows"]
  wanted = (rows, manifest["dimension"])
  if not rows:
    return np.zeros(wanted, manifest["dtype"])
  try:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
  except (OSError, ValueError) as error:
    _damaged(path, str(error))
  if array.shape != wanted or array.dtype != manifest["dtype"]:
    _damaged(
      path, f"it holds {array.dtype} {array.shape}, not {manifest['dtype']} {wanted}"
    )
  return array


def _damaged(path: Path, why: str):
  raise UserError(
    f"{path} is damaged ({why}): restore it from a copy, or delete it with the manifest "
    "and run embed again."
  )
