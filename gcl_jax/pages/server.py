"""The served page: a person types, drops a picture, and sees what an index holds.

It answers three requests: the page, a query, and the picture of a row. Queries carry
their picture as bytes; no request names a file, and none writes one.
"""

from __future__ import annotations

import socket
import threading
from typing import Any

from gcl_jax.errors import UserError
from gcl_jax.pages.search import MOST, SIDE, query_page, results_part
from gcl_jax.processing import ImageError, decode_image
from gcl_jax.processing.thumbnail import thumbnail
from gcl_jax.retrieval.searcher import Searcher

MOST_BYTES = 10_000_000  # of an uploaded picture
MOST_PIXELS = 40_000_000
MOST_LETTERS = 2_000  # of a query's text
AT_ONCE = 32  # requests in flight; more are answered with 503
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HEADERS = {
  "cache-control": "no-store",
  "content-security-policy": "frame-ancestors 'none'",
  "cross-origin-resource-policy": "same-origin",
  "referrer-policy": "no-referrer",
  "x-content-type-options": "nosniff",
}


def make_app(searcher: Searcher, *, host: str = "127.0.0.1") -> Any:
  """The page as an ASGI application.

  Args:
    searcher: what it asks; one query at a time.
    host: where it is bound. On a loopback address other names than the machine's own
      are refused, so that no page elsewhere can reach it through a name of its own.

  Raises:
    UserError: Starlette is not installed.
  """
  try:
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Route
  except ImportError as error:
    raise _not_installed() from error

  page = query_page(searcher, most_bytes=MOST_BYTES, most_pixels=MOST_PIXELS)
  one_at_a_time = threading.Lock()

  def refused(message: str, status: int = 400) -> Response:
    return PlainTextResponse(message, status, _HEADERS)

  async def home(request: Request) -> Response:
    return HTMLResponse(page, headers=_HEADERS)

  async def search(request: Request) -> Response:
    data = bytearray()
    async for chunk in request.stream():
      data += chunk
      if len(data) > MOST_BYTES:
        return refused(_too_large(), 413)
    try:
      return await run_in_threadpool(answer, dict(request.query_params), bytes(data))
    except (UserError, ImageError) as error:
      return refused(str(error))

  def answer(asked: dict[str, str], data: bytes) -> Response:
    text, k, modality = _checked(asked)
    with one_at_a_time:
      image = decode_image(data, max_pixels=MOST_PIXELS) if data else None
      hits = searcher.ask(text, image, k=k, modality=modality)
    return HTMLResponse(results_part(hits), headers=_HEADERS)

  def picture(request: Request) -> Response:
    row = request.path_params["row"]
    if row >= len(searcher.index):
      return refused("the index has no such row.", 404)
    with one_at_a_time:
      source = searcher.index.picture(row)
    if source is None:
      return refused("this row has no picture.", 404)
    try:
      jpeg = thumbnail(source, side=SIDE)
    except ImageError:
      return refused("the picture of this row cannot be read.", 404)
    return Response(jpeg, media_type="image/jpeg", headers=_HEADERS)

  names = [*_LOOPBACK, "[::1]"] if host in _LOOPBACK else ["*"]
  return Starlette(
    routes=[
      Route("/", home),
      Route("/search", search, methods=["POST"]),
      Route("/picture/{row:int}", picture),
    ],
    middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=names)],
  )


def serve(searcher: Searcher, *, host: str, port: int) -> None:
  """Serves until it is stopped; prints the address.

  Args:
    port: 0 takes a free one.

  Raises:
    UserError: the address is taken or cannot be bound; Starlette or uvicorn is not
      installed.
  """
  try:
    import uvicorn
  except ImportError as error:
    raise _not_installed() from error
  app = make_app(searcher, host=host)
  with bound(host, port) as listening:
    searcher.warm_up()
    name = f"[{host}]" if ":" in host else host
    print(f"ready: http://{name}:{listening.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, log_level="warning", limit_concurrency=AT_ONCE)
    uvicorn.Server(config).run(sockets=[listening])


def bound(host: str, port: int) -> socket.socket:
  """A listening socket. Raises UserError where the address cannot be had."""
  if not 0 <= port < 1 << 16:
    raise UserError(f"--port={port}: a port is a number from 0 to 65535.")
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
  except (OSError, OverflowError, UnicodeError) as error:
    raise UserError(
      f"--host={host} --port={port}: no such address ({error})."
    ) from None
  try:
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(address)
    listening.listen()
  except OSError as error:
    listening.close()
    raise UserError(
      f"--host={host} --port={port} cannot be had ({error.strerror}): choose another"
      " --port, or 0 for any that is free."
    ) from None
  return listening


def _checked(asked: dict[str, str]) -> tuple[str, int, str | None]:
  """Text, k and modality of a query. Raises UserError."""
  text = asked.get("text", "")
  if len(text) > MOST_LETTERS:
    raise UserError(
      f"the text has {len(text):,} letters; at most {MOST_LETTERS:,} can be asked."
    )
  k = asked.get("k", "10")
  if not (k.isascii() and k.isdigit() and len(k) < 6 and 1 <= int(k) <= MOST):
    raise UserError(f"k: a number from 1 to {MOST}.")
  return text, int(k), asked.get("modality") or None


def _too_large() -> str:
  return f"the picture is larger than {MOST_BYTES / 1e6:.0f} MB: make it smaller."


def _not_installed() -> UserError:
  return UserError(
    "--serve needs Starlette and uvicorn, which are not installed:"
    ' pip install "starlette>=1,<2" "uvicorn>=0.40,<1".'
  )
