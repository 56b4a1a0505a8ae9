"""Geometry of the charts: scales, ticks and paths in the units of an SVG's viewBox.

A chart is a dict of numbers and names; `charts.html` draws it. Charts are as wide as a
phone, so that their letters are not scaled down there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

WIDTH, HEIGHT = 300, 215
LEFT, RIGHT, TOP, BOTTOM = 34, 14, 10, 34
SIDE = 280  # of a square chart

Scale = Callable[[float], float]


def log_scale(low: float, high: float, start: float, end: float) -> Scale:
  """Position of a value > 0 between `start` and `end` on a logarithmic axis."""
  span = max(math.log(high / low), 1e-9)
  return lambda v: start + (end - start) * math.log(v / low) / span


def linear_scale(low: float, high: float, start: float, end: float) -> Scale:
  """Position of a value between `start` and `end` on a linear axis."""
  return lambda v: start + (end - start) * (v - low) / ((high - low) or 1)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """About `count` round numbers from `low` to `high`."""
  span = high - low
  if span < 1e-11:  # ticks are rounded to twelve digits
    return [low]
  rough = span / count
  unit = 10 ** math.floor(math.log10(rough))
  step = min((unit * m for m in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
  first = math.ceil(low / step - 1e-9)
  last = math.floor(high / step + 1e-9)
  return [round(i * step, 12) for i in range(first, last + 1)]


def line_chart(
  series: Sequence[Mapping],
  *,
  x_title: str,
  y_title: str,
  log_x: bool = False,
  y_range: tuple[float, float] | None = None,
) -> dict:
  """Lines over a common axis.

  Args:
    series: each {"name", "style" (class of its colour), "points": [(x, y), ...]} and, if
      it is a reference and not a model, "reference": True.
    log_x: a logarithmic axis, marked at 1, 10, 100, ...
    y_range: by default from the lowest to the highest value.
  """
  points = [point for each in series for point in each["points"]]
  xs = [x for x, _ in points]
  y_low, y_high = y_range or (min(y for _, y in points), max(y for _, y in points))
  place = log_scale if log_x else linear_scale
  x = place(min(xs), max(xs), LEFT, WIDTH - RIGHT)
  y = linear_scale(y_low, y_high, HEIGHT - BOTTOM, TOP)
  if log_x:
    powers = range(math.ceil(math.log10(min(xs))), math.floor(math.log10(max(xs))) + 1)
    x_ticks = [10.0**p for p in powers]
  else:
    x_ticks = ticks(min(xs), max(xs), 4)
  return {
    **_frame(WIDTH, HEIGHT, x_title, y_title),
    "x_ticks": [{"at": round(x(t), 1), "text": f"{t:,.6g}"} for t in x_ticks],
    "y_ticks": [
      {"at": round(y(t), 1), "text": f"{t:.6g}"} for t in ticks(y_low, y_high, 4)
    ],
    "lines": [
      {
        **each,
        "path": _path([(x(a), y(b)) for a, b in each["points"]]),
        "marks": [
          {"x": round(x(a), 1), "y": round(y(b), 1), "of": a, "is": b}
          for a, b in each["points"]
        ],
      }
      for each in series
    ],
  }


def bar_chart(
  names: Sequence[str], series: Sequence[Mapping], *, x_title: str, y_title: str
) -> dict:
  """Groups of bars, a group per name.

  series: each {"name", "style", "values": one a name}.
  """
  top = max([1e-9, *(value for each in series for value in each["values"])])
  top = next(s for s in (5, 10, 20, 30, 40, 50, 60, 80, 100, top) if s >= top)
  y = linear_scale(0, top, HEIGHT - BOTTOM, TOP)
  width = (WIDTH - LEFT - RIGHT) / max(1, len(names))
  bar = 0.78 * width / len(series)
  bars = []
  for s, each in enumerate(series):
    for i, value in enumerate(each["values"]):
      bars.append(
        {
          "style": each["style"],
          "x": round(LEFT + (i + 0.11) * width + s * bar, 1),
          "y": round(y(value), 1),
          "width": round(max(bar - 1, 1), 1),
          "height": round(HEIGHT - BOTTOM - y(value), 1),
          "tip": f"rank {'up to ' if i > 1 else ''}{names[i]}, {each['name']}: {value:.1f} %",
        }
      )
  return {
    **_frame(WIDTH, HEIGHT, x_title, y_title),
    "x_ticks": [
      {"at": round(LEFT + (i + 0.5) * width, 1), "text": name}
      for i, name in enumerate(names)
    ],
    "y_ticks": [{"at": round(y(t), 1), "text": f"{t:.6g}"} for t in ticks(0, top, 4)],
    "bars": bars,
  }


def scatter_chart(clouds: Sequence[Mapping], reach: float) -> dict:
  """Points around the origin of a square, -reach to reach both ways.

  clouds: each {"name", "style", "x", "y", "mean": (x, y) or None}.
  """
  pad = 12
  x = linear_scale(-reach, reach, pad, SIDE - pad)
  y = linear_scale(-reach, reach, SIDE - pad, pad)
  return {
    "width": SIDE,
    "height": SIDE,
    "centre": {"x": round(x(0), 1), "y": round(y(0), 1)},
    "bar": {"from": pad, "to": round(pad + x(0.5) - x(0), 1), "y": SIDE - pad},
    "clouds": [
      {
        "name": each["name"],
        "style": each["style"],
        "points": [
          {"x": round(x(a), 1), "y": round(y(b), 1)}
          for a, b in zip(each["x"], each["y"], strict=True)
        ],
        "mean": each["mean"]
        and {"x": round(x(each["mean"][0]), 1), "y": round(y(each["mean"][1]), 1)},
      }
      for each in clouds
    ],
  }


def stacked_bars(rows: Sequence[Mapping]) -> dict:
  """Bars that each sum to 100, one under another.

  rows: each {"name", "parts": [{"name", "style", "value"}]}.
  """
  left, bar, gap, head = 52, 26, 10, 6
  x = linear_scale(0, 100, left, WIDTH - RIGHT)
  height = head + len(rows) * (bar + gap) + 18
  drawn = []
  for i, row in enumerate(rows):
    y, at, parts = head + i * (bar + gap), 0.0, []
    for part in row["parts"]:
      width = x(part["value"]) - x(0)
      parts.append(
        {
          **part,
          "x": round(x(at), 1),
          "width": round(max(width - 1, 0), 1),
          "label": f"{part['value']:.0f}" if width > 24 else "",
          "middle": round(x(at) + width / 2, 1),
        }
      )
      at += part["value"]
    drawn.append(
      {
        "name": row["name"],
        "y": y,
        "text_y": y + bar / 2 + 4,
        "bar": bar,
        "parts": parts,
      }
    )
  axis = [{"at": round(x(t), 1), "text": f"{t:.0f}"} for t in (0, 25, 50, 75, 100)]
  return {
    "width": WIDTH,
    "height": height,
    "left": left,
    "rows": drawn,
    "x_ticks": axis,
    "floor": height - 18,
  }


def _frame(width: int, height: int, x_title: str, y_title: str) -> dict:
  return {
    "width": width,
    "height": height,
    "left": LEFT,
    "right": width - RIGHT,
    "top": TOP,
    "floor": height - BOTTOM,
    "x_title": x_title,
    "y_title": y_title,
  }


def _path(points: Sequence[tuple[float, float]]) -> str:
  return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
