"""What becomes document, what becomes query."""

import numpy as np
import pytest
from evaluation_fakes import picture, record, records
from PIL import Image

from gcl_jax.data import collapse
from gcl_jax.errors import UserError
from gcl_jax.evaluation import build_items
from gcl_jax.evaluation.items import mirrored_crop


class Lazy:
  """A sequence that remembers what was asked of it."""

  def __init__(self, make, length):
    self.make, self.length, self.asked = make, length, set()

  def __len__(self):
    return self.length

  def __getitem__(self, k):
    self.asked.add(k)
    return self.make(k)


def by_name(items):
  return {item.name: item for item in items}


def test_records_of_one_group_are_united():
  source = [
    {"id": "1", "group": "a", "images": ["x.jpg"], "texts": ["A dog", "a  DOG "]},
    {"id": "2", "group": "b", "images": ["y.jpg"], "texts": ["a cat", "one cat"]},
    {"id": "3", "group": "a", "images": ["x.jpg"], "texts": ["two dogs", " "]},
  ]
  items = build_items(source)
  assert items.counts["items"] == 2
  assert items.counts["cropped_views"] == 2  # x.jpg in two rows is one picture
  a = by_name(items)["a"]
  assert a.query_picture is None
  assert {a.document_caption, a.query_caption} == {"A dog", "two dogs"}


def test_pictures_of_other_rows_are_query_views():
  source = [
    {"id": f"{k}{v}", "group": str(k), "images": [picture(k, v)], "texts": ["a", "b"]}
    for k in range(20)
    for v in range(4)
  ]
  items = build_items(source)
  assert items.counts["cropped_views"] == 0
  views = {
    (item.document_picture.record % 4, item.query_picture.record % 4) for item in items
  }
  assert all(document != query for document, query in views)
  assert len({document for document, _ in views}) == 4  # the hash takes all of them


@pytest.mark.parametrize("form", [str, str.encode])
def test_one_photo_in_five_caption_rows_is_one_picture(form):
  source = [
    {"id": f"{k}{v}", "group": str(k), "images": [form(f"{k}")], "texts": [f"{k}{v}"]}
    for k in range(20)
    for v in range(5)
  ]
  items = build_items(source)
  assert items.counts["cropped_views"] == 20
  assert {item.document_picture.record % 5 for item in items} == {0}  # the first row


def test_captions_that_differ_in_blanks_and_case_are_one():
  source = [
    {"id": f"{k}", "images": [], "texts": [f"dog {k}", f" DOG  {k}", f"cat {k}"]}
    for k in range(20)
  ]
  items = build_items(source)
  for item in items:
    pair = {item.document_caption, item.query_caption}
    assert pair == {f"dog {item.name}", f"cat {item.name}"}


def test_lazy_sequences_are_asked_only_for_what_is_chosen():
  images = Lazy(lambda v: picture(0, v), 50)
  texts = Lazy(lambda v: f"wording {v}", 50)
  items = build_items([{"id": "a", "images": images, "texts": texts}])
  assert len(images.asked) == 2
  assert len(texts.asked) <= 3
  item = items[0]
  assert item.document_picture.index != item.query_picture.index
  assert item.document_caption != item.query_caption


def test_items_hold_no_pictures():
  items = build_items(records(4))
  for item in items:
    assert not any(isinstance(value, Image.Image) for value in vars(item).values())
  assert items.document_picture(0).size == (8, 6)


def test_order_of_records_changes_nothing():
  source = records(30)
  there = build_items(source)
  back = build_items(source[::-1])
  assert [i.name for i in there] == [i.name for i in back]
  assert [i.query_caption for i in there] == [i.query_caption for i in back]
  assert [i.code for i in there] == [i.code for i in back]
  k = 7
  assert there.query_picture(k).tobytes() == back.query_picture(k).tobytes()


def test_limit_takes_the_same_items_in_any_order():
  source = records(30)
  names = {i.name for i in build_items(source, limit=10)}
  assert len(names) == 10
  assert names == {i.name for i in build_items(source[::-1], limit=10)}
  assert names < {i.name for i in build_items(source)}


def test_query_text_is_no_items_document():
  # Item b's second caption is a's only other one or a's document.
  source = [
    {"id": "a", "images": [], "texts": ["one", "two", "three"]},
    {"id": "b", "images": [], "texts": ["ONE ", "two", "three", "four"]},
    {"id": "c", "images": [], "texts": ["three", "one", "five"]},
  ]
  items = build_items(source)
  documents = {collapse(item.document_caption) for item in items}
  for item in items:
    assert item.query_caption is None or collapse(item.query_caption) not in documents


def test_text_query_without_a_free_caption_is_dropped_and_counted():
  source = [{"id": f"x{k}", "images": [], "texts": ["dog", "cat"]} for k in range(20)]
  items = build_items(source)  # both captions are somebody's document
  assert {item.query_caption for item in items} == {None}
  assert items.counts["dropped_text_queries"] == 20
  assert items.counts["one_caption"] == 0


def test_one_caption_is_its_own_query():
  items = build_items(records(5, captions=1))
  for item in items:
    assert item.one_caption
    assert item.query_caption == item.document_caption
  assert items.counts["one_caption"] == 5


def test_one_caption_that_another_item_has_is_not_asked():
  source = [record(k, captions=0) | {"texts": ["the same"]} for k in range(3)]
  items = build_items(source)
  assert {item.query_caption for item in items} == {None}
  assert items.counts["dropped_text_queries"] == 3


def test_query_picture_is_no_items_document_by_content():
  # Every second view is the first view of the next item, as when vendors copy.
  n = 40
  source = [
    record(k, views=0) | {"images": [picture(k, 0), picture((k + 1) % n, 0)]}
    for k in range(n)
  ]
  items = build_items(source)
  documents = {items.document_picture(k).tobytes() for k in range(n)}
  views = [k for k in range(n) if not items[k].is_cropped]
  assert 0 < len(views) < n
  for k in views:
    assert items.query_picture(k).tobytes() not in documents
  assert items.counts["cropped_views"] == n - len(views)


def test_items_that_lack_a_modality():
  source = [record(0, captions=0), record(1, views=0), record(2, 0, 0), record(3)]
  items = build_items(source)
  assert items.counts["items"] == 3
  assert items.counts["without_image"] == 1
  assert items.counts["without_text"] == 1
  named = by_name(items)
  assert named["item 0"].query_caption is None
  assert named["item 1"].document_picture is None
  assert not named["item 1"].is_cropped


def test_nothing_to_evaluate_says_so():
  with pytest.raises(UserError, match="nothing to evaluate"):
    build_items([record(0, 0, 0)])


def test_bad_records_are_counted():
  class Source(list):
    def __getitem__(self, k):
      if k == 1:
        raise ValueError("broken line")
      return super().__getitem__(k)

  items = build_items(Source(records(3)))
  assert items.counts["items"] == 2
  assert items.counts["bad_records"] == 1


def test_crop_is_mirrored_and_of_the_area():
  ramp = np.tile(np.arange(100, dtype=np.uint8), (80, 1))
  image = Image.fromarray(np.dstack([ramp, ramp.T[:80].repeat(2, 1)[:, :100], ramp]))
  areas = []
  for area in (0.0, 0.5, 0.999):
    view = mirrored_crop(image, (0.0, 0.0, area))
    areas.append(view.width * view.height / 8_000)
    red = np.asarray(view)[0, :, 0].astype(int)
    assert (np.diff(red) == -1).all()  # mirrored
    assert red[-1] == 0  # and from the left edge
  np.testing.assert_allclose(areas, [0.3, 0.45, 0.6], atol=0.01)
  right = mirrored_crop(image, (0.9999, 0.9999, 0.5))
  assert np.asarray(right)[0, 0, 0] == 99


def test_crop_is_seeded_by_the_name():
  items = build_items(records(40, views=1))
  crops = np.array([item.crop for item in items])
  assert ((crops >= 0) & (crops < 1)).all()
  assert crops.std(axis=0) == pytest.approx([0.29] * 3, abs=0.06)
  again = build_items(records(40, views=1))
  assert [item.crop for item in again] == [item.crop for item in items]


def test_tiny_pictures_can_be_cropped():
  assert mirrored_crop(Image.new("RGB", (1, 1)), (0.5, 0.5, 0.0)).size == (1, 1)


def test_large_crops_are_made_smaller():
  view = mirrored_crop(Image.new("RGB", (4_000, 3_000)), (0.5, 0.5, 0.999))
  assert min(view.size) == 1_024
