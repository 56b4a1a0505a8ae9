"""Embeddings, ids, judgements and ranks as files that other tools score.

<task>/<scoring>/query_embed.npy, cand_embed.npy   unit rows, float32
                 query_ids.txt, cand_ids.txt       one a line, in the order of the rows
                 qrels.txt                         TREC: query 0 candidate 1
                 run.trec                          TREC: query Q0 candidate rank score tag
                 excluded.txt                      query and candidate it may not find
                 server.json                       where the benchmark's server takes one

In ids, blanks and % are written as in addresses (%20, %25): TREC's fields end at blanks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks.embedding import Pool, mapped
from gcl_jax.evaluation.benchmarks.scoring import Scored
from gcl_jax.evaluation.benchmarks.task import Scoring, Task

TAG = "gcl_jax"
_ROWS = 1 << 15


class RunExport:
  """Writes into a folder beside it, which becomes `folder` when all is there.

  Raises:
    UserError: the folder exists, or cannot be made.
  """

  def __init__(self, folder: str):
    self.folder = Path(folder).expanduser()
    self._written: dict[tuple[int, ...], Path] = {}
    if self.folder.exists():
      raise UserError(f"--export_run={folder} exists: name a new folder.")
    try:
      self.folder.parent.mkdir(parents=True, exist_ok=True)
      part = tempfile.mkdtemp(
        prefix=f"{self.folder.name}.part-", dir=self.folder.parent
      )
    except OSError as error:
      raise UserError(f"--export_run={folder} cannot be written: {error}") from error
    self._part = Path(part)
    self._part.chmod(0o755)

  def write(self, task: Task, scoring: Scoring, scored: Scored, pool: Pool) -> None:
    """The files of one scoring."""
    here = self._part / task.name / scoring.name
    names = task.name, scoring.name
    if here.parts[len(self._part.parts) :] != names or ".." in names:
      raise UserError(f"{task.name!r} and {scoring.name!r} are no names for folders.")
    try:
      here.mkdir(parents=True)
      self._files(here, task, scoring, scored, pool)
    except OSError as error:
      raise UserError(f"{here} cannot be written: {error}") from error

  def finish(self) -> None:
    os.replace(self._part, self.folder)

  def discard(self) -> None:
    """Takes away what was written, if it was not finished."""
    shutil.rmtree(self._part, ignore_errors=True)

  def _files(
    self, here: Path, task: Task, scoring: Scoring, scored: Scored, pool: Pool
  ) -> None:
    queries = task.queries.ids.take(pa.array(scored.asked)).to_pylist()
    candidates = [name for part in scoring.pool for name in part.ids.to_pylist()]
    names = queries, candidates  # as they are, for the server
    queries, candidates = (list(map(_id, ids)) for ids in names)
    np.save(here / "query_embed.npy", scored.queries)
    self._candidates(here / "cand_embed.npy", scoring, pool)
    _lines(here / "query_ids.txt", queries)
    rows = np.flatnonzero(_searched(scoring, pool))
    _lines(here / "cand_ids.txt", (candidates[row] for row in rows))
    if scored.relevant is not None:
      pairs = zip(scored.relevant.queries, scored.relevant.rows, strict=True)
      answers = [(queries[q], candidates[row]) for q, row in pairs]
      answers += [(queries[q], _id(c)) for q, c in scored.relevant.elsewhere]
      _lines(here / "qrels.txt", (f"{q} 0 {c} 1" for q, c in answers))
    if scored.excluded is not None:
      pairs = zip(queries, scored.excluded, strict=True)
      masked = ((q, c) for q, rows in pairs for c in rows if c >= 0)
      _lines(here / "excluded.txt", (f"{q} {candidates[c]}" for q, c in masked))
    _lines(here / "run.trec", _run(queries, candidates, scored))
    if scoring.server and scored.result["partial"] is None:
      answer = dict(scoring.server)
      depth = max(scoring.cutoffs)
      for name, found in zip(names[0], scored.found.rows, strict=True):
        answer[name] = [names[1][row] for row in found[:depth] if row >= 0]
      (here / "server.json").write_text(json.dumps(answer, separators=(",", ":")))

  def _candidates(self, path: Path, scoring: Scoring, pool: Pool) -> None:
    """Unit rows, a block at a time; a pool that was written before is linked."""
    key = tuple(map(id, scoring.pool))
    if scoring.allowed is None and key in self._written:
      try:
        os.link(self._written[key], path)
      except OSError:
        shutil.copyfile(self._written[key], path)
      return
    keep = _searched(scoring, pool)
    shape = (int(keep.sum()), pool.shape[1])
    out = mapped(path, np.dtype(np.float32), shape)
    done = 0
    for start in range(0, len(pool), _ROWS):
      rows = pool[start : start + _ROWS][keep[start : start + _ROWS]]
      out[done : done + len(rows)] = rows
      done += len(rows)
    out.flush()
    if scoring.allowed is None:
      self._written[key] = path


def _searched(scoring: Scoring, pool: Pool) -> np.ndarray:
  return pool.there if scoring.allowed is None else pool.there & scoring.allowed


def _run(queries: list[str], candidates: list[str], scored: Scored) -> Iterator[str]:
  """TREC lines. Nine digits tell any two float32 apart; ties stay ties."""
  for q, scores, rows in zip(queries, *scored.found, strict=True):
    for rank, (value, row) in enumerate(zip(scores, rows, strict=True), start=1):
      if row >= 0:
        yield f"{q} Q0 {candidates[row]} {rank} {value:.9g} {TAG}"


def _id(name: str) -> str:
  return re.sub(r"[\s%]", lambda found: quote(found[0]), name)


def _lines(path: Path, lines: Iterable[str]) -> None:
  with path.open("w", encoding="utf-8", newline="\n") as file:
    file.writelines(f"{line}\n" for line in lines)
