"""Which kind of source a path holds, by what lies there."""

from __future__ import annotations

from gcl_jax.paths import as_path
from gcl_jax.data.packed_format import MANIFEST
from gcl_jax.errors import UserError

_BY_NAME = {
  MANIFEST: "packed",
  "dataset_dict.json": "huggingface",
  "state.json": "huggingface",
  "captions.jsonl": "table",
}
_BY_SUFFIX = {
  ".jsonl": "table",
  ".csv": "table",
  ".tsv": "table",
  ".tar": "webdataset",  # before Parquet: img2dataset writes both
  ".parquet": "parquet",
  ".arrow": "huggingface",
}


def guess_source(given: str) -> str:
  """The `config.data.source` for a path; "table" where nothing speaks for another.

  A file or a pattern goes by its suffix. In a folder a file of a known name decides, else
  the suffixes there, else those one folder down.
  """
  by_own_suffix = _BY_SUFFIX.get(f".{given.rpartition('.')[2].lower()}")
  if by_own_suffix:
    return by_own_suffix
  try:
    folder = as_path(given)
    if not folder.is_dir():
      return "table"
    inside = list(folder.iterdir())
    names = {path.name for path in inside}
    for name, source in _BY_NAME.items():
      if name in names:
        return source
    for files in (inside, (p for d in inside if d.is_dir() for p in d.iterdir())):
      suffixes = {path.suffix.lower() for path in files}
      for suffix, source in _BY_SUFFIX.items():
        if suffix in suffixes:
          return source
  except (OSError, UserError):
    pass  # who opens it says what is wrong
  return "table"
