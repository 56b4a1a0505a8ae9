"""TensorFlow Datasets without TensorFlow, on a dataset built here."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from gcl_jax.data import Pipeline, open_source
from gcl_jax.errors import UserError


def png(i):
  file = io.BytesIO()
  Image.new("RGB", (5, 4), (i, 0, 0)).save(file, "PNG")
  return file.getvalue()


def builder_class(split_sizes):
  import tensorflow_datasets as tfds

  class TinyPairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = tfds.features.FeaturesDict(
        {
          "picture": tfds.features.Image(shape=(None, None, 3)),
          "title": tfds.features.Text(),
          "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
          "product": tfds.features.Text(),
        }
      )
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
      del dl_manager
      return {name: self._generate_examples(size) for name, size in split_sizes.items()}

    def _generate_examples(self, size):
      for i in range(size):
        yield (
          i,
          {
            "picture": io.BytesIO(png(i)),
            "title": f"größer {i}",
            "captions": [{"text": f"c{i}"}, {"text": f"d{i}"}],
            "product": f"p{i // 2}",
          },
        )

  return TinyPairs


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """Two data folders: with train and test, and with train alone."""
  folders = []
  for sizes in ({"train": 12, "test": 3}, {"train": 40}):
    folder = str(tmp_path_factory.mktemp("tfds"))
    builder = builder_class(sizes)(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    folders.append(folder)
  return folders


def fields(folder, **more):
  return {
    "source": "tfds",
    "tfds_name": "tiny_pairs",
    "tfds_data_dir": folder,
    "image_column": "picture",
    "caption_column": "title",
  } | more


def test_records_through_the_pipeline_without_tensorflow(prepared, processor):
  source = open_source(fields(prepared[0]), split="train")
  assert len(source) == 12
  assert len(open_source(fields(prepared[0]), split="eval")) == 3
  with Pipeline(source, processor, batch_size=12, seed=0) as pipeline:
    batch = next(pipeline)
  reds = batch["pixels"][:, 0, 0, 0].tolist()
  assert sorted(reds) == list(range(12)) and batch["has_text"].all()
  for row, index in enumerate(batch["index"]):
    record = source[index]
    assert record["images"] == [png(reds[row])]  # the bytes, not decoded
    assert record["texts"] == [f"größer {reds[row]}"]
    assert record["group"] == record["id"] and record["split"] == "train"
  assert "tensorflow" not in sys.modules


def test_nested_captions_and_groups(prepared):
  data = fields(prepared[0], caption_column="captions/text", group_column="product")
  record = open_source(data, split="test")[0]
  (image,) = record["images"]
  number = Image.open(io.BytesIO(image)).getpixel((0, 0))[0]
  assert record["texts"] == [f"c{number}", f"d{number}"]
  assert record["group"] == f"p{number // 2}"


def test_without_an_evaluation_split_groups_are_hashed(prepared):
  data = fields(prepared[1], group_column="product", eval_fraction=0.3)
  train, evaluation = (open_source(data, split=s) for s in ("train", "eval"))
  groups = [{r["group"] for r in source} for source in (train, evaluation)]
  assert len(train) + len(evaluation) == 40 and not groups[0] & groups[1]
  assert 2 <= len(groups[1]) <= 12 and np.all([len(g) for g in groups])
  plain = open_source(fields(prepared[1]), split="eval")
  assert 1 <= len(plain) <= 12


@pytest.mark.parametrize(
  ("more", "split", "message"),
  [
    ({"tfds_name": ""}, "train", "tfds_name is empty"),
    ({"tfds_name": "no_such_pairs"}, "train", "knows no dataset no_such_pairs"),
    ({"tfds_name": "mnist"}, "train", "mnist is not prepared"),
    ({"image_column": "pictures"}, "train", 'did you mean "picture"'),
    ({}, "tset", 'did you mean "test"'),
  ],
)
def test_bad_input(prepared, more, split, message):
  with pytest.raises(UserError, match=message):
    open_source(fields(prepared[0], **more), split=split)
