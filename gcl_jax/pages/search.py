"""Answers of a search, as a page of its own or as a part of the served one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from gcl_jax.pages.page import fill, render
from gcl_jax.processing import ImageError
from gcl_jax.processing.thumbnail import data_uri, thumbnail
from gcl_jax.retrieval.searcher import Hit, Searcher

SIDE = 256  # pixels of a result's picture
MOST = 100  # answers that the served page shows


def results_page(
  searcher: Searcher,
  hits: Sequence[Hit],
  *,
  text: str,
  image: Image.Image | None,
  modality: str | None,
) -> str:
  """A page with the query and its answers; their pictures are within it."""
  return render(
    "results.html",
    title="Search results",
    text=text,
    image=None if image is None else _uri(image),
    modality=modality,
    index=_about(searcher),
    hits=_shown(hits, lambda hit: _uri(searcher.index.picture(hit.row))),
  )


def results_part(hits: Sequence[Hit]) -> str:
  """The answers alone, as HTML; their pictures are asked for by row."""
  return fill("hits.html", hits=_shown(hits, lambda hit: f"picture/{hit.row}"))


def query_page(searcher: Searcher, *, most_bytes: int, most_pixels: int) -> str:
  """The page on which a person asks."""
  return render(
    "query.html",
    script="query.js",
    connect=True,
    title="Search",
    index=_about(searcher),
    modalities=searcher.modalities,
    ks=(10, 20, 50, MOST),
    most_bytes=most_bytes,
    most_megabytes=f"{most_bytes / 1e6:.0f}",
    most_megapixels=f"{most_pixels / 1e6:.0f}",
  )


def _about(searcher: Searcher) -> dict[str, str]:
  manifest = searcher.index.manifest
  counts = manifest["modalities"]
  return {
    "name": os.path.basename(os.path.abspath(searcher.index.folder)),
    "counts": ", ".join(f"{counts[name]:,} {name}" for name in searcher.modalities),
    # Its last name: the page may be seen by others than this machine's.
    "checkpoint": str(manifest.get("checkpoint", "")).rstrip("/").split("/")[-1],
  }


def _shown(hits: Sequence[Hit], picture: Callable[[Hit], str | None]) -> list[dict]:
  return [
    {**hit._asdict(), "picture": None if hit.modality == "text" else picture(hit)}
    for hit in hits
  ]


def _uri(source: Any) -> str | None:
  """A picture as its own address; None where there is none that can be read."""
  if source is None:
    return None
  try:
    return data_uri(thumbnail(source, side=SIDE))
  except ImageError:
    return None
