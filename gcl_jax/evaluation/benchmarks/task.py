"""The common shape of all benchmarks: tasks, how each is scored, and by which protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks.documents import Documents, Judgements
from gcl_jax.evaluation.benchmarks.pictures import Pictures

# A task's directions as M-BEIR writes modalities: "image,text" is a document of both.
IMAGE, TEXT, BOTH = "image", "text", "image,text"


@dataclass(frozen=True, eq=False)
class Scoring:
  """One way to ask a task's queries, and one block of recalls in the result.

  Attributes:
    name: of the block, as "local" or "masked".
    pool: the candidates, one after the other; rows count through all of them.
    cutoffs: the K of each recall.
    relevant: per query asked; None where answers are not public.
    excluded: (Q, m) rows that a query does not find, -1 for none.
    lists: (Q, L) rows: each query searches only these; equal scores keep this order.
    asked: rows of the task's queries; None: all. Q counts these.
    allowed: (N,) bool, which candidates are searched.
    server: the head of the benchmark server's file, where it takes one.
  """

  name: str
  pool: tuple[Documents, ...]
  cutoffs: tuple[int, ...]
  relevant: Judgements | None
  excluded: np.ndarray | None = None
  lists: np.ndarray | None = None
  asked: np.ndarray | None = None
  allowed: np.ndarray | None = None
  server: Mapping[str, str] | None = None


@dataclass(frozen=True, eq=False)
class Task:
  """Queries of one kind, and the ways in which they are scored.

  Attributes:
    direction: (query modality, candidate modality).
    notes: what the result says beside the numbers; `sizes` where an official size is
      known.
  """

  name: str
  direction: tuple[str, str]
  queries: Documents
  scorings: tuple[Scoring, ...]
  notes: Mapping[str, Any] = field(default_factory=dict)

  def __post_init__(self):
    names = [scoring.name for scoring in self.scorings]
    if len(set(names)) < len(names):
      raise ValueError(f"{self.name}: two scorings have one name: {names}")


@dataclass(frozen=True, eq=False)
class Agreement:
  """Pairs of an image and a text that people scored.

  Attributes:
    images, texts: the documents.
    pairs: (P, 2) int64 rows of images and of texts.
    scores: (P, J) by J judges.
    own: (P,) bool: the text was written for this very image.
  """

  name: str
  images: Documents
  texts: Documents
  pairs: np.ndarray
  scores: np.ndarray
  own: np.ndarray


@dataclass(frozen=True)
class Options:
  """What a command line may choose; an empty string is the benchmark's own choice."""

  tasks: tuple[str, ...] = ()
  images: str = ""
  pool: str = ""
  instructions: str = ""
  prompt_seed: int = 2023
  mode: str = ""
  targets: str = ""


@dataclass(frozen=True, eq=False)
class Benchmark:
  """Official files, read and checked.

  Attributes:
    fusion, stored: the official protocol's: "raw", "unit" or "checkpoint" (which it is
      of every model that fuses by itself), and in which type embeddings are kept.
    protocol: the switches that shaped the tasks, for the result.
    data_hash: SHA-256 of the files that were read.
    summarise: from the results of all tasks to the benchmark's own means.
  """

  name: str
  tasks: Sequence[Task | Agreement]
  pictures: Pictures
  fusion: str
  stored: str
  protocol: Mapping[str, Any]
  data_hash: str
  summarise: Callable[[Mapping[str, Any]], dict[str, Any]]

  def documents(self) -> list[Documents]:
    """All that must be embedded, each once: candidates, then queries."""
    found: dict[int, Documents] = {}
    for task in self.tasks:
      if isinstance(task, Agreement):
        parts = [task.images, task.texts]
      else:
        parts = [*(d for s in task.scorings for d in s.pool), task.queries]
      found.update((id(part), part) for part in parts)
    return list(found.values())


def sizes(
  queries: int, candidates: int, official: tuple[int, int | None]
) -> dict[str, Any]:
  """Notes of a task: how large it is, and how large the official one is.

  `official`: queries and candidates; None where the official task fixes no number.
  """
  found = {"queries": queries, "candidates": candidates}
  pairs = {
    what: [count, want]
    for (what, count), want in zip(found.items(), official, strict=True)
    if want is not None
  }
  return {
    "official_size": all(count == want for count, want in pairs.values()),
    "sizes": pairs,
  }


def chosen(
  tasks: Sequence[str], known: Sequence[str], default: Sequence[str] | None = None
) -> list[str]:
  """The tasks asked for, in the order of `known`; without any, `default` or all.

  Raises:
    UserError: a name that is not known.
  """
  for name in tasks:
    if name not in known:
      raise UserError(
        f"--tasks={name}: there is no such task; there are {', '.join(known)}."
      )
  wanted = tasks or (known if default is None else default)
  return [name for name in known if name in wanted]
