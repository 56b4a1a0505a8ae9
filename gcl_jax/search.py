"""Searches an index: python -m gcl_jax.search --index=... --text="..." --image=...

The query is a text, a picture or both; the model is the one that made the index.
Answers come as a table, as JSON, as a page with pictures, or, with --serve, on a page
on which a person asks.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from gcl_jax import command_line
from gcl_jax.errors import UserError
from gcl_jax.paths import as_path

if TYPE_CHECKING:
  from PIL import Image

  from gcl_jax.retrieval import Index
  from gcl_jax.retrieval.searcher import Hit, Searcher

_FLAGS = flags.FLAGS
_CONTROL = dict.fromkeys((*range(32), *range(127, 160)), " ")


def _define_flags() -> None:
  flags.DEFINE_string("index", "", "the folder that gcl_jax.embed wrote")
  flags.DEFINE_string("text", "", "the query, or a part of it")
  flags.DEFINE_string("image", "", "a picture: the query, or a part of it")
  flags.DEFINE_integer("k", 10, "how many answers")
  flags.DEFINE_enum(
    "modality", None, ["image", "text", "fused"], "find only documents of it"
  )
  flags.DEFINE_string(
    "checkpoint", "", "the model that made the index; by default as its manifest says"
  )
  flags.DEFINE_string("step", "", "of a run: latest, best, or a number")
  flags.DEFINE_bool("approximate", False, "ask the index that embed --faiss has built")
  flags.DEFINE_bool("json", False, "print JSON instead of a table")
  flags.DEFINE_string("html", "", "also write a page with the pictures")
  flags.DEFINE_bool("serve", False, "serve a page on which a person asks")
  flags.DEFINE_string("host", "127.0.0.1", "with --serve, where; 0.0.0.0 is everywhere")
  flags.DEFINE_integer("port", 7860, "with --serve; 0 takes a free one")


def main() -> None:
  """Flags in, answers out."""
  from gcl_jax.pages import check_page
  from gcl_jax.retrieval import read_index
  from gcl_jax.retrieval.searcher import check_query

  if not _FLAGS.index:
    raise UserError("name an index: --index=<a folder that gcl_jax.embed wrote>")
  image = _query()
  page = as_path(_FLAGS.html) if _FLAGS.html else None
  if page is not None:
    check_page(page, "--html")
  index = read_index(_FLAGS.index)
  check_query(index, _FLAGS.k, _FLAGS.modality)  # before the model is loaded
  searcher = _searcher(index)
  if _FLAGS.serve:
    from gcl_jax.pages.server import serve

    serve(searcher, host=_FLAGS.host, port=_FLAGS.port)
    return
  hits = searcher.ask(_FLAGS.text, image, k=_FLAGS.k, modality=_FLAGS.modality)
  print(as_json(hits) if _FLAGS.json else table(hits))
  if page is not None:
    from gcl_jax.pages import write_page
    from gcl_jax.pages.search import results_page

    asked = {"text": _FLAGS.text, "image": image, "modality": _FLAGS.modality}
    write_page(page, results_page(searcher, hits, **asked), "--html")
    print(f"written: {page}", file=sys.stderr)


def as_json(hits: Sequence[Hit]) -> str:
  """The answers as a JSON list."""
  return json.dumps([hit._asdict() for hit in hits], indent=1, ensure_ascii=False)


def table(hits: Sequence[Hit], *, width: int | None = None) -> str:
  """The answers as plain text, as wide as the terminal or 100 columns."""
  from rich import box
  from rich.console import Console
  from rich.table import Table
  from rich.text import Text

  width = width or shutil.get_terminal_size((100, 24)).columns
  console = Console(file=io.StringIO(), width=width, no_color=True)
  rows = Table(box=box.SIMPLE_HEAD, header_style="", pad_edge=False, expand=False)
  for name in ("#", "score"):
    rows.add_column(name, justify="right", no_wrap=True)
  rows.add_column("modality", no_wrap=True)
  rows.add_column("id", overflow="fold", max_width=max(12, width // 3))
  rows.add_column("text", overflow="fold")
  for hit in hits:
    # What strangers wrote must not move a terminal's cursor or colour its letters.
    cells = [Text(_clean(cell)) for cell in (hit.modality, hit.id, hit.text or "")]
    rows.add_row(str(hit.rank), f"{hit.score:.3f}", *cells)
  console.print(rows)
  return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _clean(text: str) -> str:
  return text.translate(_CONTROL)


def _query() -> Image.Image | None:
  """The query's picture, decoded. Raises UserError for a query that cannot be."""
  from gcl_jax.processing import ImageError, decode_image

  asks = bool(_FLAGS.text.strip() or _FLAGS.image)
  if _FLAGS.serve and (asks or _FLAGS.html or _FLAGS.json):
    raise UserError("--serve takes its queries on its page: leave out the others.")
  if not (asks or _FLAGS.serve):
    raise UserError(
      'ask with --text="...", --image=<file> or both, or start a page with --serve.'
    )
  if not _FLAGS.image:
    return None
  if Path(_FLAGS.image).is_dir():
    raise UserError(f"--image={_FLAGS.image} is a folder: name a picture's file.")
  try:
    return decode_image(_FLAGS.image)
  except ImageError as error:
    raise UserError(f"--image={error}.") from None


def _searcher(index: Index) -> Searcher:
  """The index with its model. Raises UserError where another one is given."""
  from gcl_jax.open_model import open_model
  from gcl_jax.retrieval.searcher import Searcher

  made_by = index.manifest.get("checkpoint", "")
  checkpoint = _FLAGS.checkpoint or made_by
  step = _FLAGS.step
  if not step:
    its_own = index.manifest.get("step") if checkpoint == made_by else None
    step = "latest" if its_own is None else str(its_own)
  try:
    embedder = open_model(checkpoint, step, batch_size=1).embedder
  except UserError as error:
    if _FLAGS.checkpoint:
      raise
    raise UserError(
      f"the index was made by {made_by}, which cannot be opened ({error}) If it has "
      "moved, say where it is: --checkpoint=<folder>."
    ) from error
  index.check_model(embedder)
  return Searcher(index, embedder, exact=not _FLAGS.approximate)


if __name__ == "__main__":
  _define_flags()
  command_line.run(main)
