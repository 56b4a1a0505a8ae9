"""From documents to vectors: distinct ones once, a chunk at a time, large ones on disk.

Three ways to fuse an image with a text. "raw" adds the projected vectors as they are
and normalises the sum (UniIR's CLIP_SF, M-BEIR's protocol); "unit" is the mean of the
two unit vectors (CoVR's Avg); "checkpoint" is what the model itself makes of both.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks.documents import Column, Documents, Parts
from gcl_jax.evaluation.benchmarks.pictures import Pictures
from gcl_jax.processing import ImageError, decode_image

FUSIONS = ("raw", "unit", "checkpoint")
STORED = ("float16", "float32")
_CHUNK = 4096  # distinct documents in memory together
_ON_DISK = 1 << 28  # bytes; larger arrays are memory-mapped files
_KEPT = 1 << 15  # vectors of images, and of texts, that are kept for the next documents


class Embeds(Protocol):
  """What is asked of `gcl_jax.retrieval.Embedder`."""

  @property
  def fuses_by_itself(self) -> bool: ...

  def embed(self, images: Any, texts: Any, *, normalize: bool = True) -> np.ndarray: ...


@dataclass(frozen=True)
class Bank:
  """The embeddings of some documents.

  Attributes:
    vectors: (N, D) float16 or float32, of any length; zero where absent.
    there: (N,) bool: False where a picture is missing or unreadable.
    zeros: how many that are there are zero vectors.
  """

  vectors: np.ndarray
  there: np.ndarray
  zeros: int

  def unit(self, rows: slice | np.ndarray) -> np.ndarray:
    """Rows of length 1 in float32; a zero row stays zero."""
    return _unit(np.asarray(self.vectors[rows], np.float32))


class Embedding:
  """An embedder with a protocol and a place for large arrays. Close it at the end."""

  def __init__(self, embedder: Embeds, pictures: Pictures, fusion: str, stored: str):
    """`fusion`: one of `FUSIONS`; `stored`: the type that embeddings are kept in."""
    self._embedder, self._pictures = embedder, pictures
    self._fusion, self._stored = fusion, np.dtype(stored)
    self._scratch = tempfile.TemporaryDirectory(prefix="gcl_jax_")
    self._kept: dict[str, dict[str, np.ndarray]] = {"image": {}, "text": {}}
    self._files = 0

  def close(self) -> None:
    self._scratch.cleanup()

  def bank(
    self, documents: Documents, progress: Callable[[int], None] | None = None
  ) -> Bank:
    """All of the documents. `progress` is called with the rows done since last time.

    Raises:
      UserError: an embedding is not finite; names the document.
    """
    firsts, order, bounds = _distinct(documents.images, documents.texts)
    chunk = min(_CHUNK, self._pictures.chunk)
    out, there = None, np.ones(len(order), bool)
    for start in range(0, len(firsts), chunk):
      part = firsts[start : start + chunk]
      images = documents.images.take(pa.array(part)).to_pylist()
      texts = documents.texts.take(pa.array(part)).to_pylist()
      vectors, good = self._embed(images, texts)
      with np.errstate(over="ignore"):  # told below
        stored = vectors.astype(self._stored)
      self._check(stored, documents, part)
      if out is None:
        out = self._array((len(order), stored.shape[1]))
      rows = order[bounds[start] : bounds[start + len(part)]]
      which = np.repeat(
        np.arange(len(part)), np.diff(bounds[start : start + len(part) + 1])
      )
      out[rows], there[rows] = stored[which], good[which]
      if progress is not None:
        progress(len(rows))
    if out is None:
      raise UserError(f"{documents.name}: there is nothing to embed in it.")
    bank = Bank(out, there, _zeros(out, there))
    return bank if documents.parts is None else _summed(bank, documents.parts)

  def _embed(
    self, images: list[str | None], texts: list[str | None]
  ) -> tuple[np.ndarray, np.ndarray]:
    """(n, D) float32 fused but not normalised, and (n,) whether they are there."""
    names = list(dict.fromkeys(i for i in images if i is not None))
    loaded = dict(zip(names, self._load(names), strict=True))
    try:
      return self._fused(images, texts, loaded)
    except UserError:
      broken = [n for n in names if loaded[n] is not None and not _readable(loaded[n])]
      if not broken:
        raise
      return self._fused(images, texts, loaded | dict.fromkeys(broken))

  def _fused(
    self,
    images: list[str | None],
    texts: list[str | None],
    loaded: dict[str, Any],
  ) -> tuple[np.ndarray, np.ndarray]:
    good = np.array([i is None or loaded[i] is not None for i in images])
    together = np.zeros(len(images), bool)  # what the model itself is to fuse
    if self._fusion == "checkpoint":
      both = [None not in pair for pair in zip(images, texts, strict=True)]
      together = good & np.array(both)
    alone = good & ~together
    found = [
      self._parts(
        kind, [v if a else None for v, a in zip(values, alone, strict=True)], loaded
      )
      for kind, values in (("image", images), ("text", texts))
    ]
    found = [part for part in found if part is not None]
    if together.any():
      rows = np.flatnonzero(together)
      vectors = self._embedder.embed(
        [loaded[images[k]] for k in rows], [texts[k] for k in rows]
      )
      found.append(np.zeros((len(images), vectors.shape[1]), np.float32))
      found[-1][rows] = vectors
    if not found:  # all absent, or neither image nor text
      width = self._embedder.embed(None, [""]).shape[1]
      found = [np.zeros((len(images), width), np.float32)]
    return sum(found[1:], found[0]), good

  def _load(self, names: list[str]) -> list[Any]:
    """The pictures, None for those that are missing or cannot be decoded."""
    absent = self._pictures.missing(names) if names else []
    there = [name for name, gone in zip(names, absent, strict=True) if not gone]
    sources = dict(zip(there, self._pictures.load(there), strict=True))
    return [sources.get(name) for name in names]

  def _parts(
    self, kind: str, values: list[str | None], loaded: dict[str, Any]
  ) -> np.ndarray | None:
    """(n, D) of one modality, zero where None; None where all are."""
    kept = self._kept[kind]
    new = [v for v in dict.fromkeys(values) if v is not None and v not in kept]
    if len(kept) + len(new) > _KEPT:
      needed = {v: kept[v] for v in set(values) & kept.keys()}
      kept.clear()
      kept.update(needed)
    if new:
      given = [loaded[v] for v in new] if kind == "image" else new
      images, texts = (given, None) if kind == "image" else (None, given)
      rows = self._embedder.embed(images, texts, normalize=self._fusion != "raw")
      kept.update(zip(new, np.array(rows, np.float32), strict=True))
    present = [k for k, v in enumerate(values) if v is not None]
    if not present:
      return None
    out = np.zeros((len(values), len(kept[values[present[0]]])), np.float32)
    out[present] = [kept[values[k]] for k in present]
    return out

  def _array(self, shape: tuple[int, int]) -> np.ndarray:
    if int(np.prod(shape)) * self._stored.itemsize < _ON_DISK:
      return np.zeros(shape, self._stored)
    self._files += 1
    path = Path(self._scratch.name, f"{self._files}.npy")
    try:
      return mapped(path, self._stored, shape)
    except OSError as error:
      raise UserError(
        f"no room for {shape[0]:,} embeddings in {path.parent}: {error}; set TMPDIR to "
        "a folder on a larger disk"
      ) from error

  def _check(self, stored: np.ndarray, documents: Documents, rows: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(stored).all(axis=1))
    if len(bad):
      row = int(rows[bad[0]])
      if documents.parts is not None:
        row = int(np.searchsorted(documents.parts.offsets, row, side="right")) - 1
      raise UserError(
        f"{documents.name}: the embedding of {documents.ids[row]} is not finite (and "
        f"{len(bad) - 1} more of its chunk): the model has diverged or its weight file "
        f"is damaged, or its vectors do not fit {self._stored} (--stored=float32)."
      )


def mapped(path: Path, dtype: np.dtype, shape: tuple[int, int]) -> np.memmap:
  """A new .npy file of zeros, mapped for writing, with all of its room taken.

  Without its room a mapped file ends the process (SIGBUS) when the disk is full.

  Raises:
    OSError: there is no such room, or the file cannot be made.
  """
  with path.open("wb") as file:
    descr = np.lib.format.dtype_to_descr(dtype)
    head = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, head)
    size = file.tell() + int(np.prod(shape)) * dtype.itemsize
    file.truncate(size)
    if hasattr(os, "posix_fallocate"):
      try:
        os.posix_fallocate(file.fileno(), 0, size)
      except OSError as error:
        if error.errno not in (
          errno.EOPNOTSUPP,
          errno.EINVAL,
        ):  # not of this file system
          raise
  return np.lib.format.open_memmap(path, "r+")


def _distinct(
  images: Column, texts: Column
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Distinct (image, text) rows, those of one image side by side.

  Returns: (U,) the first row of each; (M,) all rows grouped by it; (U + 1,) where each
  group begins.
  """
  image, text = (_codes(column) for column in (images, texts))
  keys = image * (text.max(initial=0) + 1) + text
  order = np.argsort(keys, kind="stable")
  new = np.diff(keys[order], prepend=-1) != 0
  starts = np.flatnonzero(new)
  return order[starts], order, np.append(starts, len(order))


def _codes(column: Column) -> np.ndarray:
  """(M,) int64: equal values, equal numbers from 1; 0 for null."""
  if isinstance(column, pa.ChunkedArray):
    column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):
      column = pa.concat_arrays(column.chunks)
  codes = pc.fill_null(column.dictionary_encode().indices, -1)
  return codes.to_numpy(zero_copy_only=False).astype(np.int64) + 1


def _readable(source: Any) -> bool:
  try:
    decode_image(source)
  except (ImageError, OSError):
    return False
  return True


def _unit(rows: np.ndarray) -> np.ndarray:
  lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
  return rows / np.where(lengths > 0, lengths, 1)


def _zeros(vectors: np.ndarray, there: np.ndarray) -> int:
  """How many rows that are there hold nothing but zeros."""
  step = 1 << 16
  some = [vectors[k : k + step].any(axis=1) for k in range(0, len(vectors), step)]
  return int(np.sum(there & ~np.concatenate(some)))


def _summed(bank: Bank, parts: Parts) -> Bank:
  """Documents from their rows: the weighted sum of unit rows. All rows must be there."""
  starts = parts.offsets[:-1]
  rows = bank.unit(slice(None)) * parts.weights[:, None]
  vectors = np.add.reduceat(rows, starts, axis=0)
  there = np.logical_and.reduceat(bank.there, starts)
  vectors[~there] = 0
  return Bank(vectors, there, _zeros(vectors, there))


class Pool:
  """Banks one after the other as unit float32 rows, read by slices as `nearest` does."""

  dtype = np.dtype(np.float32)

  def __init__(self, banks: Sequence[Bank]):
    self.banks = list(banks)
    self._starts = np.cumsum([0, *(len(bank.vectors) for bank in banks)])
    self.there = np.concatenate([bank.there for bank in banks])

  def __len__(self) -> int:
    return int(self._starts[-1])

  @property
  def shape(self) -> tuple[int, int]:
    return len(self), self.banks[0].vectors.shape[1]

  def __getitem__(self, rows: slice) -> np.ndarray:
    first, end, _ = rows.indices(len(self))
    found = []
    for start, bank in zip(self._starts, self.banks, strict=False):
      low, high = max(first - start, 0), min(end - start, len(bank.vectors))
      if low < high:
        found.append(bank.unit(slice(low, high)))
    if len(found) == 1:
      return found[0]
    return np.concatenate([np.zeros((0, self.shape[1]), np.float32), *found])

  def take(self, rows: np.ndarray) -> np.ndarray:
    """(n, D) of these rows, in their order."""
    out = np.empty((len(rows), self.shape[1]), np.float32)
    which = np.searchsorted(self._starts, rows, side="right") - 1
    for number in np.unique(which):
      here = which == number
      out[here] = self.banks[number].unit(rows[here] - self._starts[number])
    return out
