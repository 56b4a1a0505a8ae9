"""Whether a model's similarities rank pairs as people do."""

from __future__ import annotations

from typing import Any

import numpy as np

from gcl_jax.evaluation.benchmarks.embedding import Bank
from gcl_jax.evaluation.benchmarks.task import Agreement


def agree(task: Agreement, images: Bank, texts: Bank) -> dict[str, Any]:
  """Kendall's tau-c of cosine similarity with the judges' scores.

  Every judge's score is a pair of its own, as CLIPScore counts (Hessel et al., 2021);
  `foreign_texts` leaves out the pairs of an image with a text written for it.
  """
  from scipy.stats import kendalltau

  there = images.there[task.pairs[:, 0]] & texts.there[task.pairs[:, 1]]
  pairs, scores = task.pairs[there], task.scores[there]
  cosines = np.einsum("pd,pd->p", images.unit(pairs[:, 0]), texts.unit(pairs[:, 1]))

  def tau(rows: np.ndarray) -> dict[str, Any]:
    judged = scores[rows]
    flat = np.repeat(cosines[rows], judged.shape[1])
    mean = kendalltau(cosines[rows], judged.mean(axis=1), variant="c").statistic
    return {
      "pairs": int(rows.sum()),
      "tau_c": float(kendalltau(flat, judged.ravel(), variant="c").statistic),
      "tau_c_of_mean_score": float(mean),
    }

  left_out = int((~there).sum())
  return {
    "images": len(task.images),
    "texts": len(task.texts),
    "all": tau(np.ones(len(pairs), bool)),
    "foreign_texts": tau(~task.own[there]),
    "partial": {"pairs_left_out": left_out} if left_out else None,
  }
