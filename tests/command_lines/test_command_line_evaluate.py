"""Which data an evaluation reads."""

import pytest

from gcl_jax.data import change_data
from gcl_jax.errors import UserError
from gcl_jax.training.config import default_config


@pytest.mark.parametrize("source", ["scenes", "tfds", "table"])
def test_data_is_a_folder_whatever_the_run_was_trained_on(source):
  data = default_config().data
  data.source = source
  change_data(data, "pairs", ["caption_column=text", "eval_fraction=0.5"])
  assert (data.source, data.path) == ("table", "pairs")
  assert data.caption_column == "text"
  assert data.eval_fraction == 0.5


def test_without_data_the_run_keeps_its_own():
  data = default_config().data
  data.source = "tfds"
  change_data(data, "", ["tfds_name=coco"])
  assert (data.source, data.path, data.tfds_name) == ("tfds", "", "coco")


@pytest.mark.parametrize("option", ["colour=red", "threads", "threads=many"])
def test_options_that_cannot_be(option):
  with pytest.raises(UserError, match="--data_option=" + option):
    change_data(default_config().data, "", [option])
