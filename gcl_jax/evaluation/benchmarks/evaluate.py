"""From official files and a model to the result."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from gcl_jax._version import __version__
from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks.agreement import agree
from gcl_jax.evaluation.benchmarks.embedding import (
  FUSIONS,
  STORED,
  Bank,
  Embedding,
  Embeds,
  Pool,
)
from gcl_jax.evaluation.benchmarks.export import RunExport
from gcl_jax.evaluation.benchmarks.result import directions_of, task_is_partial
from gcl_jax.evaluation.benchmarks.scoring import TIE, score
from gcl_jax.evaluation.benchmarks.task import Agreement, Benchmark, Task


def evaluate_benchmark(
  benchmark: Benchmark,
  embedder: Embeds,
  *,
  fusion: str = "",
  stored: str = "",
  export_run: str = "",
  progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
  """Embeds every document once, scores every task, and says by which rules.

  Args:
    benchmark: from `open_benchmark`.
    embedder: the model.
    fusion: "raw", "unit" or "checkpoint"; "" is the benchmark's official one, which is
      for models that add: of one that fuses by itself "checkpoint".
    stored: "float16" or "float32", what embeddings are kept in; "" as above.
    export_run: a new folder for embeddings, judgements and ranks; "" for none.
    progress: called with (rows embedded, rows to embed).

  Raises:
    UserError: a choice that there is not, embeddings that are not finite, a folder that
      cannot be written. Nothing of `export_run` is left then.
  """
  official = "checkpoint" if embedder.fuses_by_itself else benchmark.fusion
  fusion, stored = fusion or official, stored or benchmark.stored
  for flag, value, known in (("fusion", fusion, FUSIONS), ("stored", stored, STORED)):
    if value not in known:
      raise UserError(f"--{flag}={value}: there are {', '.join(known)}.")
  embedding = Embedding(embedder, benchmark.pictures, fusion, stored)
  export = None
  try:
    export = RunExport(export_run) if export_run else None
    started = time.monotonic()
    banks = _banks(benchmark, embedding, progress)
    embedded = time.monotonic()
    tasks = {task.name: _scored(task, banks, export) for task in benchmark.tasks}
    if export is not None:
      export.finish()
  finally:
    embedding.close()
    if export is not None:
      export.discard()
  return {
    "benchmark": benchmark.name,
    "code_version": __version__,
    "data_sha256": benchmark.data_hash,
    "protocol": {
      **benchmark.protocol,
      "fusion": fusion,
      "stored": stored,
      "official_embedding": (fusion, stored) == (official, benchmark.stored),
      "ties": "equal scores: the lower row of the pool first",
      "tie_width": float(TIE),
    },
    "tasks": tasks,
    "directions": directions_of(tasks),
    "summary": benchmark.summarise(tasks),
    "partial": any(task_is_partial(task) for task in tasks.values()),
    "seconds": {
      "embed": round(embedded - started, 1),
      "score": round(time.monotonic() - embedded, 1),
    },
    "peak_bytes": _peak_bytes(),
  }


def _peak_bytes() -> int:
  """The most memory that this process has held, mapped files' pages included."""
  scale = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _banks(
  benchmark: Benchmark,
  embedding: Embedding,
  progress: Callable[[int, int], None] | None,
) -> dict[int, Bank]:
  """The bank of each `Documents`, by its identity."""
  wanted = benchmark.documents()
  total, done = sum(len(part.images) for part in wanted), 0

  def advance(rows: int) -> None:
    nonlocal done
    done += rows
    if progress is not None:
      progress(done, total)

  return {id(part): embedding.bank(part, advance) for part in wanted}


def _scored(
  task: Task | Agreement, banks: dict[int, Bank], export: RunExport | None
) -> dict[str, Any]:
  if isinstance(task, Agreement):
    return agree(task, banks[id(task.images)], banks[id(task.texts)])
  queries, blocks, candidates = banks[id(task.queries)], {}, 0
  for scoring in task.scorings:
    pool = Pool([banks[id(part)] for part in scoring.pool])
    candidates = max(candidates, sum(bank.zeros for bank in pool.banks))
    scored = score(scoring, queries, pool)
    blocks[scoring.name] = scored.result
    if export is not None:
      export.write(task, scoring, scored, pool)
  return {
    "direction": " -> ".join(task.direction),
    **task.notes,
    "scores": blocks,
    "zero_vectors": {"queries": int(np.sum(queries.zeros)), "candidates": candidates},
  }
