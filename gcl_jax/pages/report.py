"""The report: several models' evaluations beside each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from gcl_jax.evaluation import VIEWS, direction_names
from gcl_jax.evaluation.banks import MODALITIES
from gcl_jax.pages import charts
from gcl_jax.pages.page import EMPTY, number, render
from gcl_jax.pages.results import GROUPS, POOLS, SHOWN_KS, Result

COLOURS = 6  # of models, in style.css; more models begin again
VIEW_NAMES = {"plain": "plain", "centered": "centred"}
GROUP_NAMES = {"same": "same modality", "other": "other modality"}
MOST_POINTS = 300  # of a loss curve


def report_page(results: Sequence[Result]) -> str:
  """The report as HTML. Needs no network; at least one result."""
  return render(
    "report.html",
    title="Retrieval report",
    models=[
      {"name": result.name, "style": _colour(i), "facts": _facts(result)}
      for i, result in enumerate(results)
    ],
    modalities=MODALITIES,
    ks=SHOWN_KS,
    differs=_differ(results),
    summary=_summary(results),
    heat=[_heat(result) for result in results],
    has_marked=any(
      cell["marked"]
      for result in results
      for view in result.views.values()
      for pool in POOLS
      for cell in view[pool]["cells"].values()
    ),
    curves=_part(results, _ladder, _curves),
    ranks=_part(results, _ladder, _ranks),
    gap=_part(results, _sketches, _gap),
    shares=_part(results, _shares, _share_charts),
    losses=_part(results, lambda result: result.losses, _losses),
    examples=_part(results, lambda result: result.examples, _examples),
  )


def _part(
  results: Sequence[Result],
  has: Callable[[Result], object],
  make: Callable[[Sequence[tuple[int, Result]]], object],
) -> dict:
  """A section: what the results that hold its data give, and which do not."""
  there = [(i, result) for i, result in enumerate(results) if has(result)]
  return {
    "content": make(there) if there else None,
    "missing": [result.name for result in results if not has(result)],
  }


def _colour(place: int) -> str:
  return f"model{place % COLOURS}"


def _first_view(result: Result) -> Mapping:
  return next(result.views[view] for view in VIEWS if view in result.views)


def _facts(result: Result) -> list[str]:
  view = _first_view(result)
  cells = [cell for pool in POOLS for cell in view[pool]["cells"].values()]
  queries = sorted({cell["queries"] for cell in cells if cell["queries"]}) or [0]
  most = f"{queries[0]:,}" + (f" to {queries[-1]:,}" if len(queries) > 1 else "")
  facts = [
    f"{result.counts.get('items', 0):,} items",
    f"{most} queries a direction",
    f"pools of up to {max(cell['pool'] for cell in cells):,}",
  ]
  for key, words in (
    ("bad_records", "unreadable records"),
    ("bad_images", "unreadable pictures"),
  ):
    if result.counts.get(key):
      facts.append(f"{result.counts[key]:,} {words}")
  if result.split:
    facts.append(f"split {result.split}")
  return [*facts, f"checkpoint {result.checkpoint}", f"read from {result.path}"]


def _differ(results: Sequence[Result]) -> bool:
  """Whether the models were asked different things."""
  first = results[0].counts
  return any(result.counts != first for result in results)


def _summary(results: Sequence[Result]) -> dict:
  """A row per measure, a column per model and view."""
  columns = [
    {"name": result.name, "view": VIEW_NAMES[name], "style": _colour(i)}
    for i, result in enumerate(results)
    for name in result.views
  ]
  views = [view for result in results for view in result.views.values()]
  rows = []
  for pool in ("global", "local"):
    for group in ("other", "same"):
      for k in (1, 10):
        means = [view[pool][group] for view in views]
        rows.append(
          {
            "name": f"{pool}, {GROUP_NAMES[group]}, R@{k}",
            "first": k == 1,
            "cells": [
              {"value": number(mean[f"R@{k}"]), "error": _error(mean["se"][f"R@{k}"])}
              for mean in means
            ],
          }
        )
  for name, key, part, form in (
    ("own share of the global top 10", "own_share", "mean", ".0f"),
    ("modality gap ‖Δ‖, image to text", "delta", "i-t", ".2f"),
  ):
    cells = [{"value": number(view[key][part], form), "error": ""} for view in views]
    rows.append({"name": name, "first": key == "own_share", "cells": cells})
  return {"columns": columns, "rows": rows}


def _error(error: float | None) -> str:
  return "" if error is None else f"±{2 * error:.1f}"


def _heat(result: Result) -> list[dict]:
  """The four maps of one model: local and global, plain and centred."""
  names = direction_names()
  return [
    {
      "name": f"{pool}, {VIEW_NAMES[view]}",
      "rows": [
        {
          "name": MODALITIES[q],
          "cells": [
            _heat_cell(result.views[view][pool]["cells"][names[3 * q + c]], q, c)
            for c in range(3)
          ],
        }
        for q in range(3)
      ],
    }
    for pool in POOLS
    for view in result.views
  ]


def _heat_cell(cell: Mapping, q: int, c: int) -> dict:
  """What a cell shows for each k: "text|level"."""
  mark = "†" if cell["marked"] else ""
  shown = {}
  for k in SHOWN_KS:
    value = cell[f"R@{k}"]
    level = "none" if value is None else round(min(max(value, 0), 100) / 10)
    shown[k] = f"{number(value)}{mark if value is not None else ''}|h{level}"
  rank = number(cell["median_rank"], ",.6g")
  return {
    "shown": shown,
    "tip": f"{MODALITIES[q]} asks for {MODALITIES[c]}: {cell['queries']:,} queries,"
    f" pool of {cell['pool']:,}, median rank {rank}",
  }


def _ladder(result: Result) -> bool:
  """Whether the counts by k are there."""
  return all(
    view[pool]["ladder"] and all(c["found"] for c in view[pool]["cells"].values())
    for view in result.views.values()
    for pool in POOLS
  )


def _recalls(view: Mapping, pool: str, group: str) -> list[tuple[float, float]]:
  """(k, mean recall over the group's directions in percent), up to the pool's size."""
  part = view[pool]
  cells = [part["cells"][name] for name in part[group]["cells"]]
  cells = [cell for cell in cells if cell["queries"]]
  if not cells:
    return []
  means = [
    sum(100 * cell["found"][i] / cell["queries"] for cell in cells) / len(cells)
    for i in range(len(part["ladder"]))
  ]
  return list(zip(part["ladder"], means, strict=True))


def _curves(results: Sequence[tuple[int, Result]]) -> list[dict]:
  """Recall over k: a chart per pool and group, a line per model and view."""
  out = []
  for pool in ("global", "local"):
    for group in ("other", "same"):
      lines = [
        {
          "name": f"{result.name}, {VIEW_NAMES[name]}",
          "style": f"{_colour(i)} {name}",
          "points": points,
        }
        for i, result in results
        for name, view in result.views.items()
        if (points := _recalls(view, pool, group))
      ]
      if not lines:
        continue
      longest = max((line["points"] for line in lines), key=len)
      ks = [k for k, _ in longest]
      size = max(
        cell["pool"]
        for _, result in results
        for view in result.views.values()
        for cell in view[pool]["cells"].values()
      )
      chance = {
        "name": "chance",
        "style": "chance",
        "points": [(k, min(100.0, 100 * k / size)) for k in ks],
      }
      out.append(
        {
          "name": f"{pool} pool, {GROUP_NAMES[group]}",
          "chart": charts.line_chart(
            [chance, *lines],
            x_title="K",
            y_title="recall at K, %",
            log_x=True,
            y_range=(0, 100),
          ),
          "ks": ks,
          "lines": [
            {"name": line["name"], "values": [y for _, y in line["points"]]}
            for line in lines
          ],
        }
      )
  return out


def _ranks(results: Sequence[tuple[int, Result]]) -> list[dict]:
  """Where the right answer stands in the global pool: a chart per model."""
  out = []
  for i, result in results:
    view = _first_view(result)
    series, bins = [], []
    for group in GROUPS:
      curve = _recalls(view, "global", group)
      if not curve:
        continue
      bins = [_short(k) for k, _ in curve]
      shares = [y - (curve[j - 1][1] if j else 0) for j, (_, y) in enumerate(curve)]
      series.append({"name": GROUP_NAMES[group], "style": group, "values": shares})
    if series:
      out.append(
        {
          "name": result.name,
          "style": _colour(i),
          "chart": charts.bar_chart(
            bins, series, x_title="rank of the right answer", y_title="queries, %"
          ),
          "bins": bins,
          "series": series,
        }
      )
  return out


def _short(k: float) -> str:
  return f"{k / 1000:.6g}k" if k >= 1000 else f"{k:.6g}"


def _sketches(result: Result) -> bool:
  return all(view["sketch"] for view in result.views.values())


def _gap(results: Sequence[tuple[int, Result]]) -> list[dict]:
  """The three banks on their plane; all charts at one scale."""
  drawn = [
    (i, result, name, view)
    for i, result in results
    for name, view in result.views.items()
  ]
  reach = 1.05 * max(
    abs(value)
    for *_, view in drawn
    for modality in MODALITIES
    for axis in ("x", "y", "mean")
    for value in view["sketch"][modality][axis] or [0.0]
  )
  out = []
  for i, result, name, view in drawn:
    explained = view["sketch"]["explained"]
    out.append(
      {
        "name": result.name,
        "view": VIEW_NAMES[name],
        "style": _colour(i),
        "explained": f"{sum(explained):.0f}",
        "delta": [
          {"pair": words, "value": number(view["delta"][pair], ".2f")}
          for pair, words in (
            ("i-t", "image, text"),
            ("i-it", "image, fused"),
            ("t-it", "text, fused"),
          )
        ],
        "chart": charts.scatter_chart(
          [
            {"name": modality, "style": modality, **view["sketch"][modality]}
            for modality in MODALITIES
          ],
          max(reach, 1e-6),
        ),
      }
    )
  return out


def _shares(result: Result) -> bool:
  return all(view["top10_share"] for view in result.views.values())


def _share_charts(results: Sequence[tuple[int, Result]]) -> list[dict]:
  """Which modalities fill the global top 10: a chart per model and view."""
  names = direction_names()
  out = []
  for i, result in results:
    for name, view in result.views.items():
      rows = []
      for q, modality in enumerate(MODALITIES):
        values = [view["top10_share"][names[3 * q + c]] for c in range(3)]
        if None in values:
          continue
        rows.append(
          {
            "name": modality,
            "parts": [
              {"name": other, "style": other, "value": value}
              for other, value in zip(MODALITIES, values, strict=True)
            ],
          }
        )
      if rows:
        out.append(
          {
            "name": result.name,
            "view": VIEW_NAMES[name],
            "style": _colour(i),
            "own": number(view["own_share"]["mean"], ".0f"),
            "even": _even(view),
            "chart": charts.stacked_bars(rows),
          }
        )
  return out


def _even(view: Mapping) -> str:
  """The own share of a model without bias."""
  values = [value for value in view["no_bias"].values() if value is not None]
  return f"{sum(values) / len(values):.0f}" if values else EMPTY


def _losses(results: Sequence[tuple[int, Result]]) -> dict:
  """All runs' losses in one chart."""
  lines = [
    {
      "name": result.name,
      "style": f"{_colour(i)} plain",
      "points": _thinned(result.losses),
    }
    for i, result in results
  ]
  return {
    "chart": charts.line_chart(lines, x_title="training step", y_title="training loss"),
    "rows": [
      {
        "name": result.name,
        "steps": f"{result.losses[-1][0]:,.0f}",
        "first": f"{result.losses[0][1]:.4g}",
        "last": f"{result.losses[-1][1]:.4g}",
      }
      for _, result in results
    ],
  }


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """At most so many points: means over stretches of equal length."""
  size = math.ceil(len(points) / MOST_POINTS)
  out = []
  for start in range(0, len(points), size):
    part = points[start : start + size]
    out.append((part[-1][0], sum(y for _, y in part) / len(part)))
  return out


def _examples(results: Sequence[tuple[int, Result]]) -> list[dict]:
  """Query by query; under each what every model found that was asked it."""
  out: dict[tuple, dict] = {}
  for i, result in results:
    for example in result.examples or []:
      key = tuple(example[name] for name in ("query", "answer", "item", "text"))
      shown = out.setdefault(key, {**example, "answers": []})
      shown["answers"].append(
        {
          "name": result.name,
          "style": _colour(i),
          "rank": f"{example['rank']:,}",
          "is_found": example["rank"] <= len(example["found"]),
          "found": example["found"],
        }
      )
  return list(out.values())
