"""From a template to one self-contained page, and onto the disk.

Everything that comes from a file is escaped by the templates. The page forbids itself
every request (Content-Security-Policy): pictures are data URIs, and of scripts and
styles only those with the right hash run.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gcl_jax._version import __version__
from gcl_jax.errors import UserError
from gcl_jax.paths import AnyPath, write_whole

EMPTY = "—"
_MARK = '<meta name="generator" content="gcl_jax'
_FOLDER = Path(__file__).parent / "templates"
_PICTURE = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]+={0,2}")


def render(
  template: str, *, script: str = "page.js", connect: bool = False, **values
) -> str:
  """The page of a template of this room, which extends `base.html`.

  Args:
    template: file name in `templates/`.
    script: the same, of its script.
    connect: whether the page may talk to the server that it came from.
    values: what the template shows; strings are escaped.
  """
  style, code = _file("style.css"), _file(script)
  return fill(
    template,
    version=__version__,
    style=style,
    script=code,
    style_hash=_hash(style),
    script_hash=_hash(code),
    connect=connect,
    **values,
  )


def fill(template: str, **values) -> str:
  """A template that is a part of a page."""
  return _environment().get_template(template).render(**values)


def is_picture(text: object) -> bool:
  """Whether it is a JPEG as a data URI, which makes no request."""
  return isinstance(text, str) and bool(_PICTURE.fullmatch(text))


def number(value: float | None, form: str = ".1f") -> str:
  """A number, or a dash where there is none."""
  return EMPTY if value is None else format(value, form)


def check_page(output: AnyPath, flag: str) -> None:
  """Refuses an output that could not be written, or that is something else.

  Args:
    output: the page to be written.
    flag: which flag named it.

  Raises:
    UserError: a folder, a file that is no page of ours, or no folder to hold it.
  """
  if output.is_dir():
    raise UserError(f"{flag}={output} is a folder: name an .html file.")
  if output.exists():
    try:
      ours = _MARK in output.read_text()
    except (OSError, ValueError):
      ours = False
    if not ours:
      raise UserError(
        f"{flag}={output} exists and is no page of ours: name another file."
      )
  try:
    output.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"{flag}={output} cannot be written: {error}.") from None


def write_page(output: AnyPath, page: str, flag: str) -> None:
  """Writes a page whole or not at all. Raises UserError where it cannot be written."""
  try:
    write_whole(output, page)
  except OSError as error:
    raise UserError(f"{flag}={output} cannot be written: {error}.") from error


@functools.cache
def _environment() -> Environment:
  environment = Environment(
    loader=PackageLoader("gcl_jax.pages"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters["number"] = number
  environment.tests["picture"] = is_picture
  return environment


@functools.cache
def _file(name: str) -> Markup:
  return Markup((_FOLDER / name).read_text(encoding="utf-8").strip())


def _hash(text: str) -> str:
  digest = hashlib.sha256(text.encode()).digest()
  return "sha256-" + base64.b64encode(digest).decode()
