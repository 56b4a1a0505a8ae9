"""TensorFlow Datasets by name, read without TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gcl_jax.data.record import BadRecord, Record
from gcl_jax.data.settings import DataSettings, nearest
from gcl_jax.data.splits import choose_rows, group_hash, stored_eval_split
from gcl_jax.errors import UserError


class TFDSSource:
  """A prepared dataset of `config.data.tfds_name`, through its random-access files.

  Columns are feature names; `captions/text` reaches into a nested feature. The split
  of a row is the dataset's own. Only where there is neither test nor dev is a part
  split off by the hash of the group (which reads every row once, when
  `config.data.group_column` is a feature; else the row's place stands for its group).

  Raises:
    UserError: not prepared, prepared in files without random access, or a column that
      is no feature.
  """

  def __init__(self, settings: DataSettings, split: str):
    builder = _builder(settings)
    self._name = settings.tfds_name
    self._settings = settings
    self._image = settings.image_column
    features = builder.info.features
    self._check_columns(features)
    self._parts = {
      name: _open(builder, name, self._image)
      for name, info in builder.info.splits.items()
      if info.num_examples
    }
    if not self._parts:
      raise UserError(f"the dataset {self._name} has no examples")
    names = tuple(self._parts)
    counts = [len(part) for part in self._parts.values()]
    self._starts = np.concatenate([[0], np.cumsum(counts)])
    self._names = names
    self._chosen = choose_rows(
      split,
      names=names,
      codes=np.repeat(np.arange(len(names)), counts),
      groups=self._groups(split),
      eval_fraction=settings.eval_fraction,
      where=f"the dataset {self._name}",
    )

  def __len__(self) -> int:
    return len(self._chosen)

  def __getitem__(self, index: int) -> Record:
    """The record; pictures are their encoded bytes. Raises BadRecord."""
    return self._record(int(self._chosen[index]))

  def _record(self, place: int) -> Record:
    code = int(np.searchsorted(self._starts, place, side="right")) - 1
    split, offset = self._names[code], place - int(self._starts[code])
    example = self._parts[split][offset]
    name = _text(_reach(example, self._settings.id_column)) or f"{split}/{offset}"
    images = [image for image in _flat(_reach(example, self._image)) if image]
    texts = [
      text
      for column in self._settings.caption_column
      for value in _flat(_reach(example, column))
      if (text := _text(value)) and text.strip()
    ]
    if not images and not texts:
      raise BadRecord(f"{name} has neither an image nor a caption")
    group = _text(_reach(example, self._settings.group_column))
    return {
      "id": name,
      "images": images,
      "texts": texts,
      "group": group or name,
      "split": split,
      "meta": {},
    }

  def _groups(self, split: str) -> np.ndarray:
    """uint64 (rows,); zeros where no split depends on them."""
    total = int(self._starts[-1])
    if split not in ("train", "eval") or stored_eval_split(self._names):
      return np.zeros(total, np.uint64)
    hashes = (group_hash(self._group_of(place)) for place in range(total))
    return np.fromiter(hashes, np.uint64, total)

  def _group_of(self, place: int) -> str:
    try:
      if self._has_group:
        return self._record(place)["group"]
    except BadRecord:
      pass
    return f"row-{place}"

  def _check_columns(self, features: Any) -> None:
    names = _feature_names(features)
    fields = [(self._image, "image_column")]
    fields += [(column, "caption_column") for column in self._settings.caption_column]
    if self._settings.group_column != DataSettings.group_column:
      fields.append((self._settings.group_column, "group_column"))
    for column, field in fields:
      if column not in names:
        raise UserError(
          f'the dataset {self._name} has no feature "{column}"{nearest(column, names)} '
          f"Features: {', '.join(sorted(names))}. Name the right one in "
          f"config.data.{field}"
        )
    self._has_group = self._settings.group_column in names


def _builder(settings: DataSettings):
  if not settings.tfds_name:
    raise UserError(
      "config.data.tfds_name is empty; set it to a dataset's name, such as "
      "coco_captions, or set config.data.source to table"
    )
  import tensorflow_datasets as tfds

  name, folder = settings.tfds_name, settings.tfds_data_dir or None
  try:
    builder = tfds.builder(name, data_dir=folder)
  except tfds.core.DatasetNotFoundError as error:
    raise UserError(
      f"TensorFlow Datasets knows no dataset {name}, and none is prepared in "
      f"{folder or 'its default folder'}; correct config.data.tfds_name or "
      "config.data.tfds_data_dir"
    ) from error
  except (ValueError, ImportError, OSError, RuntimeError) as error:
    raise UserError(f"the dataset {name} cannot be opened: {error}") from error
  if not builder.info.splits:
    raise UserError(
      f"the dataset {name} is not prepared in {builder.data_dir}. Prepare it once with "
      f"tfds.builder({name!r}, data_dir=..., file_format='array_record')"
      ".download_and_prepare(), and point config.data.tfds_data_dir there"
    )
  return builder


def _open(builder, split: str, image: str):
  import tensorflow_datasets as tfds

  decoders: Any = tfds.decode.SkipDecoding()
  for part in reversed(image.split("/")):
    decoders = {part: decoders}
  try:
    return builder.as_data_source(split, decoders=decoders)
  except NotImplementedError as error:
    raise UserError(
      f"the dataset {builder.name} is prepared in files without random access; prepare "
      "it again with file_format='array_record'"
    ) from error


def _feature_names(features: Any, prefix: str = "") -> set[str]:
  names = set()
  inner = getattr(features, "feature", features)  # of a Sequence or a Dataset
  for name, feature in inner.items() if hasattr(inner, "items") else ():
    names.add(prefix + name)
    names |= _feature_names(feature, f"{prefix}{name}/")
  return names


def _reach(example: Any, column: str) -> Any:
  """The value at a path of feature names; None where it is not there."""
  value = example
  for part in column.split("/"):
    if isinstance(value, Mapping):
      if part not in value:
        return None
      value = value[part]
    elif isinstance(value, (list, tuple, np.ndarray)):
      value = [_reach(entry, part) for entry in value]
    else:
      return None
  return value


def _flat(value: Any) -> list[Any]:
  if value is None:
    return []
  if isinstance(value, np.ndarray):
    value = value.tolist()
  if isinstance(value, (list, tuple)):
    return [inner for entry in value for inner in _flat(entry)]
  return [value]


def _text(value: Any) -> str:
  if value is None:
    return ""
  if isinstance(value, bytes):
    return value.decode("utf-8", "replace")
  return str(value)
