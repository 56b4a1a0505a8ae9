"""From a source to batches of arrays, by one Grain pipeline whose state is one number.

The order is: shuffled index of every epoch, a generator per (seed, epoch, record), the
slice of this process, reading and drawing, batching. Since all that is random is fixed
before the slice, the global batch is the same for any number of processes and threads.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gcl_jax.data.augment import make_augment
from gcl_jax.data.pair_ids import padding_ids, pair_ids
from gcl_jax.data.record import BadRecord, Source
from gcl_jax.errors import UserError
from gcl_jax.sharding import Share

Batch = dict[str, np.ndarray]
_ALL = Share()
DEFAULT_BUCKETS = (16, 24, 32, 48, 77)
_RECENT = 20
_MESSAGE = 300


class _Place(NamedTuple):
  position: int  # global, from the start of the first epoch
  index: int  # of the record in its source


class _Row(NamedTuple):
  place: _Place
  pixels: np.ndarray | None
  caption: str | None
  ids: np.ndarray
  caption_index: int
  error: str


class _Collated(NamedTuple):
  batch: Batch
  longest: int  # tokens of the longest text
  errors: list[str]
  cut: int  # texts


class Pipeline:
  """Batches of this process, without end; an iterator.

  A batch is a dict of numpy arrays of n rows, our share of the batch size:
    pixels uint8 (n, S, S, 3); tokens int32 (n, L); has_image, has_text bool (n,);
    pair_ids int32 (n, 2); index int64 (n,), the record's place in the source;
    caption_index int32 (n,), which of its texts, -1 for none.
  `rows_of_batch` are their places in the global batch. A record that cannot be read is
  a row with neither image nor text, and ids like no other row's.

  L is the smallest bucket that holds the batch's longest text. Processes must agree on
  it: with several, it is the largest bucket unless `agree` is given.

  Iterating again goes on where it was; so does a new pipeline at `position`, whatever
  its number of processes. `close` ends the threads; iterating starts them again.

  Args:
    source: random access to records; read by several threads.
    processor: of `gcl_jax.processing`: how pictures and texts become arrays.
    batch_size: global rows.
    seed: of the order and of every draw, 0 to 2^32 - 1.
    augment: none, crop, flip or crop_flip; see `make_augment`.
    crop_scale: part of the area that a crop keeps.
    buckets: token lengths to cut to. Those above the tokenizer's maximum become it;
      texts longer than the largest are cut and keep their end token.
    pair_length: the most tokens of a text beside an image, where the model takes fewer
      there (and cuts them itself); None: as many as alone.
    share: which rows of each batch are ours (`sharding.batch_share`); two processes may
      read the same.
    cuts: pieces of consecutive rows that the global batch will be cut into.
    threads: that read and decode whole batches; 0 reads when asked.
    prefetch: batches read ahead.
    position: records consumed globally so far; any number.
    agree: the longest text of our slice, in tokens -> that of the global batch; called
      once a batch, in the same order on every process (`processes.Largest`).

  Raises:
    UserError: a batch that the processes cannot share or the source cannot fill, an
      unknown augmentation, a seed or bucket out of range.
  """

  def __init__(
    self,
    source: Source,
    processor: Any,
    *,
    batch_size: int,
    seed: int,
    augment: str = "none",
    crop_scale: tuple[float, float] = (0.5, 1.0),
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    pair_length: int | None = None,
    share: Share = _ALL,
    cuts: int = 1,
    threads: int = 4,
    prefetch: int = 4,
    position: int = 0,
    agree: Callable[[int], int] | None = None,
  ):
    _check(source, batch_size, seed, share, position)
    self._source, self._processor = source, processor
    self._batch_size, self._seed = batch_size, int(seed)
    self._alone = len(share.held) == share.parts
    # (n,) our rows' places in the global batch.
    self.rows_of_batch = share.rows(batch_size, cuts)
    size = getattr(processor.image, "shortest_edge", processor.image.image_size)
    self._augment = make_augment(augment, size=size, scale=tuple(crop_scale))
    self._buckets = _usable(buckets, processor.tokenizer.max_length)
    self._pair_length = self._buckets[-1] if pair_length is None else pair_length
    self._threads, self._prefetch = threads, prefetch
    self._agree = agree
    self._iterator = None
    self._errors: collections.deque[str] = collections.deque(maxlen=_RECENT)
    self.position = int(position)
    self.bad_count = self.texts_cut = 0

  def __iter__(self) -> Pipeline:
    return self

  def __next__(self) -> Batch:
    if self._iterator is None:
      self._iterator = self._start()
    batch, longest, errors, cut = next(self._iterator)
    tokens = batch["tokens"][:, : self._width(longest)]
    batch = {**batch, "tokens": np.ascontiguousarray(tokens)}
    # Only now: what was read ahead but never handed out has not been consumed.
    self.position += self._batch_size
    self.bad_count += len(errors)
    self.texts_cut += cut
    self._errors.extend(errors)
    return batch

  @property
  def longest(self) -> int:
    """Tokens of the longest texts that it can hand out."""
    return self._buckets[-1]

  def recent_errors(self) -> list[str]:
    """Short messages of the last unreadable records of this process, oldest first."""
    return list(self._errors)

  def close(self) -> None:
    """Ends the reading threads. May be called more than once."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None

  def __enter__(self) -> Pipeline:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _start(self):
    import grain

    records = len(self._source)
    # A seed of its own, because Grain adds the epoch to it: epoch 1 of seed 0 would
    # otherwise be epoch 0 of seed 1.
    shuffle = np.random.SeedSequence((self._seed, records)).generate_state(1)[0]
    places = (
      grain.MapDataset.range(records)
      .shuffle(seed=int(shuffle))
      .repeat()
      .map_with_index(_Place)
    )
    rows = len(self.rows_of_batch)
    # Counted from our position, not from a step, so that the batch size may change.
    first, offsets = self.position, self.rows_of_batch.tolist()

    def ours(k: int) -> _Place:
      return places[first + k // rows * self._batch_size + offsets[k % rows]]

    batches = (
      grain.MapDataset.range(sys.maxsize)
      .map(ours)
      .map(self._read)
      .batch(rows, drop_remainder=True, batch_fn=self._collate)
    )
    # Grain's default of 16 threads and 500 elements would starve the main thread.
    options = grain.ReadOptions(
      num_threads=self._threads,
      prefetch_buffer_size=self._prefetch if self._threads else 0,
    )
    return iter(batches.to_iter_dataset(options))

  def _read(self, place: _Place) -> _Row:
    epoch = place.position // len(self._source)
    rng = np.random.default_rng((self._seed, epoch, place.index))
    name = f"record {place.index}"
    try:
      record = self._source[place.index]
      name = record["id"]
      images, texts = record["images"], record["texts"]
      if not len(images) and not len(texts):
        raise BadRecord("neither an image nor a text")
      view, said = rng.random(2)
      pixels = caption = None
      caption_index = -1
      if len(texts):
        caption_index = int(said * len(texts))
        caption = texts[caption_index]
      if len(images):
        image = self._augment(images[int(view * len(images))], rng)
        pixels = self._processor.image.pixels(image)
    except (ValueError, OSError) as error:  # ImageError and BadRecord are ValueErrors
      message = f"{name}: {error}"[:_MESSAGE]
      return _Row(place, None, None, padding_ids(place.position), -1, message)
    ids = pair_ids(record.get("group") or name, caption, name)
    return _Row(place, pixels, caption, ids, caption_index, "")

  def _collate(self, rows: Sequence[_Row]) -> _Collated:
    side = self._processor.image.image_size
    tokenizer = self._processor.tokenizer
    pixels = np.zeros((len(rows), side, side, 3), np.uint8)
    for into, row in zip(pixels, rows, strict=True):
      if row.pixels is not None:
        into[...] = row.pixels
    captions = [row.caption or "" for row in rows]
    tokens, cut = tokenizer.rows(captions, self._buckets[-1])
    batch = {
      "pixels": pixels,
      "tokens": tokens,
      "has_image": np.array([row.pixels is not None for row in rows]),
      "has_text": np.array([row.caption is not None for row in rows]),
      "pair_ids": np.stack([row.ids for row in rows]),
      "index": np.array([row.place.index for row in rows], np.int64),
      "caption_index": np.array([row.caption_index for row in rows], np.int32),
    }
    lengths = tokenizer.lengths(tokens)
    cut |= batch["has_image"] & (lengths > self._pair_length)
    errors = [row.error for row in rows if row.error]
    return _Collated(batch, int(lengths.max()), errors, int(cut.sum()))

  def _width(self, longest: int) -> int:
    if self._agree is not None:
      longest = self._agree(longest)
    elif not self._alone:
      return self._buckets[-1]
    return next(bucket for bucket in self._buckets if bucket >= longest)


def _usable(buckets: Sequence[int], max_length: int) -> tuple[int, ...]:
  """Ascending bucket lengths within the tokenizer's maximum, at least one."""
  if any(int(bucket) < 2 for bucket in buckets):
    raise UserError(
      f"config.data.text_buckets {tuple(buckets)}: a text has at least 2 tokens, its "
      "start and its end"
    )
  cut = {min(int(bucket), max_length) for bucket in buckets}
  return tuple(sorted(cut)) or (max_length,)


def _check(
  source: Source, batch_size: int, seed: int, share: Share, position: int
) -> None:
  if position < 0:
    raise ValueError(f"position {position}")
  if batch_size < 1 or batch_size % share.parts:
    nearest = max(1, round(batch_size / share.parts)) * share.parts
    raise UserError(
      f"config.batch_size={batch_size} cannot be cut into {share.parts} equal parts; "
      f"{nearest} can"
    )
  if batch_size > len(source):
    raise UserError(
      f"config.batch_size={batch_size} is more than the {len(source)} records there "
      f"are; set it to at most {len(source) // share.parts * share.parts}"
    )
  if not 0 <= seed < 2**32:
    raise UserError(f"config.seed={seed} is outside 0 to {2**32 - 1}")
