"""Paths of this machine and of object stores (`gs://`, `s3://`, ...), alike.

A local path is a `pathlib.Path`, and costs what it always did. Anything with `://` is a
`RemotePath` over fsspec, with the few methods of `Path` that sources and runs use.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import posixpath
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gcl_jax.errors import UserError

_URL = re.compile(r"^([a-z][a-z0-9+.]*)://")
_BLOCK = 8 << 20  # bytes read ahead where a remote file is read from its start
_LIBRARIES = {
  "gs": "gcsfs",
  "gcs": "gcsfs",
  "s3": "s3fs",
  "az": "adlfs",
  "abfs": "adlfs",
}


def is_remote(path: Any) -> bool:
  """Whether it is an address of an object store and not a path of this machine."""
  return isinstance(path, RemotePath) or bool(_URL.match(str(path)))


def as_path(text: str) -> AnyPath:
  """A path from what a user wrote; `~` is expanded.

  Raises:
    UserError: the library for this kind of address is not installed.
  """
  return RemotePath(text) if is_remote(text) else Path(text).expanduser()


def open_file(path: AnyPath) -> IO[bytes]:
  """The file opened for reading from its start. OSError as `open`."""
  return path.open("rb")


def stamp(path: AnyPath) -> list:
  """What tells that a file has changed: its full name, size and version."""
  if isinstance(path, RemotePath):
    return path.stamp()
  stat = path.stat()
  return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def size_of(path: AnyPath) -> int:
  """Bytes."""
  return path.size() if isinstance(path, RemotePath) else path.stat().st_size


def write_whole(path: AnyPath, text: str) -> None:
  """Writes a file whole or not at all. OSError as `open`.

  Of a local file a copy is written and renamed; what is put into a store is there when
  all of it is.
  """
  if isinstance(path, RemotePath):
    path.write_bytes(text.encode())
    return
  part = path.with_name(path.name + ".part")
  try:
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
  except OSError:
    with contextlib.suppress(OSError):
      part.unlink(missing_ok=True)  # it would hold room that is wanted
    raise


@contextlib.contextmanager
def local_copy(folder: AnyPath) -> Iterator[Path]:
  """A folder to read from: itself, or of a remote one a copy that goes at the end.

  OSError as `open`; UserError where a store cannot be reached.
  """
  if not isinstance(folder, RemotePath):
    yield folder
    return
  with tempfile.TemporaryDirectory(prefix="gcl_jax_") as here:
    for file in folder.walk():
      target = Path(here, str(file)[len(str(folder)) + 1 :])
      target.parent.mkdir(parents=True, exist_ok=True)
      file.fetch(target)
    yield Path(here)


@contextlib.contextmanager
def local_draft(folder: AnyPath) -> Iterator[Path]:
  """A folder to write into: itself, or one that is copied to the remote one at the end.

  OSError as `open`.
  """
  if not isinstance(folder, RemotePath):
    yield folder
    return
  with tempfile.TemporaryDirectory(prefix="gcl_jax_") as here:
    yield Path(here)
    for file in sorted(p for p in Path(here).rglob("*") if p.is_file()):
      (folder / file.relative_to(here).as_posix()).put(file)


class RemotePath:
  """One address. Cheap to make and to pickle; asks the store only when told to.

  What a store refuses (no network, no credentials) is a UserError in `is_file`, `is_dir`,
  `iterdir`, `glob` and `size`, which run before a training does, and an OSError when
  contents are read.
  """

  def __init__(self, url: str):
    scheme = _URL.match(url)[1]
    rest = posixpath.normpath(url[len(scheme) + 3 :]).lstrip("/")
    self._url = f"{scheme}://{'' if rest == '.' else rest}"
    self._scheme = scheme
    self._fs  # noqa: B018 (a missing library is best said here)

  @property
  def _fs(self):
    import fsspec

    try:
      return fsspec.filesystem(self._scheme)  # fsspec keeps one for each process
    except ImportError as error:
      library = _LIBRARIES.get(self._scheme, "its library")
      raise UserError(
        f"{self._url} needs {library}, which is not installed: pip install {library}"
      ) from error
    except ValueError as error:
      raise UserError(
        f"{self._url}: {self._scheme}:// is no kind of address that can be read; use a "
        "folder of this machine, gs:// or s3://"
      ) from error

  def __str__(self) -> str:
    return self._url

  def __repr__(self) -> str:
    return f"RemotePath({self._url!r})"

  def __eq__(self, other) -> bool:
    return isinstance(other, RemotePath) and self._url == other._url

  def __lt__(self, other) -> bool:
    return self._url < other._url

  def __hash__(self) -> int:
    return hash(self._url)

  def __truediv__(self, name: str) -> RemotePath:
    return RemotePath(f"{self._url}/{name}")

  @property
  def name(self) -> str:
    return self._url.rsplit("/", 1)[1]

  @property
  def suffix(self) -> str:
    return Path(self.name).suffix

  @property
  def stem(self) -> str:
    return Path(self.name).stem

  @property
  def parent(self) -> RemotePath:
    return RemotePath(self._url.rsplit("/", 1)[0])

  def with_name(self, name: str) -> RemotePath:
    return self.parent / name

  def is_file(self) -> bool:
    return self._ask(self._fs.isfile)

  def is_dir(self) -> bool:
    return self._ask(self._fs.isdir)

  def mkdir(self, **_) -> None:
    """Nothing: a store has no folders, only names of files."""

  def exists(self) -> bool:
    return self._ask(self._fs.exists)

  def iterdir(self) -> Iterator[RemotePath]:
    self._fs.invalidate_cache(self._url)  # other processes may have written since
    names = self._ask(lambda url: self._fs.ls(url, detail=False))
    for name in names:
      path = self._full(name)
      if path != self:  # some stores list a placeholder of the folder itself
        yield path

  def glob(self, pattern: str) -> list[RemotePath]:
    """What lies in this folder under a name like the pattern; sorted."""
    inside = self.iterdir() if self.is_dir() else ()
    return sorted(path for path in inside if fnmatch.fnmatch(path.name, pattern))

  def walk(self) -> list[RemotePath]:
    """All files below, sorted."""
    return self._found(self._ask(self._fs.find))

  def glob_self(self) -> list[RemotePath]:
    """The files that this address, a pattern, stands for; sorted."""
    return self._found(self._ask(self._fs.glob))

  def size(self) -> int:
    return int(self._ask(self._fs.size))

  def stamp(self) -> list:
    about = self._ask(self._fs.info)
    changed = ("generation", "etag", "ETag", "md5Hash", "mtime", "updated", "created")
    version = next((str(about[key]) for key in changed if about.get(key)), "")
    return [self._url, about.get("size"), version]

  def open(self, mode: str = "rb") -> IO[bytes]:
    return self._read(lambda: self._fs.open(self._url, mode, block_size=_BLOCK))

  def open_exact(self) -> IO[bytes]:
    """Opened for a reader that knows which ranges it needs: nothing is read ahead."""
    return self._read(lambda: self._fs.open(self._url, "rb", cache_type="none"))

  def read_bytes(self) -> bytes:
    return self._read(lambda: self._fs.cat_file(self._url))

  def read_text(self) -> str:
    return self.read_bytes().decode()

  def write_bytes(self, raw: bytes) -> None:
    """Puts a file here. It appears whole or not at all."""
    self._read(lambda: self._fs.pipe_file(self._url, raw))

  def read_range(self, offset: int, length: int) -> bytes:
    """The bytes there, in one request; fewer at the file's end."""
    return self._read(
      lambda: self._fs.cat_file(self._url, start=offset, end=offset + length)
    )

  def fetch(self, target: Path) -> None:
    """Copies the file to this machine."""
    self._read(lambda: self._fs.get_file(self._url, str(target)))

  def put(self, source: Path) -> None:
    """Copies a file of this machine here. It appears whole or not at all."""
    self._read(lambda: self._fs.put_file(str(source), self._url))

  def _found(self, names: list[str]) -> list[RemotePath]:
    return sorted(map(self._full, names))

  def _full(self, name: str) -> RemotePath:
    """From a name as the store gives it, with or without scheme and first slash."""
    return RemotePath(f"{self._scheme}://{_URL.sub('', name).lstrip('/')}")

  def _ask(self, call) -> Any:
    try:
      return call(self._url)
    except Exception as error:  # each store has its own, few are OSErrors
      raise UserError(
        f"{self._url} cannot be reached ({_reason(error)}); check the address, the "
        "network, and the credentials of this machine"
      ) from error

  def _read(self, call) -> Any:
    try:
      return call()
    except OSError:
      raise
    except Exception as error:
      raise OSError(f"{self._url}: {_reason(error)}") from error


AnyPath = Path | RemotePath


def _reason(error: Exception) -> str:
  said = " ".join(str(error).split())[:200]
  return f"{type(error).__name__}: {said}" if said else type(error).__name__
