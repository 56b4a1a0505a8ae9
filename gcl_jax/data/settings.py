"""The fields of `config.data`, with their defaults, checked."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from gcl_jax.errors import UserError

SOURCES = ("table", "webdataset", "parquet", "huggingface", "packed", "tfds", "scenes")


def nearest(name: str, names) -> str:
  """', did you mean "x"?' for the closest of `names`; "." when none is close."""
  close = difflib.get_close_matches(name, [str(n) for n in names], n=1)
  return f', did you mean "{close[0]}"?' if close else "."


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """`config.data` as plain values; see training/config.py for what each one does.

  `caption_column` holds one or several columns: a tuple, or one string with commas.
  `cache_dir` is where the indexes of tables are kept; "" is ~/.cache/gcl_jax.
  """

  source: str = "table"
  path: str = ""
  table: str = ""
  image_column: str = "image"
  caption_column: tuple[str, ...] = ("captions",)
  group_column: str = "group"
  id_column: str = "id"
  image_root: str = ""
  tfds_name: str = ""
  tfds_data_dir: str = ""
  scenes_train_size: int = 10_000
  scenes_image_size: int = 64
  scenes_seed: int = 0
  eval_fraction: float = 0.1
  max_bad_fraction: float = 0.01
  cache_dir: str = ""
  # For who builds the pipeline; sources do not look at these.
  train_split: str = "train"
  eval_split: str = "eval"
  augment: str = "none"
  crop_scale: tuple[float, float] = (0.5, 1.0)
  text_buckets: tuple[int, ...] = (16, 24, 32, 48, 77)
  threads: int = 4
  prefetch: int = 4

  @classmethod
  def from_config(cls, data: DataSettings | Mapping[str, Any] | Any) -> DataSettings:
    """From a ConfigDict or any mapping; absent fields take their defaults.

    Raises:
      UserError: an unknown field (the message says the nearest one), or a value
        outside its range.
    """
    if isinstance(data, cls):
      return data
    given = dict(data.items())
    known = {field.name for field in dataclasses.fields(cls)}
    for name in given:
      if name not in known:
        raise UserError(
          f'config.data has no field "{name}"{nearest(name, known)} '
          f"Fields: {', '.join(sorted(known))}"
        )
    columns = given.get("caption_column", cls.caption_column)
    if isinstance(columns, str):
      columns = columns.split(",")
    given["caption_column"] = tuple(c.strip() for c in columns if c.strip())
    for name in ("crop_scale", "text_buckets"):
      if name in given:
        given[name] = tuple(given[name])
    for name in ("path", "tfds_data_dir", "cache_dir"):
      given[name] = str(given.get(name) or "")
    settings = cls(**given)
    settings._check()
    return settings

  def _check(self) -> None:
    if self.source not in SOURCES:
      raise UserError(
        f'config.data.source "{self.source}" is none of {", ".join(SOURCES)}'
        f"{nearest(self.source, SOURCES)}"
      )
    if not self.caption_column or not self.image_column:
      raise UserError(
        "config.data.image_column and config.data.caption_column must name a column"
      )
    if not 0 < self.eval_fraction < 1:
      raise UserError(
        f"config.data.eval_fraction is {self.eval_fraction}; choose between 0 and 1"
      )
    if not 0 <= self.max_bad_fraction <= 1:
      raise UserError(
        f"config.data.max_bad_fraction is {self.max_bad_fraction}; choose from 0 to 1"
      )
