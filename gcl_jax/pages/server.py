"""The served page: a person types, drops a picture, and sees what an index holds.

It answers three requests: the page, a query, and the picture of a row. Queries carry
their picture as bytes; no request names a file, and none writes one.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from gcl_jax.errors import UserError
from gcl_jax.pages.search import MOST, SIDE, query_page, results_part
from gcl_jax.processing import ImageError, decode_image
from gcl_jax.processing.thumbnail import thumbnail
from gcl_jax.retrieval.searcher import Searcher

MOST_BYTES = 10_000_000  # of an uploaded picture
MOST_PIXELS = 40_000_000
MOST_LETTERS = 2_000  # of a query's text
AT_ONCE = 32  # requests in flight; more are answered with 503
DECODED_AT_ONCE = 2  # pictures of the index: each may need MOST_PIXELS in memory
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
    host: the address that it is bound to. On a loopback address other names than the
      machine's own are refused, so that no page elsewhere can reach it through a name
      of its own.

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
  few_at_a_time = threading.BoundedSemaphore(DECODED_AT_ONCE)

  def refused(message: str, status: int = 400) -> Response:
    return PlainTextResponse(message, status, _HEADERS)

  async def home(request: Request) -> Response:
    return HTMLResponse(page, headers=_HEADERS)

  async def search(request: Request) -> Response:
    if _is_foreign(request.headers):
      return refused("queries come from this page alone.", 403)
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
    row = _number(request.path_params["row"], below=len(searcher.index))
    if row is None:
      return refused("the index has no such row.", 404)
    with one_at_a_time:
      source = searcher.index.picture(row)
    if source is None:
      return refused("this row has no picture.", 404)
    try:
      with few_at_a_time:
        jpeg = thumbnail(source, side=SIDE, max_pixels=MOST_PIXELS)
    except ImageError:
      return refused("the picture of this row cannot be read.", 404)
    return Response(jpeg, media_type="image/jpeg", headers=_HEADERS)

  return Starlette(
    routes=[
      Route("/", home),
      Route("/search", search, methods=["POST"]),
      Route("/picture/{row}", picture),
    ],
    middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=_names(host))],
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
  with bound(host, port) as listening:
    address, port = listening.getsockname()[:2]
    app = make_app(searcher, host=address)
    if not is_loopback(address):
      print(
        f"warning: --host={host} is open to others: whoever reaches this machine there"
        " can ask, and see what the index holds.",
        file=sys.stderr,
        flush=True,
      )
    searcher.warm_up()
    name = f"[{address}]" if ":" in address else address
    print(f"ready: http://{name}:{port}", flush=True)
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


def is_loopback(address: str) -> bool:
  """Whether only this machine reaches it. `address` as a bound socket gives it."""
  ip = ipaddress.ip_address(address)
  # Through IPv6 an address of IPv4 may be bound; not every Python looks into it.
  return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _names(address: str) -> list[str]:
  """The names in a Host header that are answered; "*" is any."""
  if not is_loopback(address):
    return ["*"]
  addresses = ("127.0.0.1", "::1", address)
  return ["localhost", *addresses, *(f"[{a}]" for a in addresses if ":" in a)]


def _is_foreign(headers: Mapping[str, str]) -> bool:
  """Whether a browser sends this for a page of another origin.

  What browsers say of the site counts before `Origin`: a proxy may change the host that
  the latter is compared with. Programs send neither.
  """
  site = headers.get("sec-fetch-site")
  if site is not None:
    return site not in ("same-origin", "none")
  origin = headers.get("origin")
  try:
    return origin is not None and urlsplit(origin).netloc != headers.get("host")
  except ValueError:
    return True


def _number(text: str, *, below: int) -> int | None:
  """What a row's name stands for; None where there is no such row."""
  if not (text.isascii() and text.isdigit() and len(text) < 19):
    return None
  return int(text) if int(text) < below else None


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
