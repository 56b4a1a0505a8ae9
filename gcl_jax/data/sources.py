"""`config.data` to a source of records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gcl_jax.data.record import Source
from gcl_jax.data.settings import DataSettings


def open_source(data: DataSettings | Mapping[str, Any] | Any, *, split: str) -> Source:
  """The records of one split.

  Args:
    data: `config.data`: a ConfigDict, a mapping, or settings.
    split: "train", "eval" (the stored `test`, else `dev`, else a part chosen by a hash
      of the group), "all", or a split that the source stores.

  Raises:
    UserError: nothing there, no such split, or a field that cannot be.
  """
  settings = DataSettings.from_config(data)
  if settings.source == "scenes":
    from gcl_jax.data.scenes import Scenes

    return Scenes(
      split,
      size=settings.scenes_train_size if split == "train" else None,
      image_size=settings.scenes_image_size,
      seed=settings.scenes_seed,
    )
  if settings.source == "tfds":
    from gcl_jax.data.tfds_source import TFDSSource

    return TFDSSource(settings, split)
  if settings.source == "webdataset":
    from gcl_jax.data.webdataset import WebDatasetSource

    return WebDatasetSource(settings, split)
  if settings.source == "parquet":
    from gcl_jax.data.parquet import open_parquet

    return open_parquet(settings, split)
  if settings.source == "huggingface":
    from gcl_jax.data.huggingface import open_huggingface

    return open_huggingface(settings, split)
  if settings.source == "packed":
    from gcl_jax.data.packed import PackedSource

    return PackedSource(settings, split)
  from gcl_jax.data.table import TableSource

  return TableSource(settings, split)
