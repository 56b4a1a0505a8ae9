"""Which rows are train and which eval."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from gcl_jax.data import open_source
from gcl_jax.data.splits import choose_rows, group_hash
from gcl_jax.errors import UserError


def choose(split, stored, groups=None, fraction=0.5):
  names = tuple(dict.fromkeys(stored))
  groups = groups or [f"g{i}" for i in range(len(stored))]
  rows = choose_rows(
    split,
    names=names,
    codes=np.array([names.index(s) for s in stored]),
    groups=np.array([group_hash(g) for g in groups], np.uint64),
    eval_fraction=fraction,
    where="it",
  )
  return rows.tolist()


def test_stored_names_win():
  stored = ["train", "dev", "test", "train", "extra"]
  assert choose("train", stored) == [0, 3]
  assert choose("eval", stored) == choose("test", stored) == [2]
  assert choose("dev", stored) == [1]
  assert choose("extra", stored) == [4]
  assert choose("all", stored) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["dev", "val", "validation", "eval"])
def test_eval_without_test(name):
  stored = ["train", name, "train"]
  assert choose("eval", stored) == [1]
  assert choose("train", stored) == [0, 2]


def test_train_without_that_name_is_what_is_left():
  assert choose("train", ["", "test", "dev", "", "extra"]) == [0, 3, 4]


def test_only_train_stored_gives_up_a_part():
  stored = ["train"] * 200
  train, evaluation = choose("train", stored), choose("eval", stored)
  assert sorted(train + evaluation) == list(range(200))
  assert 70 < len(evaluation) < 130


def test_the_part_is_by_sha256_of_the_group():
  groups = [f"photo{i // 3}.jpg" for i in range(900)]
  stored = [""] * 900
  evaluation = choose("eval", stored, groups, 0.1)
  expected = [
    i
    for i, group in enumerate(groups)
    if int(hashlib.sha256(group.encode()).hexdigest(), 16) / 2**256 < 0.1
  ]
  assert evaluation == expected
  assert 45 < len(evaluation) < 150
  train = choose("train", stored, groups, 0.1)
  assert not {groups[i] for i in train} & {groups[i] for i in evaluation}
  assert len(train) + len(evaluation) == 900


@pytest.mark.parametrize(
  ("split", "stored", "message"),
  [
    ("tets", ["train", "test"], 'no split "tets", did you mean "test".* train, test, '),
    ("test", ["", ""], "Splits: train, eval, all"),
    ("train", ["test", "test"], "no rows for split"),
  ],
)
def test_unknown_or_empty(split, stored, message):
  with pytest.raises(UserError, match=message):
    choose(split, stored)


def test_an_empty_part_says_what_to_change():
  with pytest.raises(UserError, match=r"eval_fraction=1e-09"):
    choose("eval", [""] * 5, fraction=1e-9)


def test_flickr8k(real_data):
  data = {"path": str(real_data / "flickr8k")}
  sources = {s: open_source(data, split=s) for s in ("train", "dev", "test", "eval")}
  sizes = {split: len(source) for split, source in sources.items()}
  assert sizes == {"train": 5499, "dev": 1000, "test": 1000, "eval": 1000}
  record = sources["eval"][0]
  assert record["split"] == "test" and len(record["texts"]) == 5
  with open(record["images"][0], "rb") as file:
    assert file.read(2) == b"\xff\xd8"


def test_emoji_splits_by_the_groups_of_its_test_queries(real_data):
  data = {"path": str(real_data / "emoji")}
  train, evaluation = (open_source(data, split=s) for s in ("train", "eval"))
  table = [json.loads(r) for r in (real_data / "emoji/captions.jsonl").open()]
  queries = [json.loads(r) for r in (real_data / "emoji/composed.jsonl").open()]
  group_of = {row["image"]: row["group"] for row in table}
  expected = {group_of[q["reference"]] for q in queries if q["split"] == "test"}
  groups = [{r["group"] for r in source} for source in (train, evaluation)]
  assert groups[1] == expected and not groups[0] & groups[1]
  assert len(train) + len(evaluation) == 5484 and len(evaluation) == 4 * len(expected)
  assert evaluation[0]["images"][0][:4] == b"RIFF"  # WebP, out of the zip
