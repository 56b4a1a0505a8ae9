"""A source of records to the shards of an index, every stage at work at once.

Threads read, decode and tokenise ahead; this thread makes batches and starts them; a
last one waits for the devices. What is batched together depends on the shard alone, so
that a shard written after a restart is the one that would have been written before.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gcl_jax.data import Source
from gcl_jax.errors import UserError
from gcl_jax.retrieval.embedder import Embedder
from gcl_jax.retrieval.store_format import MODALITIES, Bad, Document
from gcl_jax.retrieval.store_writer import IndexWriter

IMAGE, TEXT, FUSED = range(len(MODALITIES))
# Which documents a record becomes.
MODES = ("both", "image", "text", "each")
STAGES = ("read", "decode", "tokenise", "model")
_IN_FLIGHT = 3  # batches started whose vectors are not here yet
_SAID = 0.5  # seconds between two reports of progress
_MESSAGE = 300


class Progress(NamedTuple):
  """How far it is; of this process, and of this time."""

  records: int
  total: int
  bad: int
  seconds: float


class Stage(NamedTuple):
  """What one stage did: `items` in `seconds` of its `workers` together."""

  items: int
  seconds: float
  workers: int

  @property
  def rate(self) -> float:
    """Items a second that it would do if it never waited for another stage."""
    return self.items * self.workers / max(self.seconds, 1e-9)


def embed_corpus(
  source: Source,
  embedder: Embedder,
  writer: IndexWriter,
  shards: Sequence[int],
  *,
  shard_size: int,
  mode: str = "both",
  progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Stage]:
  """Writes these shards.

  A record is one document with its first picture and its first text: fused where it has
  both. What cannot be read, or is not there, is left out and listed as bad: of a record
  whose picture cannot be read the text stays.

  Args:
    source: of `open_source`; read by threads.
    embedder: on devices of this process.
    writer: of the index.
    shards: which to write; shard k holds records from k * shard_size on.
    shard_size: records.
    mode: "both"; "image" or "text" alone; or "each": up to three documents of every
      record.
    progress: called a few times a second at most, and at the end.

  Returns:
    What the stages did; see `STAGES`.

  Raises:
    UserError: vectors that are not finite, no room.
  """
  clock = _Clock(embedder.threads)
  ranges = [
    range(k * shard_size, min((k + 1) * shard_size, len(source))) for k in shards
  ]
  report = _Reporter(progress, sum(map(len, ranges)))
  with (
    _ended(ThreadPoolExecutor(embedder.threads)) as readers,
    _ended(ThreadPoolExecutor(1)) as collector,
  ):
    prepare = functools.partial(_prepare, source, embedder, mode)
    places = (place for records in ranges for place in records)
    stream = _ahead(readers, prepare, places, depth=2 * embedder.batch_size)
    for shard, records in zip(shards, ranges, strict=True):
      rows = _Rows(embedder, collector, clock)
      for _ in records:
        prepared = next(stream)
        clock.add(prepared.seconds)
        rows.add(prepared)
        report.add(prepared)
      writer.write(shard, rows.vectors(), rows.documents, rows.bad)
  report.say()
  return clock.stages()


class _Ready(NamedTuple):
  document: Document
  pixels: np.ndarray | None  # uint8 (S, S, 3)
  tokens: np.ndarray | None  # int32 (L,)


class _Prepared(NamedTuple):
  """One record: its documents, what of it is left out, and what it took."""

  ready: list[_Ready]
  bad: list[Bad]
  seconds: dict[str, float]


def _prepare(source: Source, embedder: Embedder, mode: str, place: int) -> _Prepared:
  seconds: dict[str, float] = {}
  bad: list[Bad] = []
  try:
    with _timed(seconds, "read"):
      record = source[place]
  except (ValueError, OSError) as error:
    return _Prepared([], [_bad(f"record {place}", error)], seconds)
  name, text, image, pixels = record["id"], None, None, None
  if mode != "text" and len(record["images"]):
    try:
      with _timed(seconds, "read"):
        raw, image = _read(record["images"])
      with _timed(seconds, "decode"):
        pixels = embedder.processor.image.pixels(raw)
    except (ValueError, OSError) as error:
      bad.append(_bad(name, error))
  if mode != "image" and len(record["texts"]):
    text = record["texts"][0]
  ready = []
  for modality in _modalities(mode, pixels is not None, text is not None):
    shows, says = modality != TEXT, modality != IMAGE
    tokens = None
    if says:
      with _timed(seconds, "tokenise"):
        tokens = embedder.tokens(text, beside_image=shows)
    document = Document(
      name,
      modality,
      text if says else None,
      image if shows else None,
      place,
      0 if shows else -1,
    )
    ready.append(_Ready(document, pixels if shows else None, tokens))
  if not ready and not bad:
    wanted = {"image": "no picture", "text": "no text"}
    bad.append(Bad(name, wanted.get(mode, "neither a picture nor a text")))
  return _Prepared(ready, bad, seconds)


def _modalities(mode: str, image: bool, text: bool) -> list[int]:
  there = [m for m, has in ((IMAGE, image), (TEXT, text)) if has]
  if len(there) == 2:
    return [FUSED] if mode == "both" else [*there, FUSED]
  return there


def _read(images: Sequence[Any]) -> tuple[Any, str | None]:
  """The first picture, in memory, and its path where it has one."""
  first = images[0]
  if not isinstance(first, (str, os.PathLike)):
    return first, None
  path = Path(first)
  return path.read_bytes(), os.path.abspath(path)


def _bad(name: str, error: Exception) -> Bad:
  return Bad(name, str(error)[:_MESSAGE])


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
  began = time.perf_counter()
  try:
    yield
  finally:
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - began


class _Rows:
  """The documents of one shard and, when they are here, their vectors."""

  def __init__(self, embedder: Embedder, collector: ThreadPoolExecutor, clock: _Clock):
    self._embedder, self._collector, self._clock = embedder, collector, clock
    self._pending: dict[tuple[int, int], list[tuple[int, _Ready]]] = {}
    self._started: list[tuple[list[int], Future]] = []
    self.documents: list[Document] = []
    self.bad: list[Bad] = []

  def add(self, prepared: _Prepared) -> None:
    """Takes a record in; starts a batch where one is full."""
    self.bad += prepared.bad
    for ready in prepared.ready:
      kind = (ready.document.modality, 0 if ready.tokens is None else len(ready.tokens))
      batch = self._pending.setdefault(kind, [])
      batch.append((len(self.documents), ready))
      self.documents.append(ready.document)
      if len(batch) == self._embedder.most_rows(kind[1]):
        self._start(self._pending.pop(kind))

  def vectors(self) -> np.ndarray:
    """(n, D) float32, in the order of the documents; waits for them."""
    self._start_the_rest()
    width = self._embedder.model.config.projection_dim
    out = np.zeros((len(self.documents), width), np.float32)
    for positions, future in self._started:
      out[positions] = future.result()[: len(positions)]
    return out

  def _start_the_rest(self) -> None:
    """Batches that are not full: texts of all lengths together."""
    for modality in range(len(MODALITIES)):
      kinds = sorted(kind for kind in self._pending if kind[0] == modality)
      left = [entry for kind in kinds for entry in self._pending.pop(kind)]
      lengths = [0 if e.tokens is None else len(e.tokens) for _, e in left]
      for rows in self._embedder.split(lengths):
        self._start(left[rows])

  def _start(self, batch: list[tuple[int, _Ready]]) -> None:
    positions = [position for position, _ in batch]
    pixels = tokens = None
    if batch[0][1].pixels is not None:
      pixels = np.stack([ready.pixels for _, ready in batch])
    if batch[0][1].tokens is not None:
      tokens = self._padded([ready.tokens for _, ready in batch])
    if len(self._started) >= _IN_FLIGHT:
      self._started[-_IN_FLIGHT][1].result()
    # A first batch of its shape compiles: it says nothing of the model's speed.
    counted = 0 if self._clock.is_new(pixels, tokens) else len(batch)
    began = time.perf_counter()
    vectors = self._embedder.start(pixels, tokens)
    future = self._collector.submit(self._clock.fetch, vectors, counted, began)
    self._started.append((positions, future))

  def _padded(self, tokens: list[np.ndarray]) -> np.ndarray:
    width = max(map(len, tokens))
    pad = self._embedder.processor.tokenizer.pad_id
    out = np.full((len(tokens), width), pad, np.int32)
    for row, ids in zip(out, tokens, strict=True):
      row[: len(ids)] = ids
    return out


class _Clock:
  """How long each stage was at work."""

  def __init__(self, threads: int):
    self._threads = threads
    self._seconds = dict.fromkeys(STAGES, 0.0)
    self._items = dict.fromkeys(STAGES, 0)
    self._last = 0.0
    self._shapes: set[tuple] = set()

  def is_new(self, pixels: np.ndarray | None, tokens: np.ndarray | None) -> bool:
    """Whether no batch had these shapes before."""
    inputs = (pixels, tokens)
    shape = tuple(None if rows is None else rows.shape[1:] for rows in inputs)
    seen = shape in self._shapes
    self._shapes.add(shape)
    return not seen

  def add(self, seconds: dict[str, float]) -> None:
    """What a thread did for one record."""
    for stage, spent in seconds.items():
      self._seconds[stage] += spent
      self._items[stage] += 1

  def fetch(self, vectors: jax.Array, items: int, began: float) -> np.ndarray:
    """Waits for a batch; the devices were at it since the batch before was done.

    `items`: how many count for the model's speed.
    """
    out = np.asarray(vectors)
    ended = time.perf_counter()
    if items:
      self._seconds["model"] += ended - max(began, self._last)
      self._items["model"] += items
    self._last = ended
    return out

  def stages(self) -> dict[str, Stage]:
    return {
      name: Stage(
        self._items[name],
        self._seconds[name],
        1 if name == "model" else self._threads,
      )
      for name in STAGES
    }


class _Reporter:
  """Counts, and calls `progress` not too often."""

  def __init__(self, progress: Callable[[Progress], None], total: int):
    self._progress, self._total = progress, total
    self._start = self._said = time.monotonic()
    self._records = self._bad = 0

  def add(self, prepared: _Prepared) -> None:
    self._records += 1
    self._bad += bool(prepared.bad)
    if time.monotonic() - self._said > _SAID:
      self.say()

  def say(self) -> None:
    self._said = time.monotonic()
    seconds = self._said - self._start
    self._progress(Progress(self._records, self._total, self._bad, seconds))


def _ahead(
  pool: ThreadPoolExecutor, prepare: Callable, places: Iterable[int], depth: int
) -> Iterator[_Prepared]:
  """The prepared records in order, of which `depth` are being prepared."""
  waiting: collections.deque[Future] = collections.deque()
  for place in places:
    waiting.append(pool.submit(prepare, place))
    if len(waiting) > depth:
      yield waiting.popleft().result()
  while waiting:
    yield waiting.popleft().result()


@contextlib.contextmanager
def _ended(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
  """Leaves what has not begun where something went wrong."""
  try:
    yield pool
  finally:
    pool.shutdown(cancel_futures=True)


def check_mode(mode: str) -> None:
  """Raises UserError where there is no such mode."""
  if mode not in MODES:
    raise UserError(f"--modality={mode} is none of {', '.join(MODES)}.")
