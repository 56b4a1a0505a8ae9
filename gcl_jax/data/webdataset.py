"""WebDataset tars as a source of records, by an index of where every sample lies."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from gcl_jax.data.columns import SPLIT_COLUMN, Columns, split_of, strings
from gcl_jax.paths import is_remote, open_file, size_of, stamp
from gcl_jax.data.index_cache import Index, cache_file, read_index, write_index
from gcl_jax.data.random_access import RandomFile
from gcl_jax.data.record import BadRecord, Record
from gcl_jax.data.settings import DataSettings, nearest
from gcl_jax.data.shards import Shard, find_shards
from gcl_jax.data.splits import choose_rows, group_hash
from gcl_jax.data.tar_members import TarError, members
from gcl_jax.errors import UserError

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")
_COMPRESSED = (
  *(f".tar.{c}" for c in ("gz", "bz2", "xz", "zst", "lz4", "z")),
  ".tgz",
  ".tbz2",
  ".txz",
)
_VERSION = 1  # raise it when what an index holds changes
_ROW = np.dtype(
  [
    ("offset", "<i8"),
    ("length", "<u4"),
    ("shard", "<u4"),
    ("split", "<i2"),
    ("group", "<u8"),
  ]
)
_MESSAGES = 5
_PROBES = 16
_MAX_BYTES = 1 << 30  # of one sample; more is no picture with a text


class WebDatasetSource:
  """The samples of one split of tars; members that follow each other and share a key.

  A key is a member's path up to the first dot of its file name, and what comes after
  the dot says what the member is: a picture (`jpg`, `png`, `webp`, ...; or the one that
  `config.data.image_column` names), a caption (`txt`), or `json`, whose fields serve as
  a table's columns do. A name in `config.data.caption_column` may be a member or a
  field. With the default the captions are the field `captions`, else the member `txt`,
  else the field `caption`.

  The split is the field `split`, else what the tar's name says (`train-000.tar`); the
  group is the field of `config.data.group_column`, else the sample by itself. Tars are
  scanned once, header by header, and the index is kept; then a record is one read.
  Threads may read at the same time, and it can be pickled.

  Raises:
    UserError: no tar, a compressed or broken one, members of one sample that are apart,
      no picture or no caption anywhere, an unknown split.
  """

  def __init__(self, settings: DataSettings, split: str):
    self._shards = find_shards(settings.path, (".tar",), compressed=_COMPRESSED)
    self._parser = _Parser(settings)
    index = _load_index(self._shards, self._parser, settings)
    self._rows, self._splits = index.rows, index.splits
    self._files = [RandomFile(shard.path) for shard in self._shards]
    self._chosen = choose_rows(
      split,
      names=index.splits,
      codes=index.rows["split"],
      groups=index.rows["group"],
      eval_fraction=settings.eval_fraction,
      where=settings.path,
    )
    self._probe(settings.path)

  def __len__(self) -> int:
    return len(self._chosen)

  def __getitem__(self, index: int) -> Record:
    """The record; its pictures are bytes. Raises BadRecord."""
    entry = self._rows[int(self._chosen[index])]
    sample = self._sample(entry)
    name = f"{self._shards[entry['shard']].name}/{sample.key}"
    row = self._parser.row(sample)
    images, texts = self._parser.images(sample), self._parser.texts(sample, row)
    if not images and not texts:
      raise BadRecord(f"{name} has neither an image nor a caption")
    split = self._splits[entry["split"]]
    return self._parser.columns.record(row, images, texts, name, split)

  def _sample(self, entry) -> Sample:
    shard = self._shards[entry["shard"]]
    offset, length = int(entry["offset"]), int(entry["length"])
    raw = self._files[entry["shard"]].read(offset, length)
    try:
      (sample,) = _samples(raw)
    except ValueError as error:
      raise BadRecord(
        f"{shard.path} has changed since it was indexed: at byte {offset:,} is not the "
        f"sample that was there ({error})"
      ) from None
    return sample

  def _probe(self, where: str) -> None:
    """One message when no sample has a picture, or none a caption."""
    pictures = captions = 0
    kinds, fields = set(), set()
    for index in np.linspace(0, len(self) - 1, _PROBES).astype(int):
      sample = self._sample(self._rows[int(self._chosen[index])])
      kinds |= sample.members.keys()
      try:
        row = self._parser.row(sample)
        fields |= row.keys()
        captions += len(self._parser.texts(sample, row))
      except BadRecord:
        pass
      pictures += len(self._parser.images(sample))
    there = f"Members there: {', '.join(sorted(kinds))}"
    if fields:
      there += f"; fields of the json: {', '.join(sorted(fields))}"
    for count, field, wanted in (
      (pictures, "image_column", self._parser.pictures[0]),
      (captions, "caption_column", self._parser.columns.caption[0]),
    ):
      if not count:
        raise UserError(
          f"{where}: none of {_PROBES} samples tried has what config.data.{field} names "
          f'("{wanted}"){nearest(wanted, kinds | fields)} {there}'
        )


class Sample(NamedTuple):
  """The members of one key by their kind, in bytes."""

  key: str
  members: Mapping[str, bytes]


class _Parser:
  """From a sample's members to pictures, texts and a row of fields."""

  def __init__(self, settings: DataSettings):
    self.columns = Columns(settings)
    self.pictures: tuple[str, ...] = PICTURES
    if settings.image_column != DataSettings.image_column:
      self.pictures = (settings.image_column.lstrip(".").lower(),)
    self._any_caption = settings.caption_column == DataSettings.caption_column

  def images(self, sample: Sample) -> list[bytes]:
    """The pictures that are there, in the order of `pictures`."""
    return [sample.members[kind] for kind in self.pictures if kind in sample.members]

  def row(self, sample: Sample) -> Mapping[str, Any]:
    """The fields of the json; {} without one. Raises BadRecord."""
    return parse_json(sample.members.get("json", b"{}"))

  def texts(self, sample: Sample, row: Mapping[str, Any]) -> list[str]:
    """The captions, blank ones left out. Raises BadRecord."""
    found = []
    for name in self.columns.caption:
      found += self._text(sample, row, name)
    if self._any_caption and not found:
      found = self._text(sample, row, "txt") or self._text(sample, row, "caption")
    return found

  def _text(self, sample: Sample, row: Mapping[str, Any], name: str) -> list[str]:
    raw = sample.members.get(name.lstrip(".").lower())
    if raw is None:
      return strings(row.get(name), name)
    try:
      return strings(raw.decode().strip(), name)
    except UnicodeDecodeError as error:
      raise BadRecord(f"its {name} is not UTF-8 ({error.reason})") from error


def parse_json(raw: bytes) -> Mapping[str, Any]:
  """A JSON object. Raises BadRecord."""
  try:
    row = json.loads(raw)
  except (ValueError, RecursionError) as error:
    raise BadRecord(f"its json cannot be read ({error})") from error
  if not isinstance(row, dict):
    raise BadRecord(f"its json is a {type(row).__name__} and not an object")
  return row


def _key(name: str) -> tuple[str, str]:
  """Key and kind of a member by its name."""
  folder, slash, base = name.removeprefix("./").rpartition("/")
  stem, _, kind = base.partition(".")
  return folder + slash + stem, kind.lower()


def _is_hidden(name: str) -> bool:
  return name.rpartition("/")[2].startswith(".")  # what macOS puts beside each file


def _samples(raw: bytes) -> Iterator[Sample]:
  found: dict[str, dict[str, bytes]] = {}
  for member in members(lambda at, n: raw[at : at + n], len(raw)):
    if not _is_hidden(member.name):
      key, kind = _key(member.name)
      content = raw[member.data : member.data + member.length]
      found.setdefault(key, {})[kind] = content
  return (Sample(key, kinds) for key, kinds in found.items())


def _load_index(
  shards: list[Shard], parser: _Parser, settings: DataSettings
) -> Index:
  columns = parser.columns
  remote = is_remote(shards[0].path)
  with ThreadPoolExecutor(16 if remote else 1) as pool:  # one request or more for each
    stamps = list(pool.map(lambda shard: stamp(shard.path), shards))
    key = [_VERSION, stamps, columns.group, columns.id, SPLIT_COLUMN]
    cached = cache_file("tars", shards[0].path.stem, key, settings.cache_dir)
    index = read_index(cached, _ROW)
    if index is None:
      scans = list(pool.map(lambda shard: _scan(shard, columns), shards))
      index = _joined(shards, scans)
      write_index(cached, index)
  return index


class _Scan(NamedTuple):
  rows: np.ndarray  # its splits are places in `splits`
  splits: list[str]
  error: str


def _joined(shards: list[Shard], scans: list[_Scan]) -> Index:
  errors = [scan.error for scan in scans if scan.error]
  if errors:
    more = f" (and {len(errors) - _MESSAGES} more)" if errors[_MESSAGES:] else ""
    raise UserError(
      f"{'; '.join(errors[:_MESSAGES])}{more}. Replace it, or take it out of "
      "config.data.path"
    )
  splits: dict[str, int] = {}
  for number, scan in enumerate(scans):
    places = [splits.setdefault(name, len(splits)) for name in scan.splits]
    scan.rows["shard"] = number
    scan.rows["split"] = np.array(places, np.int16)[scan.rows["split"]]
  rows = np.concatenate([scan.rows for scan in scans])
  if not len(rows):
    raise UserError(
      f"{shards[0].path}{' and the others' if shards[1:] else ''}: no sample in it; "
      "a sample is <key>.jpg with <key>.txt or <key>.json"
    )
  return Index(rows, tuple(splits), 0, ())


def _scan(shard: Shard, columns: Columns) -> _Scan:
  """Where each sample of a tar begins and ends, its split and its group's hash."""
  rows: list[tuple[int, int, int, int, int]] = []
  splits: dict[str, int] = {}
  seen: set[str] = set()
  try:
    for span in _spans(shard):
      if span.key in seen:
        raise TarError(
          f"the members of {span.key} are apart from each other; write it again with "
          "tar --sort=name"
        )
      seen.add(span.key)
      if span.end - span.start > _MAX_BYTES:
        raise TarError(f"{span.key} holds {span.end - span.start:,} bytes: no pair")
      name = f"{shard.name}/{span.key}"
      group = columns.group_of(span.row, [], columns.id_of(span.row, name))
      code = splits.setdefault(split_of(span.row) or shard.split, len(splits))
      rows.append((span.start, span.end - span.start, 0, code, group_hash(group)))
  except TarError as error:
    return _Scan(np.zeros(0, _ROW), [], f"{shard.path}: {error}")
  return _Scan(np.array(rows, _ROW), list(splits), "")


class _Span(NamedTuple):
  key: str
  start: int
  end: int
  row: Mapping[str, Any]


def _spans(shard: Shard) -> Iterator[_Span]:
  """The samples of a tar in order: from the first member's header to the last's end."""
  with open_file(shard.path) as file:

    def read(at: int, length: int) -> bytes:
      file.seek(at)
      return file.read(length)

    span = None
    for member in members(read, size_of(shard.path)):
      if _is_hidden(member.name):
        continue
      key, kind = _key(member.name)
      if span is None or key != span.key:
        if span is not None:
          yield span
        span = _Span(key, member.start, member.end, {})
      row = span.row
      if kind == "json":
        with contextlib.suppress(BadRecord):  # the record itself will say so
          row = parse_json(read(member.data, member.length))
      span = span._replace(end=member.end, row=row)
    if span is not None:
      yield span
