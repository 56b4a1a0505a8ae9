"""Ids of pairs: same photo, same caption, and nothing else."""

from __future__ import annotations

import hashlib

import numpy as np

from gcl_jax.data import collapse, pair_ids
from gcl_jax.data.pair_ids import padding_ids


def test_columns_are_31_bits_of_sha256():
  ids = pair_ids("photo.jpg", "A  dog\n runs", "7")
  assert ids.dtype == np.int32
  for value, name in zip(ids, ["photo.jpg", "caption\0a dog runs"], strict=True):
    digest = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    assert value == digest % 2**31


def test_the_relation_is_not_transitive():
  a = pair_ids("one", "a dog", "1")
  b = pair_ids("one", "a cat", "2")
  c = pair_ids("two", "A  Cat ", "3")
  assert (a == b).any() and (b == c).any() and not (a == c).any()


def test_without_captions_records_differ():
  a, b = pair_ids("one", None, "1"), pair_ids("two", None, "2")
  assert not (a == b).any()
  assert not (pair_ids("one", "1", "x") == pair_ids("two", None, "1")).any()


def test_blanks_and_case():
  assert collapse("  Der  große\tHund ") == collapse("der GROSSE hund")
  assert collapse("a dog") != collapse("a  dogs")


def test_padding_is_negative_and_unique():
  positions = [0, 1, 2, 2**31 - 1, 5_000_000_000]
  ids = np.stack([padding_ids(p) for p in positions])
  assert (ids < 0).all() and len(np.unique(ids)) == len(positions)


def test_any_text_has_an_id():
  assert pair_ids("\ud800", "half \udc00", "x").shape == (2,)
