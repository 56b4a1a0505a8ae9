"""Files of a run that grow while it trains, where its folder is a bucket.

An object cannot be appended to. So `metrics.jsonl`, TensorBoard's files and profiler
traces grow in a folder of this machine and are put into the bucket whole: before each
checkpoint, after each evaluation and at the end. A run that goes on, on any machine,
fetches `metrics.jsonl` first; since lines are in the bucket before the checkpoint that
they belong to, none up to that step is lost by a kill. A local run writes in its own
folder and nothing of this happens.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jax

from gcl_jax.paths import AnyPath, RemotePath


class Spool:
  """The local folder of a run's growing files, and their copies in its bucket."""

  def __init__(self, workdir: AnyPath, fetch: tuple[str, ...] = ()):
    """Args:
    workdir: the run's folder.
    fetch: names of files that go on where they were left; the first process has them.

    Raises:
      OSError: the store refuses.
    """
    self.folder = workdir
    self._remote = workdir if isinstance(workdir, RemotePath) else None
    self._sizes: dict[Path, int] = {}  # what was put, by how long it was
    if self._remote is None:
      return
    self._temporary = tempfile.TemporaryDirectory(prefix="gcl_jax_")
    self.folder = Path(self._temporary.name)
    for name in fetch if jax.process_index() == 0 else ():
      if (self._remote / name).is_file():
        (self._remote / name).fetch(self.folder / name)

  def sync(self) -> None:
    """Puts what has changed. A store that refuses is told of and asked again later."""
    if self._remote is None:
      return
    for file in sorted(p for p in self.folder.rglob("*") if p.is_file()):
      size, name = file.stat().st_size, file.relative_to(self.folder).as_posix()
      if self._sizes.get(file) == size:
        continue
      try:
        (self._remote / name).put(file)
      except OSError as error:
        # Not worth a run: it grows on here, and checkpoints say what the store refuses.
        said = f"note: {self._remote / name} is not up to date ({error})"
        print(said, file=sys.stderr, flush=True)
        return
      self._sizes[file] = size

  def close(self) -> None:
    """Puts what has changed, and removes the local folder."""
    self.sync()
    if self._remote is not None:
      self._temporary.cleanup()
