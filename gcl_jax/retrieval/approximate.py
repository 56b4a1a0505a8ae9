"""Approximate indexes beside the vectors: FAISS's, by its factory strings.

"IVF1024,Flat" looks into a part of 1,024 cells, "HNSW32" walks a graph, "IVF256,PQ32"
keeps 32 bytes of each vector, "Flat" everything. What they find is scored again with the
stored vectors, so that scores are inner products whatever the index keeps.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.paths import write_whole
from gcl_jax.retrieval.flat import import_faiss
from gcl_jax.retrieval.neighbours import Neighbours, best_of, padded, without
from gcl_jax.retrieval.store import Index
from gcl_jax.retrieval.store_format import FAISS_FILE, MANIFEST, checksum, to_json

_BLOCK = 32_768  # rows in memory as float32 while they are added
_TRAINED_ON = 65_536  # rows at least, if there are as many
_PER_CELL = 64  # rows; FAISS asks for 39 and uses 256 at most
_CELLS_SEARCHED = 16  # one cell of so many, unless the user says
_RECALL_AT = (1, 10)


def build(
  index: Index, factory: str, *, search: str = "", queries: int = 256, seed: int = 0
) -> dict[str, Any]:
  """Builds, saves and judges an approximate index; returns what the manifest now says.

  Its recall is the share of the exact neighbours that it finds, for documents of the
  index as queries, themselves left out.

  Args:
    index: of `read_index`; its folder is written to.
    factory: FAISS's factory string.
    search: parameters of the search, as "nprobe=16" or "efSearch=64"; by default a
      sixteenth of the cells, and FAISS's own for the rest.
    queries: how many documents are asked with.
    seed: of the documents that it is trained on and asked with.

  Raises:
    UserError: FAISS cannot make it of that string or train it on so few rows, an unknown
      parameter, no room.
  """
  faiss = import_faiss()
  began = time.monotonic()
  rng = np.random.default_rng(seed)
  made, search = empty(index.vectors.shape[1], factory, search)
  if not made.is_trained:
    count = min(len(index), max(_TRAINED_ON, _PER_CELL * _cells(faiss, made)))
    chosen = np.sort(rng.choice(len(index), count, replace=False))
    with _explained(f"--faiss={factory}"):
      made.train(_rows(index, chosen))
  for first in range(0, len(index), _BLOCK):
    made.add(_rows(index, slice(first, first + _BLOCK)))
  path = index.folder / FAISS_FILE
  _save(faiss, made, path)
  asked = np.sort(rng.choice(len(index), min(queries, len(index)), replace=False))
  about = {
    "factory": factory,
    "search": search,
    "bytes": path.stat().st_size,
    "sha256": checksum(path),
    "recall": _recall(index, made, asked),
    "recall_queries": len(asked),
  }
  manifest = {**index.manifest, "faiss": about}
  write_whole(index.folder / MANIFEST, to_json(manifest))
  index.manifest = manifest
  return {**about, "seconds": time.monotonic() - began}


def empty(dimension: int, factory: str, search: str = "") -> tuple[Any, str]:
  """An index of FAISS with nothing in it, and the parameters of its search.

  It costs next to nothing: what a user wrote is checked by it before a corpus is
  embedded.

  Args:
    dimension: of the vectors. factory, search: of `build`.

  Raises:
    UserError: FAISS is not installed, cannot make it of that string, or does not know a
      parameter.
  """
  faiss = import_faiss()
  with _explained(f"--faiss={factory}"):
    made = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
  cells = _cells(faiss, made)
  search = search or (f"nprobe={-(-cells // _CELLS_SEARCHED)}" if cells else "")
  if search:
    with _explained(f"--faiss_search={search}"):
      faiss.ParameterSpace().set_index_parameters(made, search)
  return made, search


def open_faiss(index: Index) -> Any:
  """The saved FAISS index of a folder.

  Raises:
    UserError: none was built, it is missing or damaged.
  """
  faiss = import_faiss()
  about, path = index.manifest.get("faiss"), index.folder / FAISS_FILE
  if about is None:
    raise UserError(
      f"the index {index.folder} has no approximate one: build it with --faiss=HNSW32 "
      "on the command that made it, or search exactly."
    )
  if not path.is_file():
    raise UserError(f"{path} is missing: build it again with --faiss, or copy it.")
  if path.stat().st_size != about["bytes"] or checksum(path) != about["sha256"]:
    raise UserError(f"{path} is damaged (its checksum is another): build it again.")
  return faiss.read_index(str(path))


def search(
  index: Index,
  made: Any,
  queries: np.ndarray,
  k: int,
  *,
  excluded: np.ndarray | None = None,
  allowed: np.ndarray | None = None,
) -> Neighbours:
  """As `nearest`, among what the FAISS index finds.

  More is fetched until every query has its k, or the index has nothing more to give.
  """
  extra = 0 if excluded is None else excluded.shape[1]
  fetch = min(k + extra, len(index))
  while True:
    _, rows = made.search(queries, fetch)
    if allowed is not None:
      rows = np.where((rows >= 0) & allowed[rows], rows, -1)
    enough = (rows >= 0).sum(axis=1).min(initial=fetch) >= min(k + extra, fetch)
    if allowed is None or enough or fetch == len(index):
      break
    fetch = min(4 * fetch, len(index))
  return padded(without(_scored(index, queries, rows), excluded, k), k)


def _scored(index: Index, queries: np.ndarray, rows: np.ndarray) -> Neighbours:
  """What was found by the inner products of the stored vectors, best first."""
  scores = np.full(rows.shape, -np.inf, np.float32)
  for q, chosen in enumerate(rows):
    there = chosen >= 0
    if there.any():
      scores[q, there] = _rows(index, chosen[there]) @ queries[q]
  return best_of(Neighbours(scores, rows.astype(np.int64)), rows.shape[1])


def _recall(index: Index, made: Any, asked: np.ndarray) -> dict[str, float]:
  queries, own = _rows(index, asked), asked[:, None]
  k = max(_RECALL_AT)
  exact = index.search(queries, k, exclude=own)
  found = search(index, made, queries, k, excluded=own)
  out = {}
  for at in _RECALL_AT:
    want = exact.rows[:, :at]
    hit = (want[:, :, None] == found.rows[:, None, :at]).any(axis=2) & (want >= 0)
    out[str(at)] = float(hit.sum() / max((want >= 0).sum(), 1))
  return out


def _cells(faiss: Any, made: Any) -> int:
  """Of an inverted file; 0 of what is none."""
  try:
    return int(faiss.extract_index_ivf(made).nlist)
  except RuntimeError:
    return 0


def _rows(index: Index, rows: slice | np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(index.vectors[rows], np.float32)


def _save(faiss: Any, made: Any, path: Path) -> None:
  part = path.with_name(f"{path.name}.part")
  try:
    faiss.write_index(made, str(part))
    os.replace(part, path)
  except (OSError, RuntimeError) as error:
    part.unlink(missing_ok=True)
    raise UserError(f"{path} cannot be written ({_first_line(error)}).") from error


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
  try:
    yield
  except (RuntimeError, AssertionError) as error:
    raise UserError(f"{what}: FAISS refuses ({_first_line(error)}).") from error


def _first_line(error: Exception) -> str:
  """What FAISS says, without the place in its sources."""
  said = str(error).strip()
  reason = said.partition(": ")[2] if said.startswith("Error in ") else said
  return reason.partition("\n")[0][:200] or type(error).__name__
