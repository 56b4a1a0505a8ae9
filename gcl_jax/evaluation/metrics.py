"""Ranks, recalls, bootstrap intervals and the modality gap, in NumPy.

Scores are float32 dot products of unit rows, made in blocks of queries: Q x N is never
held whole. Percentages are 0 to 100.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gcl_jax.errors import UserError

KS = (1, 5, 10, 50)  # R@k
TIE = 1e-6  # scores closer than this are equal
TOP = 10  # candidates that the shares of modalities look at
MIN_NORM = 0.1  # a bank mean shorter than this has no direction worth a cosine
BLOCK_ENTRIES = 1 << 23  # scores held at once: 32 MB of float32
RESAMPLES = 1_000


def check_finite(bank: np.ndarray, name: str) -> None:
  """Raises UserError when a row of bank (N, D), called `name`, is not finite."""
  bad = int(np.sum(~np.isfinite(bank).all(axis=1)))
  if bad:
    raise UserError(
      f"{bad} of {len(bank)} {name} embeddings are not finite: the model has diverged"
      " or its weight file is damaged; evaluate an earlier checkpoint, or load the"
      " weights again"
    )


def block_rows(columns: int) -> int:
  """How many queries are scored at once against so many candidates."""
  return max(1, BLOCK_ENTRIES // max(1, columns))


def ranks_of_scores(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
  """The rank of the best relevant candidate of each query, counted from 1.

  rank = 1 + number of irrelevant candidates whose score is not below the best relevant
  one's - 1e-6: ties count against the model. A score of -inf is no candidate.

  Args:
    scores: (B, N) float32.
    relevant: int (B,), or (B, R) padded with -1: columns of the relevant candidates.

  Returns: int64 (B,). Raises ValueError for a query without a relevant candidate.
  """
  relevant = np.asarray(relevant)
  if relevant.ndim == 1:
    relevant = relevant[:, None]
  rows = np.arange(len(scores))[:, None]
  best = np.where(relevant >= 0, scores[rows, relevant], -np.inf)  # (B, R)
  floor = best.max(axis=1, initial=-np.inf).astype(np.float32)
  if np.isneginf(floor).any():
    raise ValueError("a query has no relevant candidate")
  floor = (floor - np.float32(TIE))[:, None]
  not_below = np.count_nonzero(scores >= floor, axis=1)
  return 1 + not_below - np.count_nonzero(best >= floor, axis=1)


def ranks(
  queries: np.ndarray, candidates: np.ndarray, relevant: np.ndarray
) -> np.ndarray:
  """`ranks_of_scores` of queries (Q, D) against candidates (N, D), in blocks.

  relevant: int (Q,) or (Q, R) padded with -1 (no column twice in a row). Returns int64
  (Q,). Raises UserError for an embedding that is not finite.
  """
  queries = np.asarray(queries, np.float32)
  candidates = np.asarray(candidates, np.float32)
  check_finite(queries, "query")
  check_finite(candidates, "candidate")
  relevant = np.asarray(relevant)
  out = np.zeros(len(queries), np.int64)
  step = block_rows(len(candidates))
  for start in range(0, len(queries), step):
    rows = slice(start, start + step)
    out[rows] = ranks_of_scores(queries[rows] @ candidates.T, relevant[rows])
  return out


def recall_at(ranks: np.ndarray, k: int) -> float | None:
  """R@k in percent: the share of queries whose rank is at most k; None without any."""
  return float(100 * np.mean(ranks <= k)) if len(ranks) else None


def ladder(pool: int) -> list[int]:
  """1, 2, 5, 10, 20, 50, ... up to the first that is not below `pool`."""
  steps = [1]
  while steps[-1] < pool:
    first = int(str(steps[-1])[0])
    steps.append(steps[-1] * 5 // 2 if first == 2 else steps[-1] * 2)
  return steps


def found_by(ranks: np.ndarray, ks: Sequence[int]) -> list[int]:
  """How many of the ranks are at most k, for each k."""
  return [int(np.count_nonzero(ranks <= k)) for k in ks]


def median_rank(ranks: np.ndarray) -> float | None:
  """The median of the ranks; None without any."""
  return float(np.median(ranks)) if len(ranks) else None


def shares_of_top(scores: np.ndarray, groups: np.ndarray, k: int = TOP) -> np.ndarray:
  """The share of each query's k best candidates that each group holds.

  Candidates that tie with the k-th (within 1e-6) share the places left over, so that
  the order of the candidates does not matter.

  Args:
    scores: (B, N) float32, finite.
    groups: bool (N, G), which candidates are of which group.

  Returns: float64 (B, G), 0 to 1.
  """
  k = min(k, scores.shape[1])
  scores, groups = _contenders(scores, groups, k)
  kth = np.partition(scores, scores.shape[1] - k, axis=1)[:, -k, None]
  above = scores > kth + np.float32(TIE)
  top = scores >= kth - np.float32(TIE)
  group_above = np.count_nonzero(above[..., None] & groups, axis=1)  # (B, G)
  group_tied = np.count_nonzero(top[..., None] & groups, axis=1) - group_above
  above = np.count_nonzero(above, axis=1)[:, None]
  tied = np.count_nonzero(top, axis=1)[:, None] - above
  return (group_above + (k - above) * group_tied / tied) / k


def _contenders(
  scores: np.ndarray, groups: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """The few candidates of each row that can be among its k best or tie with the k-th.

  Returns: (B, M) scores padded with -inf, and (B, M, G) bool `groups`.
  """
  # The k-th largest of the maxima of groups is not above the k-th largest of all. A
  # partition of every row would be the slowest part of an evaluation.
  b, n = scores.shape
  width = max(1, n // (8 * k))
  maxima = scores[:, : n // width * width].reshape(b, -1, width).max(axis=2)
  bound = np.partition(maxima, maxima.shape[1] - k, axis=1)[:, -k, None]
  rows, columns = np.nonzero(scores >= bound - np.float32(TIE))
  count = np.bincount(rows, minlength=b)
  place = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
  some = np.full((b, count.max(initial=k)), -np.inf, np.float32)
  of_group = np.zeros((*some.shape, groups.shape[1]), bool)
  some[rows, place] = scores[rows, columns]
  of_group[rows, place] = groups[columns]
  return some, of_group


def bootstrap(
  values: np.ndarray, counts: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
  """Means over resampled items: the items are drawn with replacement, all columns at
  once, so that columns which ask the same items stay correlated.

  Args:
    values: (N, C), the sum over each item's queries of what is averaged.
    counts: (N, C), how many queries each item asks there.
    seed: of the resampling.

  Returns: (resamples, C) float64, Σ values / Σ counts; NaN where no query was drawn.
  """
  values = np.ascontiguousarray(values, np.float32)
  counts = np.ascontiguousarray(counts, np.float32)
  out = [
    (weights @ values, weights @ counts)
    for weights in _weights(len(values), resamples, seed)
  ]
  total = np.concatenate([v for v, _ in out]).astype(np.float64)
  count = np.concatenate([c for _, c in out]).astype(np.float64)
  return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _weights(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
  """How often each of n items is drawn, (b, n) float32 for b resamples at a time."""
  rng = np.random.default_rng(seed)
  step = max(1, min(resamples, BLOCK_ENTRIES // max(1, n)))
  for start in range(0, resamples, step):
    b = min(step, resamples - start)
    drawn = rng.integers(0, n, (b, n)) + n * np.arange(b)[:, None]
    yield np.bincount(drawn.ravel(), minlength=b * n).reshape(b, n).astype(np.float32)


def interval(samples: np.ndarray) -> list[float] | None:
  """The central 95 % of bootstrap samples (resamples,); None without any."""
  samples = samples[np.isfinite(samples)]
  if not len(samples):
    return None
  return [float(x) for x in np.percentile(samples, [2.5, 97.5])]


def standard_error(samples: np.ndarray) -> float | None:
  """The standard deviation of bootstrap samples (resamples,); None without any."""
  samples = samples[np.isfinite(samples)]
  return float(samples.std()) if len(samples) else None


def center(documents: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Subtracts the mean of the unit documents (N, D) of one modality from them and from
  the queries (Q, D) of that modality, and renormalises: GR-CLIP (arXiv 2507.19054).

  A row that becomes zero stays zero.
  """
  if not len(documents):
    return documents, queries
  mean = documents.mean(axis=0, dtype=np.float64).astype(np.float32)
  return _unit(documents - mean), _unit(queries - mean)


def _unit(rows: np.ndarray) -> np.ndarray:
  return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def modality_gap(
  banks: Sequence[np.ndarray],
  has: Sequence[np.ndarray],
  names: Sequence[str],
  *,
  centered: bool = False,
) -> dict:
  """How far apart the modalities of the same items lie.

  ‖Δ‖ = ‖mean_a − mean_b‖ of the unit banks (Mind the Gap, NeurIPS 2022), the norm of
  each mean, the cosine of two means (arXiv 2509.25638 section 4.6), and the mean cosine
  of true pairs. The cosine of means is None where a mean is shorter than 0.1 or after
  centring: the direction of a mean near zero says nothing.

  Args:
    banks: one (N, D) array of unit rows per modality; row k is item k's.
    has: one bool (N,) per modality: which rows exist.
    names: one name per modality.
  """
  means = [
    bank[mask].mean(axis=0, dtype=np.float64) if mask.any() else None
    for bank, mask in zip(banks, has, strict=True)
  ]
  norms = [None if mean is None else float(np.linalg.norm(mean)) for mean in means]
  gap = {
    "delta": {},
    "cosine": {},
    "pair_cosine": {},
    "norm": dict(zip(names, norms, strict=True)),
  }
  for a in range(len(names)):
    for b in range(a + 1, len(names)):
      key = f"{names[a]}-{names[b]}"
      none = means[a] is None or means[b] is None
      gap["delta"][key] = None if none else float(np.linalg.norm(means[a] - means[b]))
      small = none or centered or min(norms[a], norms[b]) < MIN_NORM
      gap["cosine"][key] = (
        None if small else float(means[a] @ means[b] / (norms[a] * norms[b]))
      )
      both = has[a] & has[b]
      cosines = np.einsum("nd,nd->n", banks[a][both], banks[b][both])
      gap["pair_cosine"][key] = float(cosines.mean()) if len(cosines) else None
  return gap
