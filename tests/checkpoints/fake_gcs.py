"""A Google Cloud Storage without a network: one memory behind gcsfs's and Google's doors.

Our own files and etils go through fsspec (`gs`, `gcs`); tensorstore, which writes the
arrays, has its own driver and speaks the store's JSON API over HTTP.
"""

from __future__ import annotations

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
  """Names of objects in memory, and no folders but those in the names."""

  protocol = ("gs", "gcs")
  store: ClassVar[dict] = {}
  pseudo_dirs: ClassVar[list] = [""]
  put: ClassVar[list] = []  # addresses, in the order they were written

  @classmethod
  def _strip_protocol(cls, path):
    path = str(path).removeprefix("gs://").removeprefix("gcs://").strip("/")
    return f"/{path}" if path else ""

  def mkdir(self, path, create_parents=True, **kwargs):
    pass

  def makedirs(self, path, exist_ok=False):
    pass

  def rm(self, path, recursive=False, maxdepth=None):
    path = self._strip_protocol(path)
    inside = [n for n in list(self.store) if n == path or n.startswith(f"{path}/")]
    if not inside:
      raise FileNotFoundError(path)
    for name in inside:
      del self.store[name]

  def pipe_file(self, path, value, mode="overwrite", **kwargs):
    with self.open(path, "wb") as file:
      file.write(value)

  def _open(self, path, mode="rb", **kwargs):
    if mode == "wb":
      self.put.append(f"gs:/{path}")
    return super()._open(path, mode, **kwargs)

  def put_file(self, lpath, rpath, **kwargs):
    with open(lpath, "rb") as file:
      self.pipe_file(rpath, file.read())


class _Api(BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def do_GET(self):
    where, query = self._asked()
    if where.endswith("/o"):
      start = f"/{where.split('/')[4]}/{query.get('prefix', '')}"
      names = sorted(name for name in list(Bucket.store) if name.startswith(start))
      items = [{"name": name.split("/", 2)[2]} for name in names]
      return self._answer(200, json.dumps({"items": items}).encode())
    file = self._file(where)
    if file is None:
      return self._answer(404)
    raw, now = file.getvalue(), _generation(file)
    if query.get("ifGenerationNotMatch") == now:
      return self._answer(304, generation=now)
    span = self.headers.get("Range")
    if span:
      first, last = span.removeprefix("bytes=").split("-")
      end = min(int(last) + 1 if last else len(raw), len(raw))
      extra = {"Content-Range": f"bytes {first}-{end - 1}/{len(raw)}"}
      return self._answer(206, raw[int(first) : end], now, extra)
    return self._answer(200, raw, now)

  def do_POST(self):
    where, query = self._asked()
    raw = self.rfile.read(int(self.headers["Content-Length"]))
    name = f"/{where.split('/')[5]}/{query['name']}"
    wanted = query.get("ifGenerationMatch")
    there = Bucket.store.get(name)
    if wanted is not None and wanted != (_generation(there) if there else "0"):
      return self._answer(412)
    Bucket().pipe_file(f"gs:/{name}", raw)
    about = {"name": query["name"], "generation": _generation(Bucket.store[name])}
    return self._answer(200, json.dumps(about).encode())

  def do_DELETE(self):
    where, _ = self._asked()
    there = Bucket.store.pop(self._name(where), None)
    return self._answer(404 if there is None else 204)

  def _asked(self):
    parts = urlsplit(self.path)
    return parts.path, {k: v[0] for k, v in parse_qs(parts.query).items()}

  def _name(self, where):
    *_, bucket, _, name = where.split("/")
    return f"/{bucket}/{unquote(name)}"

  def _file(self, where):
    return Bucket.store.get(self._name(where))

  def _answer(self, status, raw=b"", generation=None, extra=()):
    self.send_response(status)
    headers = dict(extra, **{"Content-Length": str(len(raw))})
    if generation:
      headers |= {"x-goog-generation": generation, "x-goog-metageneration": "1"}
      headers |= {"x-goog-storage-class": "STANDARD"}
    for key, value in headers.items():
      self.send_header(key, value)
    self.end_headers()
    self.wfile.write(raw)


def _generation(file) -> str:
  return str(int(file.modified.timestamp() * 1e6))


def serve() -> None:
  """Tensorstore's door, for the rest of this process: it asks the environment once."""
  if "TENSORSTORE_GCS_HTTP_URL" in os.environ:
    return
  server = ThreadingHTTPServer(("127.0.0.1", 0), _Api)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://127.0.0.1:{server.server_port}"
