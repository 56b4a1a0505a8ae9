"""Batches that the loss tests share: clean random ones and a messy one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from loss_oracle import unit


class Case(NamedTuple):
  """float32 inputs of the losses. Absent entries are NaN or inf in image and text."""

  image: np.ndarray
  text: np.ndarray
  fused: np.ndarray
  alpha: np.ndarray
  beta: np.ndarray
  options: dict  # pair_ids, has_image, has_text

  def for_oracle(self):
    """image, text, fused, alpha, beta in float64 with zeros where nothing is."""
    return tuple(np.nan_to_num(x.astype(np.float64), posinf=0) for x in self[:5])

  def oracle_options(self):
    options = dict(self.options)
    if "pair_ids" in options:
      options["ids"] = options.pop("pair_ids")
    return options


def clean(n=6, width=4, seed=0):
  """n pairs of related unit vectors; the fused bank is unrelated to alpha and beta."""
  rng = np.random.default_rng(seed)
  image = unit(rng.normal(size=(n, width)))
  text = unit(image + 0.7 * rng.normal(size=(n, width)))
  fused = unit(image + text + 0.3 * rng.normal(size=(n, width)))
  alpha, beta = rng.uniform(0.3, 0.9, (2, n))
  arrays = (x.astype(np.float32) for x in (image, text, fused, alpha, beta))
  return Case(*arrays, {})


def messy(width=4, seed=1):
  """Eight rows: two without text, one without image, one padding; duplicate ids.

  Rows 0 and 1 share a photograph, rows 1 and 2 a caption: 0 and 2 stay negatives.
  """
  case = clean(8, width, seed)
  has_image = np.array([1, 1, 1, 0, 1, 1, 1, 0], bool)
  has_text = np.array([1, 1, 1, 1, 0, 1, 0, 0], bool)
  ids = np.array(
    [[7, 20], [7, 21], [8, 21], [9, 22], [10, 23], [11, 24], [12, 20], [7, 20]],
    np.int32,
  )
  both = has_image & has_text
  for rows, there in zip(
    case[:5], (has_image, has_text, both, both, both), strict=True
  ):
    rows[~there] = np.nan
    rows[7] = np.inf
  return case._replace(
    options={"pair_ids": ids, "has_image": has_image, "has_text": has_text}
  )


def sixteen():
  """Two messy batches, the second under other ids: two rows a device."""
  first, second = messy(seed=1), messy(seed=2)
  arrays = [np.concatenate(pair) for pair in zip(first[:5], second[:5], strict=True)]
  options = {
    name: np.concatenate([first.options[name], second.options[name]])
    for name in first.options
  }
  options["pair_ids"][8:, 0] += 100
  return Case(*arrays, options)


WEIGHTS = np.array([[9, 1, 0.5], [2, np.inf, 0], [0.25, 3, -4]], np.float32)

# The engines. Blocks of three rows: the batches above make whole and broken ones.
FORMS = {
  "dense": {"form": "dense"},
  "streaming": {"form": "streaming", "block_size": 3},
}
