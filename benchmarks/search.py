"""Exact search: our two engines beside bare FAISS, in turn.

    python -m benchmarks.search --quick --output=search.json

Candidates are unit vectors made from a seed, a block at a time, in a memory-mapped file.
`faiss` is a bare `IndexFlatIP`, filled before the clock starts; `nearest` is our call on a
machine without an accelerator, which hands the blocks to FAISS; `jax` is our own form,
which is what accelerators and meshes use; `torch` a product and `topk` of a block at a
time on PyTorch's device. `ratio` is the median over the turns of the time
of `faiss` divided by the side's own in that turn; `same` the share of its neighbours that
are those of the first side. `extra_GB` is the most anonymous memory that a side's calls
took beyond what the process held before, `anonymous_GB` the most that it held at all.
M-BEIR's union pool has this size:

    python -m benchmarks.search --candidates=5600000 --width=768 --dtype=float16 \\
      --queries=1000 --sides=nearest,jax
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks.input import cores
from gcl_jax import command_line
from gcl_jax.errors import UserError
from gcl_jax.retrieval.neighbours import Neighbours

_FLAGS = flags.FLAGS
SIDES = ("faiss", "nearest", "jax", "torch")
_BLOCK = 16_384
_SAMPLED = 0.01  # seconds between two looks at the memory


def _define_flags() -> None:
  flags.DEFINE_bool("quick", False, "100,000 candidates, 1,000 queries")
  flags.DEFINE_integer("candidates", 1_000_000, "vectors searched")
  flags.DEFINE_integer("queries", 10_000, "at a call")
  flags.DEFINE_integer("width", 512, "of a vector")
  flags.DEFINE_integer("k", 10, "neighbours of each query")
  flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "of the candidates")
  flags.DEFINE_list("sides", ["faiss", "nearest", "jax"], f"of {', '.join(SIDES)}")
  flags.DEFINE_integer("turns", 1, "that every side has")
  flags.DEFINE_string(
    "folder", "", "where the vectors are kept; else they go at the end"
  )
  flags.DEFINE_string("output", "", "the JSON file of rows")


def main() -> None:
  """Measures, prints the table and writes the rows."""
  candidates, queries = _FLAGS.candidates, _FLAGS.queries
  if _FLAGS.quick:
    candidates, queries = min(candidates, 100_000), min(queries, 1_000)
  with tempfile.TemporaryDirectory(prefix="gcl_jax_search_") as temporary:
    folder = Path(_FLAGS.folder or temporary)
    vectors = corpus(folder, candidates, _FLAGS.width, _FLAGS.dtype)
    rows = measure(
      vectors,
      unit(np.random.default_rng(1), queries, _FLAGS.width),
      _FLAGS.k,
      sides=_FLAGS.sides,
      turns=_FLAGS.turns,
    )
  print(table(rows), flush=True)
  if _FLAGS.output:
    Path(_FLAGS.output).write_text(json.dumps(rows, indent=1) + "\n")


def unit(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
  """(count, width) float32 rows of length 1."""
  rows = rng.random((count, width), np.float32) - np.float32(0.5)
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def corpus(folder: Path, count: int, width: int, dtype: str) -> np.ndarray:
  """(count, width) unit rows, memory-mapped; made if they are not in the folder yet."""
  path = folder / f"{count}x{width}.{dtype}"
  if not path.exists():
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
      for first in range(0, count, _BLOCK):
        rng = np.random.default_rng((0, first))
        rows = unit(rng, min(_BLOCK, count - first), width)
        file.write(rows.astype(dtype).data)
    part.rename(path)
  return np.memmap(path, dtype, "r", shape=(count, width))


def measure(
  vectors: np.ndarray,
  queries: np.ndarray,
  k: int,
  *,
  sides: Sequence[str],
  turns: int,
) -> list[dict[str, Any]]:
  """The JSON rows. Each side first answers a few queries, which compiles and pages in.

  Raises UserError where a side is not known.
  """
  import jax

  calls = {side: _side(side, vectors, k, min(len(queries), 1_024)) for side in sides}
  seconds: dict[str, list[float]] = {side: [] for side in sides}
  extra, held = dict.fromkeys(sides, 0), dict.fromkeys(sides, 0)
  answers: dict[str, np.ndarray] = {}
  for _ in range(turns):
    for side, call in calls.items():
      with Anonymous() as memory:
        began = time.perf_counter()
        found = call(queries)
        seconds[side].append(time.perf_counter() - began)
      extra[side] = max(extra[side], memory.peak - memory.before)
      held[side] = max(held[side], memory.peak)
      answers[side] = np.sort(found.rows, axis=1)
  first = sides[0]
  work = 2.0 * len(queries) * vectors.shape[0] * vectors.shape[1]
  return [
    {
      "side": side,
      "candidates": vectors.shape[0],
      "width": vectors.shape[1],
      "dtype": str(vectors.dtype),
      "queries": len(queries),
      "k": k,
      "device": jax.devices()[0].device_kind,
      "devices": jax.device_count(),
      "threads": cores(),
      "turns": turns,
      "load": os.getloadavg()[0],
      "seconds": statistics.median(seconds[side]),
      "queries_per_s": len(queries) / statistics.median(seconds[side]),
      "gflops": work / statistics.median(seconds[side]) / 1e9,
      "ratio": statistics.median(
        other / own for other, own in zip(seconds[first], seconds[side], strict=True)
      ),
      "ratio_to": first,
      "same": float((answers[side] == answers[first]).mean()),
      "extra_GB": extra[side] / 1e9,
      "anonymous_GB": held[side] / 1e9,
    }
    for side in sides
  ]


def _side(
  side: str, vectors: np.ndarray, k: int, warm: int
) -> Callable[[np.ndarray], Neighbours]:
  """A search of these vectors, ready to go."""
  few = np.zeros((warm, vectors.shape[1]), np.float32)
  if side == "faiss":
    import faiss

    faiss.omp_set_num_threads(cores())
    index = faiss.IndexFlatIP(vectors.shape[1])
    for first in range(0, len(vectors), _BLOCK):
      index.add(np.asarray(vectors[first : first + _BLOCK], np.float32))
    index.search(few, k)
    return lambda queries: Neighbours(*index.search(queries, k))
  if side in ("nearest", "jax"):
    from gcl_jax.retrieval import nearest

    engine = "jax" if side == "jax" else "auto"
    part = vectors[: 40 * _BLOCK]
    nearest(few, part, k, engine=engine)
    return lambda queries: nearest(queries, vectors, k, engine=engine)
  if side == "torch":
    search = TorchSearch(vectors, k)
    search(few)
    return search
  raise UserError(f"--sides: {side!r} is none of {', '.join(SIDES)}.")


class TorchSearch:
  """Blocks of the candidates against all queries, as one would write it in PyTorch."""

  def __init__(self, vectors: np.ndarray, k: int):
    import torch

    self._torch, self._vectors, self._k = torch, vectors, k
    self._device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(cores())

  def __call__(self, queries: np.ndarray) -> Neighbours:
    torch = self._torch
    asked = torch.from_numpy(queries).to(self._device)
    scores = torch.full((len(queries), self._k), -torch.inf, device=self._device)
    rows = torch.full((len(queries), self._k), -1, device=self._device)
    for first in range(0, len(self._vectors), _BLOCK):
      block = torch.from_numpy(np.array(self._vectors[first : first + _BLOCK]))
      found, at = (asked @ block.to(self._device).float().T).topk(self._k, dim=1)
      both = torch.cat([scores, found], dim=1)
      scores, chosen = both.topk(self._k, dim=1)
      rows = torch.cat([rows, at + first], dim=1).gather(1, chosen)
    return Neighbours(scores.cpu().numpy(), rows.cpu().numpy())


class Anonymous:
  """The process's anonymous memory while a block of code runs, in bytes."""

  def __enter__(self) -> Anonymous:
    self.before = self.peak = _anonymous()
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._look, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._done.set()
    self._thread.join()

  def _look(self) -> None:
    while not self._done.wait(_SAMPLED):
      self.peak = max(self.peak, _anonymous())


def _anonymous() -> int:
  for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith("RssAnon:"):
      return int(line.split()[1]) * 1024
  raise UserError("this machine does not tell anonymous memory (no RssAnon in /proc).")


def table(rows: Sequence[dict[str, Any]]) -> str:
  """The rows in Markdown."""
  lines = [
    "| side | candidates | queries | seconds | queries/s | times as fast as | same | "
    "extra GB | anonymous GB |",
    "|---|---|---:|---:|---:|---|---:|---:|---:|",
  ]
  for row in rows:
    lines.append(
      f"| {row['side']} | {row['candidates']:,} x {row['width']} {row['dtype']} | "
      f"{row['queries']:,} | {row['seconds']:.2f} | {row['queries_per_s']:,.0f} | "
      f"{row['ratio']:.2f} x {row['ratio_to']} | {row['same']:.4%} | "
      f"{row['extra_GB']:.2f} | {row['anonymous_GB']:.2f} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  _define_flags()
  command_line.run(main)
