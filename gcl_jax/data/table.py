"""A folder with a table of image names and captions, as a source of records."""

from __future__ import annotations

import numpy as np
from absl import logging

from gcl_jax.data.columns import Columns, split_of
from gcl_jax.paths import AnyPath, as_path
from gcl_jax.data.guess import guess_source
from gcl_jax.data.picture_folder import ARCHIVE, PictureFolder, Pictures
from gcl_jax.data.record import BadRecord, Record
from gcl_jax.data.settings import DataSettings, nearest
from gcl_jax.data.splits import choose_rows
from gcl_jax.data.table_formats import SUFFIXES, open_table
from gcl_jax.data.table_index import load_index
from gcl_jax.errors import UserError

DEFAULT_TABLE = "captions.jsonl"
COMPOSED = "composed.jsonl"
_PROBES = 16


class TableSource:
  """The rows of one split of a table; pictures stay where they are until asked for.

  Threads may read at the same time, and it can be pickled. `bad_lines` counts the
  table's rows that were left out; `messages` says why for the first of them.

  Raises:
    UserError: a missing or empty folder, no table or several, a table without the
      columns, too many broken rows, an unknown split, or no picture where the table
      says they are.
  """

  def __init__(self, settings: DataSettings, split: str):
    folder, self.path = find_table(settings)
    self._columns = Columns(settings)
    self._table = open_table(self.path)
    index = load_index(
      self._table,
      self.path,
      self._columns,
      composed=self.path.with_name(COMPOSED),
      cache_dir=settings.cache_dir,
    )
    self.bad_lines, self.messages = index.bad, index.messages
    self._report(len(index.rows), settings.max_bad_fraction)
    self._splits = index.splits
    self._rows = index.rows
    self._chosen = choose_rows(
      split,
      names=index.splits,
      codes=index.rows["split"],
      groups=index.rows["group"],
      eval_fraction=settings.eval_fraction,
      where=str(self.path),
    )
    self._pictures = PictureFolder(folder, settings.image_root)
    self._probe()

  def __len__(self) -> int:
    return len(self._chosen)

  def __getitem__(self, index: int) -> Record:
    """The record; its images are paths, or bytes read from the zip when asked for.

    Raises:
      BadRecord: the row, which could be read once, no longer can.
    """
    place = int(self._chosen[index])
    entry = self._rows[place]
    row = self._table.read(int(entry["offset"]), int(entry["length"]))
    images, texts = self._columns.parse(row)
    name = self._columns.id_of(row, f"row-{place}")
    record: Record = {
      "id": name,
      "images": Pictures(self._pictures, images),
      "texts": texts,
      "group": self._columns.group_of(row, images, name),
      "meta": self._columns.meta(row),
    }
    split = split_of(row) or self._splits[entry["split"]]
    if split:
      record["split"] = split
    return record

  def _report(self, good: int, allowed: float) -> None:
    if not self.bad_lines:
      return
    total = good + self.bad_lines
    more = "; ..." if self.bad_lines > len(self.messages) else ""
    said = (
      f"{self.bad_lines} of {total} rows of {self.path} cannot be used: "
      f"{'; '.join(self.messages)}{more}"
    )
    if self.bad_lines > allowed * total:
      raise UserError(
        f"{said}. Mend them, or allow more with config.data.max_bad_fraction (now "
        f"{allowed:g})"
      )
    logging.warning("%s. They were left out.", said)

  def _probe(self) -> None:
    """One message when the pictures are not there at all, before anything compiles."""
    missing = None
    for index in np.linspace(0, len(self) - 1, _PROBES).astype(int):
      for name in self[index]["images"].names[:1]:
        if self._pictures.has(name):
          return
        missing = missing or name
    if missing is not None:
      raise UserError(
        f'none of {_PROBES} pictures tried is there: "{missing}" of {self.path} was '
        f"looked for at {self._pictures.place(missing)} and in {ARCHIVE}. Put them "
        "there, or name their folder below the data folder in config.data.image_root"
      )


def find_table(settings: DataSettings) -> tuple[AnyPath, AnyPath]:
  """The data folder and the table in it, as the config says.

  Without a name it is `captions.jsonl`, else the only table of the folder. A path to
  the table itself serves too.

  Raises:
    UserError: nothing there, or no telling which.
  """
  if not settings.path:
    raise UserError(
      "config.data.path is empty; set it (or --data) to a folder with a table of "
      f"images and captions, such as {DEFAULT_TABLE}"
    )
  folder = as_path(settings.path)
  if folder.is_file() and not settings.table:
    return folder.parent, folder
  if not folder.is_dir():
    raise UserError(f"there is no folder {folder}; set config.data.path (or --data)")
  present = sorted(entry.name for entry in folder.iterdir())
  if not present:
    raise UserError(f"the data folder {folder} is empty; put a table and images there")
  if settings.table:
    path = folder / settings.table
    if not path.is_file():
      raise UserError(
        f"there is no table {path}{nearest(settings.table, present)} The folder holds "
        f"{_listed(present)}; set config.data.table"
      )
    return folder, path
  tables = [name for name in present if name.lower().endswith(SUFFIXES)]
  if DEFAULT_TABLE in tables:
    return folder, folder / DEFAULT_TABLE
  kind = guess_source(settings.path)
  if kind != "table":
    raise UserError(
      f"{folder} holds no table; set config.data.source={kind}, which it looks like (or "
      "name a table in config.data.table)"
    )
  if len(tables) != 1:
    found = f"several tables: {_listed(tables)}" if tables else "no table"
    raise UserError(
      f"{folder} holds {found}{'' if tables else f', only {_listed(present)}'}. Name "
      f"one in config.data.table ({', '.join(SUFFIXES)})"
    )
  return folder, folder / tables[0]


def _listed(names: list[str]) -> str:
  return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")
