"""From a row of a table to a record's images, texts, group and id."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from gcl_jax.data.record import BadRecord, Record
from gcl_jax.data.settings import DataSettings, nearest
from gcl_jax.data.table_formats import Row
from gcl_jax.errors import UserError

SPLIT_COLUMN = "split"


class Columns:
  """Which column of a table is what. Names come from the config.

  `image` may also be called `images`, as in `captions.jsonl`.
  """

  def __init__(self, settings: DataSettings):
    self.image = (settings.image_column,)
    if settings.image_column == DataSettings.image_column:
      self.image = ("image", "images")
    self.caption = settings.caption_column
    self.group = settings.group_column
    self.id = settings.id_column
    defaults = DataSettings.group_column, DataSettings.id_column
    named = (settings.group_column, settings.id_column)
    self._demanded = [
      name for name, usual in zip(named, defaults, strict=True) if name != usual
    ]

  def check(self, present: Collection[str], where: str) -> None:
    """Raises UserError when a table with the columns `present` lacks one we need."""
    needed = [
      (self.image, "config.data.image_column"),
      (self.caption, "config.data.caption_column"),
      *(((name,), "config.data.group_column or id_column") for name in self._demanded),
    ]
    for names, field in needed:
      if not any(name in present for name in names):
        raise UserError(
          f'{where} has no column "{names[0]}"{nearest(names[0], present)} Columns '
          f"there: {', '.join(sorted(map(str, present)))}. Name the right one in "
          f"{field}"
        )

  def images(self, row: Row) -> list[str]:
    """Names of the pictures as written. Raises BadRecord."""
    return [_inside(name) for name in _strings(row, self.image, "image")]

  def pictures(self, row: Row) -> list[str | bytes]:
    """Pictures that a row may hold itself, or name: bytes and names. Raises BadRecord.

    A value is bytes, a name, {"bytes": ..., "path": ...}, or a list of such.
    """
    found: list[str | bytes] = []
    for column in self.image:
      value = row.get(column)
      for entry in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(entry, Mapping):
          entry = entry.get("bytes") or entry.get("path")
        if isinstance(entry, bytes):
          found.append(entry)
        else:
          found += [_inside(name) for name in strings(entry, column)]
    return found

  def texts(self, row: Row) -> list[str]:
    """The captions, blank ones left out. Raises BadRecord."""
    return _strings(row, self.caption, "caption")

  def group_of(self, row: Row, images: list[str], record_id: str) -> str:
    """The group's name: stored, else the first picture's as written, else the id."""
    stored = row.get(self.group)
    if stored is None or stored == "":
      return images[0] if images else record_id
    return str(stored)

  def id_of(self, row: Row, place: str) -> str:
    """The record's id: stored, else the name of its place."""
    stored = row.get(self.id)
    return place if stored is None or stored == "" else str(stored)

  def meta(self, row: Row) -> dict[str, Any]:
    """What the row holds beyond what a record has fields for."""
    used = {*self.image, *self.caption, self.group, self.id, SPLIT_COLUMN}
    return {name: value for name, value in row.items() if name not in used}

  def record(
    self, row: Row, images: Sequence, texts: list[str], place: str, split: str
  ) -> Record:
    """The record of a row whose pictures are no files with names.

    Args:
      row: its fields.
      images: its pictures.
      texts: its captions.
      place: names the row, where it stores no id.
      split: of the row, where it stores none; "" for none.
    """
    name = self.id_of(row, place)
    named = [image for image in getattr(images, "names", ()) if isinstance(image, str)]
    record: Record = {
      "id": name,
      "images": images,
      "texts": texts,
      "group": self.group_of(row, named, name),
      "meta": self.meta(row),
    }
    if split := split_of(row) or split:
      record["split"] = split
    return record

  def parse(self, row: Row) -> tuple[list[str], list[str]]:
    """Images and texts. Raises BadRecord when there is neither, or a column lacks."""
    images, texts = self.images(row), self.texts(row)
    if not images and not texts:
      raise BadRecord("neither an image nor a caption")
    return images, texts


def split_of(row: Row) -> str:
  """The row's stored split; "" where there is none."""
  stored = row.get(SPLIT_COLUMN)
  return "" if stored is None else str(stored).strip()


def _inside(name: str) -> str:
  if _leads_out(name):
    raise BadRecord(f'image "{name[:80]}" leads out of the data folder')
  return name


def _leads_out(name: str) -> bool:
  if name[0] in "/\\" or name[1:2] == ":":
    return True
  return ".." in name and ".." in re.split(r"[/\\]", name)


def _strings(row: Row, names: Iterable[str], what: str) -> list[str]:
  present = [name for name in names if name in row]
  if not present:
    raise BadRecord(f"no {what}: it lacks the column {' or '.join(names)}")
  return [text for name in present for text in strings(row[name], name)]


def strings(value: Any, name: str) -> list[str]:
  """The texts of a value that is one or a list of them; blank ones are left out.

  Raises BadRecord, which calls the value `name`, when there is anything else.
  """
  found = []
  for entry in value if isinstance(value, (list, tuple)) else [value]:
    if entry is None:
      continue
    if not isinstance(entry, str):
      raise BadRecord(f'"{name}" holds a {type(entry).__name__} and not a text')
    if not entry.isascii():
      try:
        entry.encode()
      except UnicodeEncodeError as error:
        raise BadRecord(f'"{name}" holds half a character: {error}') from error
    if entry.strip():
      found.append(entry)
  return found
