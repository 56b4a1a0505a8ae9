"""The document banks as points of a plane, to look at the modality gap."""

from __future__ import annotations

import numpy as np

from gcl_jax.evaluation.banks import MODALITIES

DIGITS = 3


def sketch(documents: np.ndarray, has: np.ndarray, limit: int) -> dict:
  """Projects the three banks on the two directions in which they differ most.

  The axes are the first two principal components of all documents together; the points
  are those of the first `limit` items (items stand in the order of a hash, so that they
  are a sample, and the same one for every model).

  Args:
    documents: (3, N, D) float32 unit rows.
    has: (3, N) bool, which of them exist.
    limit: items shown.

  Returns: by modality {"x", "y": lists of one number an item shown, "mean": [x, y] of
    the whole bank, None for an empty one}, and "explained": [first, second], the axes'
    shares of the variance in percent. Coordinates are distances between unit vectors.
  """
  rows = documents[has].astype(np.float64)
  middle = rows.mean(axis=0)
  rows -= middle
  variances, axes = np.linalg.eigh(rows.T @ rows)
  axes = axes[:, ::-1][:, :2]  # (D, 2), the largest first
  # Either sign is an eigenvector: the largest entry is made positive.
  axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])])
  total = max(variances.sum(), 1e-12)
  out: dict = {"explained": _rounded(100 * variances[::-1][:2] / total)}
  for m, name in enumerate(MODALITIES):
    shown = documents[m, :limit][has[m, :limit]]
    x, y = ((shown - middle) @ axes).T
    bank = documents[m][has[m]]
    mean = (bank.mean(axis=0) - middle) @ axes if len(bank) else None
    out[name] = {
      "x": _rounded(x),
      "y": _rounded(y),
      "mean": None if mean is None else _rounded(mean),
    }
  return out


def _rounded(values: np.ndarray) -> list[float]:
  return [round(float(value), DIGITS) for value in values]
