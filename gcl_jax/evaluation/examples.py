"""A few queries with what they retrieved, small enough to stand in a JSON file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gcl_jax.evaluation import metrics
from gcl_jax.evaluation.banks import MODALITIES, Banks
from gcl_jax.evaluation.items import Items

TOP = 5
LONGEST = 200  # letters of a text that are kept
# Text queries first: they are what a reader can judge best.
_DIRECTIONS = ((1, 0), (0, 1), (1, 2), (2, 1), (0, 2), (2, 0))


def make_examples(
  items: Items,
  banks: Banks,
  asked: np.ndarray,
  codes: np.ndarray,
  pools: Sequence[tuple[np.ndarray, np.ndarray]],
  count: int,
) -> list[dict]:
  """Queries whose answer is of another modality, each asked in its global pool.

  Directions are taken in turn, and in each the next item in the order of the hash: every
  model shows the same queries on the same data.

  Args:
    items, banks: the evaluation's.
    asked: (3, 3, N) bool: [query modality, candidate modality, item].
    codes: int (N,), the hash of each item.
    pools: the three global pools: columns among the 3N documents, and the place of each
      item in them.
    count: at most so many.

  Returns: dicts with "query" and "answer" modality, "item", "text" and "image" of the
    query (None where it has none), "rank" of the right answer, and "found": the five
    best with "item", "modality", "text", "image", "score" and "right". Pictures are
    small JPEGs as data URIs.
  """
  return [
    _example(items, banks, q, k, c, *pools[(c - codes[k]) % 3])
    for q, c, k in _choose(asked, count)
  ]


def _choose(asked: np.ndarray, count: int) -> list[tuple[int, int, int]]:
  """(query modality, answer modality, item), no item twice."""
  left = {(q, c): list(np.flatnonzero(asked[q, c])) for q, c in _DIRECTIONS}
  chosen: list[tuple[int, int, int]] = []
  used: set[int] = set()
  while len(chosen) < count and any(left.values()):
    for (q, c), candidates in left.items():
      while candidates and candidates[0] in used:
        candidates.pop(0)
      if candidates and len(chosen) < count:
        used.add(candidates[0])
        chosen.append((q, c, int(candidates.pop(0))))
  return chosen


def _example(
  items: Items,
  banks: Banks,
  q: int,
  k: int,
  c: int,
  members: np.ndarray,
  position: np.ndarray,
) -> dict:
  n = len(items)
  scores = banks.documents.reshape(3 * n, -1)[members] @ banks.queries[q, k]
  rank = metrics.ranks_of_scores(scores[None], position[[k]])[0]
  best = np.argsort(-scores, kind="stable")[:TOP]
  return {
    "query": MODALITIES[q],
    "answer": MODALITIES[c],
    "item": items[k].name,
    "text": _short(items[k].query_caption) if q else None,
    "image": None if q == 1 else _picture(items.query_picture(k)),
    "rank": int(rank),
    "found": [
      {
        **_document(items, int(members[place]) // n, int(members[place]) % n),
        "score": round(float(scores[place]), 4),
        "right": bool(place == position[k]),
      }
      for place in best
    ],
  }


def _document(items: Items, m: int, k: int) -> dict:
  return {
    "item": items[k].name,
    "modality": MODALITIES[m],
    "text": _short(items[k].document_caption) if m else None,
    "image": None if m == 1 else _picture(items.document_picture(k)),
  }


def _short(text: str) -> str:
  return text if len(text) <= LONGEST else text[: LONGEST - 1].rstrip() + "…"


def _picture(source: object) -> str:
  from gcl_jax.processing.thumbnail import data_uri, thumbnail

  return data_uri(thumbnail(source))
