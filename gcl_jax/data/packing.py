"""Writes any source as ArrayRecord shards of pictures at the size of training.

A processor core decodes a few hundred photographs of a camera's size a second, and an
accelerator takes thousands. Packing pays the price once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from gcl_jax.paths import AnyPath, RemotePath, as_path
from gcl_jax.data.pack_records import Packed, Packing, pack_record
from gcl_jax.data.packed import read_manifest, read_shard_index
from gcl_jax.data.packed_format import FORMAT, MANIFEST, shard_name
from gcl_jax.data.record import Source
from gcl_jax.data.settings import DataSettings
from gcl_jax.data.shard_writer import ShardWriter, write_file
from gcl_jax.data.splits import ALL
from gcl_jax.errors import UserError

_PROBES = 16
_LISTED = 10_000  # bad records by message in the manifest; more are only counted


class Progress(NamedTuple):
  """How far packing is. `records` and `total` are this process's own, this time."""

  records: int
  total: int
  bad: int
  seconds: float


def pack(
  source: Source,
  output: str | os.PathLike,
  packing: Packing,
  settings: DataSettings,
  *,
  split: str = ALL,
  shard_range: tuple[int, int] | None = None,
  threads: int = 0,
  progress: Callable[[Progress], None] = lambda _: None,
) -> Mapping[str, Any]:
  """Writes the shards that are missing; returns the manifest.

  A shard appears under its name only when it is whole, so that after a kill the same call
  goes on with the first one missing. Of each record the id, group, split, texts and
  meta are kept; a picture that cannot be read is left out, and with it a record that has
  no other; both are listed in the manifest (`bad`).

  Args:
    source: of `open_source`.
    output: a folder, new or of the same packing; here or `gs://`.
    packing: how.
    settings: what the source was opened with.
    split: which of its splits it is; records that store none get its name.
    shard_range: first and last + 1 of the shards to write, where several processes
      share the work; None is all.
    threads: that decode and encode; 0 is one for each core.
    progress: called a few times a second at most.

  Raises:
    UserError: the output holds something else or the packing of another source, a range
      outside the shards, more bad records than `max_bad_fraction`, no room.
  """
  folder = output if isinstance(output, RemotePath) else as_path(str(output))
  count = -(-len(source) // packing.shard_records)
  plan = _plan(source, packing, settings, split)
  first, last = shard_range or (0, count)
  if not 0 <= first < last <= count:
    raise UserError(
      f"--shard_range={first}:{last} is outside the {count} shards of "
      f"{packing.shard_records} records: choose within 0:{count}"
    )
  _prepare(folder, plan, count)
  present = {path.name for path in folder.iterdir()}
  missing = [k for k in range(first, last) if shard_name(k, count) not in present]
  ranges = [_records_of(k, packing, len(source)) for k in missing]
  report = _Reporter(progress, sum(map(len, ranges)))
  allowed = settings.max_bad_fraction * len(source)
  pool = ThreadPoolExecutor(threads or os.cpu_count() or 1)
  try:
    for number, records in zip(missing, ranges, strict=True):
      writer = ShardWriter(folder, number, count, split)
      with writer:
        for done in pool.map(lambda i: pack_record(source, i, packing), records):
          writer.add(done)
          report.add(done)
          if report.bad > allowed:
            raise UserError(_too_many(report, writer, settings))
  finally:
    pool.shutdown(cancel_futures=True)
  report.end()
  return _finished(folder, plan, count)


class _Reporter:
  """Counts, and calls `progress` not too often."""

  def __init__(self, progress: Callable[[Progress], None], total: int):
    self._progress, self._total = progress, total
    self._start = self._said = time.monotonic()
    self._records = self.bad = 0

  def add(self, packed: Packed) -> None:
    self._records += 1
    self.bad += bool(packed.errors)
    if time.monotonic() - self._said > 0.5:
      self.end()

  def end(self) -> None:
    self._said = time.monotonic()
    seconds = self._said - self._start
    self._progress(Progress(self._records, self._total, self.bad, seconds))


def _too_many(report: _Reporter, writer: ShardWriter, settings: DataSettings) -> str:
  return (
    f"{report.bad} records cannot be read whole, more than config.data.max_bad_fraction "
    f"({settings.max_bad_fraction:g}) allows: {'; '.join(writer.bad[-3:])}. Mend them, or "
    "allow more; the same command goes on where it was"
  )


def _records_of(number: int, packing: Packing, total: int) -> range:
  first = number * packing.shard_records
  return range(first, min(first + packing.shard_records, total))


def _plan(
  source: Source, packing: Packing, settings: DataSettings, split: str
) -> dict[str, Any]:
  """What must be the same for two calls to write parts of one packing."""
  fields = dataclasses.asdict(settings)
  names = [
    "source", "path", "table", "image_column", "caption_column", "group_column",
    "id_column", "image_root", "tfds_name", "tfds_data_dir", "scenes_train_size",
    "scenes_image_size", "scenes_seed",
  ]  # fmt: skip
  plan = {
    "data": {name: fields[name] for name in names},
    "split": split,
    "source_records": len(source),
    "content": probe(source),
    **dataclasses.asdict(packing),
  }
  return json.loads(json.dumps(plan))


def probe(source: Source) -> str:
  """A digest of some records' ids and texts: whether it is the same source."""
  digest = hashlib.sha256()
  for index in np.linspace(0, len(source) - 1, _PROBES).astype(int):
    try:
      record = source[int(index)]
      said = [record["id"], record.get("group"), list(record["texts"])]
    except (ValueError, OSError):
      said = []
    digest.update(json.dumps(said).encode())
  return digest.hexdigest()[:16]


def _prepare(folder: AnyPath, plan: Mapping[str, Any], count: int) -> None:
  """Writes the manifest of a new packing, or checks that it is this one's."""
  if folder.is_file():
    raise UserError(f"--output={folder} is a file: name a folder that is not there yet")
  if (folder / MANIFEST).is_file():
    _check_same(folder, read_manifest(folder).get("plan", {}), plan)
    return
  others = folder.iterdir() if folder.is_dir() else ()
  if any(not path.name.startswith(MANIFEST) for path in others):
    raise UserError(
      f"--output={folder} is not empty and holds nothing packed: name a folder that is "
      "not there yet"
    )
  if not isinstance(folder, RemotePath):
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(f"--output={folder} cannot be written: {error}") from error
  manifest = {"format": FORMAT, "shards": count, "complete": False, "plan": plan}
  write_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _check_same(folder: AnyPath, then: Mapping, now: Mapping) -> None:
  then, now = dict(_flat(then)), dict(_flat(now))
  differing = [
    f"{name}: {then.get(name)!r} then, {now.get(name)!r} now"
    for name in sorted(then.keys() | now.keys())
    if then.get(name) != now.get(name)
  ]
  if differing:
    raise UserError(
      f"--output={folder} holds another packing ({'; '.join(differing)}). Go on with "
      "what it was started with, or name another folder"
    )


def _flat(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", value


def _finished(
  folder: AnyPath, plan: Mapping[str, Any], count: int
) -> Mapping[str, Any]:
  """The manifest; complete once every shard is there, whoever wrote it."""
  manifest = {"format": FORMAT, "shards": count, "complete": False, "plan": plan}
  present = {path.name for path in folder.iterdir()}
  if any(shard_name(k, count) not in present for k in range(count)):
    return manifest
  bad, splits, records, size = [], {}, 0, 0
  for number in range(count):
    index = read_shard_index(folder, number, count)
    records, size = records + len(index.groups), size + index.size
    bad += index.bad
    for code, name in enumerate(index.splits):
      splits[name] = splits.get(name, 0) + int((index.codes == code).sum())
  manifest |= {
    "complete": True,
    "records": records,
    "bytes": size,
    "splits": splits,
    "bad_records": plan["source_records"] - records,
    "bad": bad[:_LISTED],
  }
  write_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
  if not isinstance(folder, RemotePath):
    for left in folder.glob("*.part"):  # by processes that were killed
      left.unlink(missing_ok=True)
  return manifest
