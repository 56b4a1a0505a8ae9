"""The pipeline: one number of state, exact restore, any number of processes."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
from PIL import Image

from gcl_jax.data import BadRecord, Pipeline
from gcl_jax.data.pair_ids import hash31
from gcl_jax.errors import UserError
from gcl_jax.sharding import Share

RECORDS, VIEWS, TEXTS = 23, 3, 4


class Listed:
  """Records whose picture's colour is (10 * record, 40 * view, 7)."""

  def __init__(self, records=RECORDS, broken=(), wordless=(), pictureless=()):
    self.records, self.broken = records, set(broken)
    self.wordless, self.pictureless = set(wordless), set(pictureless)
    self.reads = []

  def __len__(self):
    return self.records

  def __getitem__(self, i):
    self.reads.append(i)
    if i in self.broken:
      raise BadRecord("torn in two")
    colours = [(10 * i, 40 * v, 7) for v in range(VIEWS)]
    images = [Image.new("RGB", (20, 16), colour) for colour in colours]
    return {
      "id": f"r{i}",
      "images": [] if i in self.pictureless else images,
      "texts": [] if i in self.wordless else [f"{i} {'x' * k}" for k in range(TEXTS)],
      "group": f"g{i}",
    }


@pytest.fixture
def make(processor):
  """A function that opens a pipeline; all are closed at the end."""
  opened = []

  def make(source=None, **options):
    options = {"batch_size": 8, "seed": 3, "threads": 2, "prefetch": 3} | options
    if "process_count" in options:
      mine = (options.pop("process_index", 0),)
      options["share"] = Share(mine, options.pop("process_count"))
    pipeline = Pipeline(source or Listed(), processor, **options)
    opened.append(pipeline)
    return pipeline

  yield make
  for pipeline in opened:
    pipeline.close()


def take(pipeline, count):
  return list(itertools.islice(pipeline, count))


def assert_same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def draws(batch):
  """(record, view, caption) of every row, the view read off the picture."""
  view = batch["pixels"][:, 8, 8, 1] // 40
  return [
    tuple(int(x) for x in row)
    for row in zip(batch["index"], view, batch["caption_index"], strict=True)
  ]


def test_shapes_and_types(make):
  batch = next(make())
  assert {name: (a.shape, str(a.dtype)) for name, a in batch.items()} == {
    "pixels": ((8, 16, 16, 3), "uint8"),
    "tokens": ((8, 16), "int32"),
    "has_image": ((8,), "bool"),
    "has_text": ((8,), "bool"),
    "pair_ids": ((8, 2), "int32"),
    "index": ((8,), "int64"),
    "caption_index": ((8,), "int32"),
  }


def test_rows_are_what_the_record_says(make, processor):
  batch = next(make())
  for row, (record, _, said) in enumerate(draws(batch)):
    assert batch["pixels"][row, 0, 0, 0] == 10 * record
    text = f"{record} {'x' * said}"
    np.testing.assert_array_equal(
      batch["tokens"][row], processor.tokenizer([text], batch["tokens"].shape[1])[0]
    )
    assert list(batch["pair_ids"][row]) == [
      hash31(f"g{record}"),
      hash31(f"caption\0{text.strip()}"),
    ]


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_restored_at_every_step_it_goes_on_the_same(make, augment):
  count = 7  # more than two epochs
  straight = make(augment=augment)
  whole, positions = [], []
  for batch in itertools.islice(straight, count):
    whole.append(batch)
    positions.append(straight.position)
  assert positions == [8 * (step + 1) for step in range(count)]
  for step in range(count - 1):
    again = make(augment=augment, position=positions[step], threads=step % 3)
    for expected, got in zip(whole[step + 1 :], again, strict=False):
      assert_same(expected, got)
    again.close()


def test_position_counts_what_was_handed_out_not_what_was_read_ahead(make):
  source = Listed()
  pipeline = make(source, prefetch=4)
  next(pipeline)
  assert pipeline.position == 8
  for _ in range(200):
    if len(source.reads) > 8:
      break
    threading.Event().wait(0.01)
  assert len(source.reads) > 8  # it did read ahead
  assert pipeline.position == 8


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_hold_the_global_batch(make, processes):
  whole = take(make(augment="crop_flip", buckets=(20,)), 7)
  parts = [
    take(
      make(
        augment="crop_flip",
        buckets=(16, 20),
        process_index=p,
        process_count=processes,
      ),
      7,
    )
    for p in range(processes)
  ]
  for step, batch in enumerate(whole):
    joined = {name: np.concatenate([part[step][name] for part in parts]) for name in batch}
    assert_same(batch, joined)


def test_of_a_batch_that_is_cut_every_process_has_a_share_of_each_piece(make):
  whole = next(make(batch_size=12, buckets=(20,)))
  options = {"batch_size": 12, "process_count": 2, "cuts": 3, "buckets": (20,)}
  for p, rows in enumerate(([0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11])):
    pipeline = make(process_index=p, **options)
    assert pipeline.rows_of_batch.tolist() == rows
    batch = next(pipeline)
    np.testing.assert_array_equal(batch["index"], whole["index"][rows])
    np.testing.assert_array_equal(batch["pixels"], whole["pixels"][rows])


def test_a_share_may_be_scattered(make):
  """As a host's chips are, in a mesh that follows a torus."""
  whole = next(make(buckets=(20,)))
  for held, rows in (((0, 2), [0, 1, 4, 5]), ((1, 3), [2, 3, 6, 7])):
    pipeline = make(share=Share(held, 4), buckets=(20,))
    assert pipeline.rows_of_batch.tolist() == rows
    np.testing.assert_array_equal(next(pipeline)["index"], whole["index"][rows])


def test_another_number_of_processes_goes_on_from_the_same_position(make):
  one = make(buckets=(20,))
  take(one, 3)
  expected = next(one)
  options = {"buckets": (20,), "position": 24, "process_count": 4}
  parts = [next(make(process_index=p, **options)) for p in range(4)]
  for p, part in enumerate(parts):
    mine = slice(2 * p, 2 * p + 2)
    np.testing.assert_array_equal(part["pixels"], expected["pixels"][mine])
    np.testing.assert_array_equal(part["tokens"], expected["tokens"][mine])


def test_another_batch_size_goes_on_from_the_same_position(make):
  flat = np.concatenate([b["index"] for b in take(make(batch_size=6), 6)])
  small = make(batch_size=6)
  take(small, 2)
  rest = make(batch_size=4, position=small.position)
  np.testing.assert_array_equal(
    np.concatenate([b["index"] for b in take(rest, 6)]), flat[12:36]
  )


def test_every_record_once_an_epoch_and_epochs_without_a_gap(make):
  seen = np.concatenate([batch["index"] for batch in take(make(), 23)])
  epochs = seen.reshape(8, RECORDS)  # 23 batches of 8: an epoch ends inside a batch
  for epoch in epochs:
    assert sorted(epoch) == list(range(RECORDS))
  assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_draws_differ_between_epochs_and_use_every_view_and_caption(make):
  found = [draw for batch in take(make(), 46) for draw in draws(batch)]
  first, second = found[:RECORDS], found[RECORDS : 2 * RECORDS]
  same = len(set(first) & set(second))
  assert same < RECORDS / 2  # one in twelve by chance
  assert {view for _, view, _ in found} == set(range(VIEWS))
  assert {said for _, _, said in found} == set(range(TEXTS))


def test_a_draw_depends_on_seed_epoch_and_record_alone(make):
  def of_first_epoch(**options):
    batches = take(make(**options), -(-RECORDS // options["batch_size"]))
    rows = [draw for batch in batches for draw in draws(batch)]
    return sorted(rows[:RECORDS]), rows[:RECORDS]

  ours, order = of_first_epoch(batch_size=8, threads=2)
  assert of_first_epoch(batch_size=5, threads=0) == (ours, order)
  other, other_order = of_first_epoch(batch_size=8, seed=4)
  assert other != ours
  assert [r for r, _, _ in other_order] != [r for r, _, _ in order]


def test_neighbouring_seeds_do_not_share_orders(make):
  # Grain adds the epoch to the seed of a shuffle.
  def orders(seed):
    rows = np.concatenate([b["index"] for b in take(make(seed=seed, batch_size=23), 3)])
    return {tuple(epoch) for epoch in rows.reshape(3, RECORDS)}

  assert not orders(0) & orders(1)


def test_one_record_is_enough(make):
  batches = take(make(Listed(1), batch_size=1), 3)
  assert [int(b["index"][0]) for b in batches] == [0, 0, 0]


def test_tokens_are_cut_to_the_smallest_bucket_that_holds_them(make, processor):
  class Worded(Listed):
    def __getitem__(self, i):
      return super().__getitem__(i) | {"texts": ["b" * (i + 1)]}

  source = Worded(30)
  for batch in take(make(source, batch_size=2, buckets=(4, 8, 77)), 15):
    longest = min(20, max(int(i) for i in batch["index"]) + 3)  # start, letters, end
    expected = next(bucket for bucket in (4, 8, 20) if bucket >= longest)
    assert batch["tokens"].shape == (2, expected)
    assert (batch["tokens"] == processor.tokenizer.eos_id).any(axis=1).all()


def test_texts_beyond_the_largest_bucket_keep_their_end(make, processor):
  batch = next(make(buckets=(4,)))
  assert batch["tokens"].shape == (8, 4)
  assert (batch["tokens"][:, -1] == processor.tokenizer.eos_id).any()
  assert (batch["tokens"] == processor.tokenizer.eos_id).any(axis=1).all()


def test_texts_that_are_cut_are_counted_once_they_are_handed_out(make, processor):
  class Worded(Listed):
    def __getitem__(self, i):
      images = super().__getitem__(i)["images"] if i % 2 else []
      return {"id": f"r{i}", "texts": ["b" * (i + 1)], "images": images}

  options = {"batch_size": 2, "buckets": (12,), "threads": 1}
  alone, beside = make(Worded(20), **options), make(Worded(20), pair_length=8, **options)
  cut, cut_beside = 0, 0
  for batch, same in zip(take(alone, 10), take(beside, 10), strict=True):
    assert_same(batch, same)
    lengths = batch["index"] + 3  # start, letters, end
    cut += (lengths > 12).sum()
    cut_beside += ((lengths > 12) | (batch["has_image"] & (lengths > 8))).sum()
  assert alone.texts_cut == cut == 10
  assert beside.texts_cut == cut_beside == 12
  before = make(Worded(20), **options)
  assert before.texts_cut == 0 and next(before) and before.texts_cut <= 2


def test_processes_agree_on_the_width(make):
  options = {"buckets": (7, 10, 20), "batch_size": 2, "process_count": 2}
  alone = make(process_index=0, **options)
  assert {b["tokens"].shape[1] for b in take(alone, 6)} == {20}
  asked = []

  def agree(longest):
    asked.append(longest)
    return max(longest, 9)  # what an all-gather would say

  told = make(process_index=0, agree=agree, **options)
  assert {b["tokens"].shape[1] for b in take(told, 6)} == {10}
  assert len(asked) == 6 and set(asked) <= {3, 4, 5, 6, 7} and len(set(asked)) > 1


def test_a_bad_record_is_a_padding_row_in_its_place(make):
  good = take(make(), 6)
  pipeline = make(Listed(broken=(4, 17)))
  batches = take(pipeline, 6)
  ids, bad = [], 0
  for whole, batch in zip(good, batches, strict=True):
    np.testing.assert_array_equal(whole["index"], batch["index"])
    broken = np.isin(batch["index"], (4, 17))
    bad += broken.sum()
    for name in ("has_image", "has_text"):
      np.testing.assert_array_equal(batch[name], ~broken)
    assert not batch["pixels"][broken].any()
    np.testing.assert_array_equal(batch["pixels"][~broken], whole["pixels"][~broken])
    assert (batch["pair_ids"][broken] < 0).all()
    assert (batch["pair_ids"][~broken] >= 0).all()
    ids += [tuple(row) for row in batch["pair_ids"][broken]]
  assert bad >= 4 and len(set(ids)) == bad
  assert pipeline.bad_count == bad
  assert len(pipeline.recent_errors()) == bad
  assert all("torn in two" in message for message in pipeline.recent_errors())


def test_bad_records_read_ahead_are_not_counted_yet(make):
  pipeline = make(Listed(broken=range(RECORDS)), prefetch=4)
  next(pipeline)
  threading.Event().wait(0.1)
  assert pipeline.bad_count == 8


def test_a_picture_that_cannot_be_read_is_a_padding_row(make, processor):
  class Torn(Listed):
    def __getitem__(self, i):
      record = super().__getitem__(i)
      return record | ({"images": [b"<html>404</html>"]} if i == 5 else {})

  pipeline = make(Torn(8))
  batch = next(pipeline)
  row = int(np.flatnonzero(batch["index"] == 5)[0])
  assert batch["has_image"].sum() == batch["has_text"].sum() == 7
  assert not batch["has_image"][row] and not batch["has_text"][row]
  (message,) = pipeline.recent_errors()
  assert message.startswith("r5: ") and len(message) <= 300


def test_our_own_bugs_are_not_taken_for_bad_records(make):
  class Buggy(Listed):
    def __getitem__(self, i):
      raise AttributeError("a bug")

  with pytest.raises(AttributeError, match="a bug"):
    next(make(Buggy()))


def test_records_without_image_or_text_are_no_errors(make):
  pipeline = make(Listed(wordless=(1, 2), pictureless=(3,)), batch_size=23)
  batch = next(pipeline)
  by_record = np.argsort(batch["index"])
  assert pipeline.bad_count == 0
  np.testing.assert_array_equal(np.flatnonzero(~batch["has_text"][by_record]), [1, 2])
  np.testing.assert_array_equal(np.flatnonzero(~batch["has_image"][by_record]), [3])
  ids = batch["pair_ids"][by_record]
  assert ids[1, 1] == hash31("id\0r1") != ids[2, 1]
  assert batch["caption_index"][by_record][1] == -1


def test_a_record_with_neither_is_bad(make):
  pipeline = make(Listed(wordless=(1,), pictureless=(1,)), batch_size=23)
  next(pipeline)
  assert pipeline.bad_count == 1


def test_iterating_again_and_closing(make):
  with make() as whole:
    straight = take(whole, 4)
  pipeline = make()
  for batch in pipeline:
    assert_same(straight[0], batch)
    break
  assert_same(straight[1], next(iter(pipeline)))
  pipeline.close()
  pipeline.close()
  assert_same(straight[2], next(pipeline))
  with pipeline:
    assert_same(straight[3], next(pipeline))
  threads = [t for t in threading.enumerate() if "grain" in t.name and t.is_alive()]
  for thread in threads:
    thread.join(5)
  assert not [t for t in threads if t.is_alive()]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_size": 6, "process_count": 4}, "4 equal parts; 8 can"),
    ({"batch_size": 0}, "cannot be cut"),
    ({"batch_size": 24}, "more than the 23 records"),
    ({"augment": "flipp"}, 'did you mean "flip"'),
    ({"crop_scale": (0.5, 2.0), "augment": "crop"}, "crop_scale"),
    ({"seed": -1}, "config.seed"),
    ({"buckets": (1, 77)}, "text_buckets"),
  ],
)
def test_bad_options(make, options, message):
  with pytest.raises(UserError, match=message):
    make(**options)
