"""`config.data`: its fields, and which source it opens."""

from __future__ import annotations

import pytest
from ml_collections import ConfigDict

from gcl_jax.data import DataSettings, open_source
from gcl_jax.errors import UserError
from gcl_jax.training.config import default_config


def test_the_config_of_a_run_is_accepted():
  config = default_config()
  settings = DataSettings.from_config(config.data)
  assert settings.caption_column == ("captions",)
  for name, value in config.data.items():
    if name != "caption_column":
      assert getattr(settings, name) == value, name


def test_defaults_and_both_kinds_of_mapping():
  fields = {"source": "table", "path": "x", "caption_column": "title, about"}
  expected = DataSettings(path="x", caption_column=("title", "about"))
  assert DataSettings.from_config(fields) == expected
  assert DataSettings.from_config(ConfigDict(fields)) == expected
  assert DataSettings.from_config(expected) is expected


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"image_colunm": "x"}, 'no field "image_colunm", did you mean "image_column"'),
    ({"source": "tabel"}, 'did you mean "table"'),
    ({"eval_fraction": 0.0}, "eval_fraction is 0.0"),
    ({"max_bad_fraction": 1.5}, "max_bad_fraction"),
    ({"caption_column": ""}, "must name a column"),
  ],
)
def test_bad_fields(fields, message):
  with pytest.raises(UserError, match=message):
    open_source(fields, split="train")


def test_scenes():
  data = {"source": "scenes", "scenes_train_size": 40, "scenes_image_size": 32}
  train = open_source(data, split="train")
  assert len(train) == 40
  assert train[0]["images"][0].size == (32, 32)
  assert len(open_source(data, split="eval")) == 1000
  with pytest.raises(UserError, match="test"):
    open_source(data, split="test")
