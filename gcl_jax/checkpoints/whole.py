"""Which steps of a run's folder are whole: all of their files are there, at full length.

On this machine Orbax writes a step under another name and renames it; in a store it
marks a step that is whole with a file. What was cut off later (a copy that stopped, a
disk that lost power) is seen from the index of each array store, which names every file
and how far it must reach.
"""

from __future__ import annotations

from pathlib import Path

import tensorstore

from gcl_jax.checkpoints.folder import Folder, run_folder
from gcl_jax.paths import AnyPath, RemotePath

STEPS = "checkpoints"
_STORE_MARK = "commit_success.txt"
_INDEX = (
  "_CHECKPOINT_METADATA",
  "state/_METADATA",
  "state/manifest.ocdbt",
  "data/metadata",
)


def saved_steps(workdir: Folder) -> list[int]:
  """The whole steps in a run's folder, ascending, without opening it for writing."""
  return sorted(int(path.name) for path in _steps(workdir) if _is_whole(path))


def damaged_steps(workdir: Folder) -> list[Path]:
  """The folders of steps of this machine that lack something; of a store none.

  What a store has half of, Orbax itself throws away.
  """
  steps = sorted(_steps(workdir))
  return [p for p in steps if not isinstance(p, RemotePath) and not _is_whole(p)]


def _steps(workdir: Folder) -> list[AnyPath]:
  folder = run_folder(workdir) / STEPS
  inside = folder.iterdir() if folder.is_dir() else ()
  return [path for path in inside if path.name.isdigit()]


def _is_whole(step: AnyPath) -> bool:
  if isinstance(step, RemotePath):
    return (step / _STORE_MARK).is_file()
  if not all((step / name).is_file() for name in _INDEX):
    return False
  try:
    lengths = _lengths(step / "state")
  except ValueError:  # an index that is cut short
    return False
  files = {name: step / "state" / name for name in lengths}
  return all(
    file.is_file() and file.stat().st_size >= lengths[name]
    for name, file in files.items()
  )


def _lengths(folder: Path) -> dict[str, int]:
  """How many bytes each file of an OCDBT store must have at least, by its name.

  Raises:
    ValueError: the index cannot be read.
  """
  where = {"driver": "file", "path": f"{folder.absolute()}/"}
  base = tensorstore.KvStore.open(where).result()
  manifest = tensorstore.ocdbt.dump(base).result()
  lengths: dict[str, int] = {}

  def note(location: str) -> str:
    _, *name, offset, length = location.split(":")
    file = "".join(name)
    lengths[file] = max(lengths.get(file, 0), int(offset) + int(length))
    return location

  todo = [manifest["versions"][-1]["root"].get("location")]
  while todo:
    node = todo.pop()
    if node is None:  # no arrays
      continue
    entries = tensorstore.ocdbt.dump(base, note(node)).result()["entries"]
    todo += [entry["location"] for entry in entries if "location" in entry]
    for entry in entries:
      if "indirect_value" in entry:
        note(entry["indirect_value"])
  return lengths
