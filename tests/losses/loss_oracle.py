"""The losses in float64 NumPy, written from the equations and nothing else.

Loops over anchors and candidates, no log-sum-exp identities, no shared code: slow and
plain on purpose. `central_differences` differentiates anything of it.
"""

from __future__ import annotations

import itertools

import numpy as np

DENOMINATORS = ("self_masked", "literal", "clean", "cross_only", "target_only")


def unit(rows):
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def mixed(image, text, alpha, beta):
  """The fused bank of two weights per pair."""
  return alpha[:, None] * image + beta[:, None] * text


def related(ids):
  """(n, n): pairs that are neither positive nor negative, as any column agrees."""
  return np.any(ids[:, None] == ids[None], axis=-1)


def log_sum(logits):
  """log Σ exp, shifted by the largest."""
  logits = np.asarray(logits, np.float64)
  return logits.max() + np.log(np.sum(np.exp(logits - logits.max())))


def in_denominator(name, a, b, m, same_pair):
  """Whether a candidate of modality m stands in the denominator of (a, b)."""
  if same_pair:
    if m == b:
      return True
    if m == a:
      return name == "literal"
    return name in ("self_masked", "literal", "cross_only")
  if name == "target_only":
    return m == b
  return not (name == "cross_only" and m == a)


def gcl(image, text, fused, scale, denominator="self_masked", weights=None, **who):
  """(loss, directions (3, 3)); `fused` is a bank; ids, has_image, has_text in `who`."""
  return gcl_function(len(image), denominator, weights, **who)(
    image, text, fused, scale
  )


def gcl_function(
  n, denominator="self_masked", weights=None, ids=None, has_image=None, has_text=None
):
  """`gcl` with who stands in which denominator decided once, one by one."""
  weights = np.ones((3, 3)) if weights is None else np.asarray(weights, np.float64)
  weights = np.where(np.eye(3), 0, weights)
  ids = (np.arange(n) if ids is None else np.asarray(ids)).reshape(n, -1)
  has_image = np.ones(n, bool) if has_image is None else np.asarray(has_image)
  has_text = np.ones(n, bool) if has_text is None else np.asarray(has_text)
  alike = related(ids)
  there = [has_image, has_text, has_image & has_text]
  terms = []  # (a, b, j, rows of the stacked banks in the denominator)
  for a, b in itertools.permutations(range(3), 2):
    for j in range(n):
      if there[a][j] and there[b][j]:
        members = [
          m * n + k
          for m in range(3)
          for k in range(n)
          if there[m][k]
          and (k == j or not alike[j, k])
          and in_denominator(denominator, a, b, m, k == j)
        ]
        terms.append((a, b, j, members))

  def function(image, text, fused, scale):
    stacked = np.concatenate([image, text, fused]).astype(np.float64)
    logits = scale * stacked @ stacked.T
    sums, counts = np.zeros((3, 3)), np.zeros((3, 3))
    for a, b, j, members in terms:
      row = logits[a * n + j]
      sums[a, b] += log_sum(row[members]) - row[b * n + j]
      counts[a, b] += 1
    total = np.sum(weights * counts)
    loss = np.sum(weights * sums) / total if total else 0.0
    return loss, np.divide(sums, counts, out=np.zeros((3, 3)), where=counts > 0)

  return function


def contrastive(image, text, scale, ids=None, has_image=None, has_text=None):
  """Equation 1 of the paper: the mean of two cross-entropies."""
  only = np.zeros((3, 3))
  only[0, 1] = only[1, 0] = 1
  zeros = np.zeros_like(image)
  who = {"ids": ids, "has_image": has_image, "has_text": has_text}
  loss, directions = gcl(image, text, zeros, scale, "target_only", only, **who)
  return loss, directions * only


def separation(image, text, features, scale, ids=None, has_image=None, has_text=None):
  """AlignCLIP's term; features None: d = 1."""
  n = len(image)
  ids = (np.arange(n) if ids is None else np.asarray(ids)).reshape(n, -1)
  has_image = np.ones(n, bool) if has_image is None else np.asarray(has_image)
  has_text = np.ones(n, bool) if has_text is None else np.asarray(has_text)
  alike = related(ids)
  losses = []
  for j in np.flatnonzero(has_image & has_text):
    positive = scale * np.dot(image[j], text[j])
    logits = [positive]
    for k in np.flatnonzero(has_image):
      if alike[j, k]:
        continue
      distance = 1.0
      if features is not None and has_text[k]:
        lengths = np.linalg.norm(features[j]) * np.linalg.norm(features[k])
        distance = 1 - np.dot(features[j], features[k]) / lengths
      logits.append(scale * distance * np.dot(image[j], image[k]))
    losses.append(log_sum(logits) - positive)
  return np.mean(losses) if losses else 0.0


def affinity(
  student, teacher, scale, teacher_scale, weights=None, has_image=None, has_text=None
):
  """(loss, directions): cross entropies of `student` under `teacher`, three banks each."""
  n = len(student[0])
  weights = np.ones((3, 3)) if weights is None else np.asarray(weights, np.float64)
  weights = np.where(np.eye(3), 0, weights)
  has_image = np.ones(n, bool) if has_image is None else np.asarray(has_image)
  has_text = np.ones(n, bool) if has_text is None else np.asarray(has_text)
  there = [has_image, has_text, has_image & has_text]
  sums, counts = np.zeros((3, 3)), np.zeros((3, 3))
  for a, b in itertools.permutations(range(3), 2):
    candidates = np.flatnonzero(there[b])
    for j in np.flatnonzero(there[a]):
      if not len(candidates):
        continue
      logits = [scale * np.dot(student[a][j], student[b][k]) for k in candidates]
      wanted = [
        teacher_scale * np.dot(teacher[a][j], teacher[b][k]) for k in candidates
      ]
      log_affinity = np.array(logits) - log_sum(logits)
      affinity = np.exp(np.array(wanted) - log_sum(wanted))
      sums[a, b] -= np.sum(affinity * log_affinity)
      counts[a, b] += 1
  total = np.sum(weights * counts)
  loss = np.sum(weights * sums) / total if total else 0.0
  return loss, np.divide(sums, counts, out=np.zeros((3, 3)), where=counts > 0)


def central_differences(function, arrays, step=1e-6):
  """Gradients of a scalar function of float64 arrays, entry by entry."""
  arrays = [np.array(array, np.float64) for array in arrays]
  gradients = []
  for array in arrays:
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
      kept = array[index]
      array[index] = kept + step
      above = function(*arrays)
      array[index] = kept - step
      below = function(*arrays)
      array[index] = kept
      gradient[index] = (above - below) / (2 * step)
    gradients.append(gradient)
  return gradients


def error(value, reference):
  """max|Δ| / max|reference|."""
  value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
  assert value.shape == reference.shape
  assert np.all(np.isfinite(value)), value
  return np.max(np.abs(value - reference)) / np.max(np.abs(reference))
