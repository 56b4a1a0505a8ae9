"""Which kind of source a path holds."""

from __future__ import annotations

import pytest

from gcl_jax.data import change_data, guess_source, open_source
from gcl_jax.errors import UserError
from gcl_jax.training.config import default_config


@pytest.mark.parametrize(
  ("names", "source"),
  [
    ([], "table"),
    (["captions.jsonl", "a.tar"], "table"),
    (["meta.csv", "a.parquet"], "table"),
    (["0.tar", "0.parquet", "0_stats.json"], "webdataset"),
    (["train/0.tar"], "webdataset"),
    (["README.md", "data/train-0.parquet"], "parquet"),
    (["state.json", "data-0.arrow"], "huggingface"),
    (["dataset_dict.json", "train/state.json"], "huggingface"),
    (["x-train.arrow"], "huggingface"),
    (["packed.json", "pairs-00000-of-00001.array_record"], "packed"),
  ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_folders(tmp_path, bucket, names, source, remote):
  (tmp_path / "data").mkdir()
  for name in names:
    (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "data" / name).write_bytes(b"x")
  path = bucket(tmp_path / "data") if remote else str(tmp_path / "data")
  assert guess_source(path) == source
  data = default_config().data
  change_data(data, path, ())
  assert (data.source, data.path) == (source, path)
  if source != "table":
    data.source = "table"
    with pytest.raises(UserError, match=f"no table; set config.data.source={source}"):
      open_source(data, split="all")


@pytest.mark.parametrize(
  ("path", "source"),
  [
    ("x/{000..012}.tar", "webdataset"),
    ("gs://b/*.parquet", "parquet"),
    ("nowhere", "table"),
    ("nowhere/captions.csv", "table"),
    ("nonsense://b", "table"),
  ],
)
def test_files_patterns_and_nothing(path, source):
  assert guess_source(path) == source
