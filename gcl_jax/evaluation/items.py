"""Items of the nine-direction evaluation: what is document, what is query.

An item is a group of records. One of its pictures and one of its captions, chosen by
the hash of its name, are its document; its queries are made of others. Nothing is drawn
from a generator and no order matters but that of an item's own pictures and captions.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from gcl_jax.data import collapse
from gcl_jax.errors import UserError

if TYPE_CHECKING:
  from gcl_jax.data.record import Source

CROP_AREA = (0.3, 0.6)  # of the picture, for the query view of a single picture
LARGEST_CROP = 1_024  # pixels of a crop's shorter side: more is only memory
TRIES = 16  # captions looked at in a lazy sequence before a query is given up


@dataclass(frozen=True)
class Reference:
  """A picture that is not loaded: `source[record]["images"][index]`."""

  record: int
  index: int


@dataclass(frozen=True)
class Item:
  """One thing to be found.

  Attributes:
    name: the records' group.
    code: the hash that places it in the global pools; modality (code + r) mod 3.
    document_picture, document_caption: None where the item has none.
    query_picture: another picture; None: a crop of the document picture instead.
    query_caption: another caption, or None. With one caption only it is that one.
    one_caption: `query_caption` is the item's only one, its document's.
    crop: left edge, top edge and area of the crop as fractions of their ranges.
  """

  name: str
  code: int
  document_picture: Reference | None
  query_picture: Reference | None
  document_caption: str | None
  query_caption: str | None
  one_caption: bool
  crop: tuple[float, float, float]

  @property
  def is_cropped(self) -> bool:
    """Whether the query view is a crop of the document picture."""
    return self.document_picture is not None and self.query_picture is None


@dataclass(frozen=True)
class Items(Sequence):
  """Items in the order of their hash, and how to load their pictures.

  Attributes:
    counts: how many items there are, and how many lack something; JSON-able.
  """

  source: Source
  items: tuple[Item, ...]
  counts: dict[str, int]

  def __len__(self) -> int:
    return len(self.items)

  def __getitem__(self, k):
    return self.items[k]

  def load(self, reference: Reference) -> Any:
    """The picture as the source gives it: bytes, a path or a PIL image."""
    return self.source[reference.record]["images"][reference.index]

  def document_picture(self, k: int) -> Any:
    """Item k's document picture as the source gives it."""
    return self.load(self.items[k].document_picture)

  def query_picture(self, k: int) -> Any:
    """Item k's query view: another picture as the source gives it, or a PIL crop.

    Raises ImageError where the picture to be cropped cannot be read.
    """
    item = self.items[k]
    if not item.is_cropped:
      return self.load(item.query_picture)
    from gcl_jax.processing import decode_image

    return mirrored_crop(decode_image(self.load(item.document_picture)), item.crop)


def build_items(source: Source, *, limit: int | None = None) -> Items:
  """The items of a source.

  Records that share `group` (or, without one, `id`) are one item; pictures and distinct
  captions (blanks and case collapsed) are united in stored order. Pictures are kept as
  references; of a lazy sequence only what is chosen is made.

  Args:
    source: anything with `len` and `[i] -> record` (gcl_jax/data).
    limit: at most so many items: those with the smallest hash.

  Raises UserError where the source has no record that can be read, or no item has a
  picture or a caption.
  """
  groups, bad_records = _groups(source)
  names = sorted(groups, key=lambda name: _digest(name))[:limit]
  drafts = [_Draft(source, name, groups[name]) for name in names]
  drafts = [draft for draft in drafts if draft.pictures or draft.caption is not None]
  if not drafts:
    raise UserError(
      f"nothing to evaluate: none of the {len(source)} records has a picture or a"
      " caption; check config.data and --split"
    )
  captions = Counter(collapse(draft.caption) for draft in drafts if draft.caption)
  pictures = _document_pictures(source, drafts)
  items = tuple(_item(source, draft, captions, pictures) for draft in drafts)
  dropped = sum(
    item.query_caption is None and item.document_caption is not None for item in items
  )
  counts = {
    "records": len(source),
    "bad_records": bad_records,
    "items": len(items),
    "without_image": sum(item.document_picture is None for item in items),
    "without_text": sum(item.document_caption is None for item in items),
    "cropped_views": sum(item.is_cropped for item in items),
    "one_caption": sum(item.one_caption for item in items),
    "dropped_text_queries": dropped,
  }
  result = Items(source, items, counts)
  _check(result, captions)
  return result


def mirrored_crop(image: Image.Image, crop: tuple[float, float, float]) -> Image.Image:
  """A mirrored crop of 30-60 % of the picture's area in its own shape.

  crop: left edge, top edge, area, each in [0, 1) of what is possible.
  """
  left, top, area = crop
  low, high = CROP_AREA
  scale = (low + area * (high - low)) ** 0.5
  width, height = (max(1, round(side * scale)) for side in image.size)
  x = round(left * (image.width - width))
  y = round(top * (image.height - height))
  view = ImageOps.mirror(image.crop((x, y, x + width, y + height)))
  if min(view.size) > LARGEST_CROP:
    factor = LARGEST_CROP / min(view.size)
    size = (round(view.width * factor), round(view.height * factor))
    view = view.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
  return view


def _digest(name: str) -> bytes:
  # Salted, so that the choices do not depend on the hash that split the source.
  salted = f"gcl_jax/evaluation/{name}".encode("utf-8", "replace")
  return hashlib.sha256(salted).digest()


def _groups(source: Source) -> tuple[dict[str, list[int]], int]:
  """Record indices by group in stored order; the number of unreadable records."""
  groups: dict[str, list[int]] = {}
  bad = 0
  for i in range(len(source)):
    try:
      record = source[i]
    except (ValueError, OSError):
      bad += 1
      continue
    group = record.get("group")
    name = str(record["id"] if group is None else group)
    groups.setdefault(name, []).append(i)
  return groups, bad


class _Draft:
  """A group's pictures and captions, and which of them are its document."""

  def __init__(self, source: Source, name: str, records: Sequence[int]):
    self.name = name
    digest = _digest(name)
    self.numbers = [int.from_bytes(digest[k : k + 4]) for k in range(0, 32, 4)]
    loaded = [source[i] for i in records]
    self.pictures = _pictures(records, [r.get("images") or () for r in loaded])
    captions = _captions([record.get("texts") or () for record in loaded])
    self.caption, self.others = _choose_caption(captions, self.numbers[1])

  @property
  def picture(self) -> Reference | None:
    """The document picture."""
    if not self.pictures:
      return None
    return self.pictures[self.numbers[0] % len(self.pictures)]

  def other_pictures(self) -> Iterator[Reference]:
    """The pictures that are not the document, from a hashed place on."""
    yield from _others(self.pictures, self.picture, self.numbers[2])

  def other_captions(self) -> Iterator[str]:
    """The captions that differ from the document's, from a hashed place on."""
    n = len(self.others)
    for k in range(min(n, n if isinstance(self.others, list) else TRIES)):
      text = self.others[(self.numbers[3] + k) % n]
      if text and collapse(text) not in ("", collapse(self.caption)):
        yield text


def _others(pictures: list[Reference], chosen, start: int) -> Iterator[Reference]:
  others = [picture for picture in pictures if picture != chosen]
  for k in range(len(others)):
    yield others[(start + k) % len(others)]


def _pictures(records: Sequence[int], images: list[Sequence]) -> list[Reference]:
  """References to a group's pictures, without repetitions in stored lists.

  A table with one row per caption repeats the picture in every row. A lazy sequence of
  a single record makes its entries on demand and is trusted to make different ones.
  """
  references = [
    Reference(record, k)
    for record, sequence in zip(records, images, strict=True)
    for k in range(len(sequence))
  ]
  if len(references) < 2 or (
    len(records) == 1 and not isinstance(images[0], list | tuple)
  ):
    return references
  by_record = dict(zip(records, images, strict=True))
  seen: dict[Any, Reference] = {}
  for reference in references:
    try:
      name = _picture_name(by_record[reference.record][reference.index])
    except (ValueError, OSError):
      name = reference  # unreadable: counted when it is embedded
    seen.setdefault(name, reference)
  return list(seen.values())


def _captions(texts: list[Sequence[str]]) -> Sequence[str]:
  """A group's distinct captions; a single record's lazy sequence as it is."""
  if len(texts) == 1 and not isinstance(texts[0], list | tuple):
    return texts[0]
  seen: dict[str, str] = {}
  for sequence in texts:
    for text in sequence:
      if text and text.strip():
        seen.setdefault(collapse(text), text)
  return list(seen.values())


def _choose_caption(captions: Sequence[str], number: int):
  """The document caption (None without any), and the sequence of all captions."""
  for k in range(min(len(captions), TRIES)):
    text = captions[(number + k) % len(captions)]
    if text and text.strip():
      return text, captions
  return None, ()


def _picture_name(picture: Any) -> Any:
  """What tells pictures of one group apart: a path as written, or the content."""
  if isinstance(picture, str | os.PathLike):
    return os.fspath(picture)
  return _picture_content(picture)


def _picture_content(picture: Any) -> Any:
  """A digest of the picture's content; the path of a file that cannot be read."""
  if isinstance(picture, Image.Image):
    header = f"{picture.mode} {picture.size} ".encode()
    return hashlib.sha256(header + picture.tobytes()).digest()
  if isinstance(picture, str | os.PathLike):
    try:
      with open(picture, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
    except OSError:
      return os.fspath(picture)
  return hashlib.sha256(bytes(picture)).digest()


def _load_content(source: Source, reference: Reference) -> Any:
  """`_picture_content` of a reference; itself where it cannot be read."""
  try:
    return _picture_content(source[reference.record]["images"][reference.index])
  except (ValueError, OSError):
    return reference


def _document_pictures(source: Source, drafts: list[_Draft]) -> set:
  """The content of every document picture; empty where no item has a second one.

  Then every query view is a crop, and a crop is no document.
  """
  if all(len(draft.pictures) < 2 for draft in drafts):
    return set()
  return {_load_content(source, draft.picture) for draft in drafts if draft.pictures}


def _query_caption(draft: _Draft, captions: Counter) -> tuple[str | None, bool]:
  """The caption to ask with, None where every one is another item's document caption;
  and whether it is the item's only one."""
  if draft.caption is None:
    return None, False
  one_caption = True
  for text in draft.other_captions():
    one_caption = False
    if collapse(text) not in captions:
      return text, False
  if one_caption and captions[collapse(draft.caption)] == 1:
    return draft.caption, True
  return None, False


def _item(source: Source, draft: _Draft, captions: Counter, pictures: set) -> Item:
  view = next(
    (p for p in draft.other_pictures() if _load_content(source, p) not in pictures),
    None,
  )
  caption, one_caption = _query_caption(draft, captions)
  return Item(
    name=draft.name,
    code=draft.numbers[4],
    document_picture=draft.picture,
    query_picture=view,
    document_caption=draft.caption,
    query_caption=caption,
    one_caption=one_caption,
    crop=tuple(number / 2**32 for number in draft.numbers[5:8]),
  )


def _check(items: Items, captions: Counter) -> None:
  """No query picture or text is any item's document. A lone caption is its own item's
  only: it is asked where that item stands in the pool without its text."""
  documents = {item.document_picture for item in items if item.document_picture}
  for item in items:
    assert item.query_picture not in documents, item.name
    if item.query_caption is not None:
      asked = captions[collapse(item.query_caption)]
      assert asked == item.one_caption, item.name
