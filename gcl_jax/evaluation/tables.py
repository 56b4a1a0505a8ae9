"""Results of the nine-direction evaluation as tables: on screen and in Markdown."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from gcl_jax.evaluation.banks import MODALITIES
from gcl_jax.evaluation.nine import POOLS, VIEWS, cell_name

WIDTH = 100  # columns
EMPTY = "—"
COLUMNS = tuple((p, g, k) for p in POOLS for g in ("same", "other") for k in (1, 10))
ASCII = str.maketrans({"→": ">", "—": "-", "†": "+", "‖": "|", "Δ": "D", "─": "-"})


def rows_of(name: str, result: Mapping) -> dict[str, Mapping]:
  """A result's views as rows: `name`, and `name + centring` where it was computed."""
  names = {"plain": name, "centered": f"{name} + centring"}
  return {names[view]: result[view] for view in VIEWS if view in result}


def render(
  rows: Mapping[str, Mapping], *, center: bool = True, notes: Sequence[str] = ()
) -> str:
  """The tables as plain text, at most 100 columns wide, the same in a pipe.

  A summary of all rows, and the last given row by direction.

  Args:
    rows: name -> result of `evaluate_nine`, or one of its views (result["centered"]).
      A result stands for its plain view.
    center: add a row for the last result after centring, where it was computed.
    notes: lines for under the tables, as which loss the rows were trained with.

  Where standard output cannot show →, —, † and ‖Δ‖, ASCII stands for them. Raises
  ValueError without rows.
  """
  shown = _views(rows, center)
  name = list(rows)[-1]
  console = Console(file=io.StringIO(), width=WIDTH, no_color=True)
  console.print(_summary(shown))
  console.print(_directions(name, shown[name]))
  for line in [*_notes(shown, name), *notes]:
    console.print(line, markup=False, highlight=False)
  text = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
  encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
  return text if encoding.lower().startswith("utf") else text.translate(ASCII)


def to_markdown(
  rows: Mapping[str, Mapping], *, center: bool = True, notes: Sequence[str] = ()
) -> str:
  """The same tables in Markdown. Arguments as in `render`."""
  shown = _views(rows, center)
  name = list(rows)[-1]
  head = ["", *(f"{p} {g} R@{k}" for p, g, k in COLUMNS), "own share", "‖Δ‖ i,t"]
  body = [[row, *_summary_cells(view)] for row, view in shown.items()]
  lines = _markdown(head, body)
  lines += ["", f"R@1 of *{name}* by direction:", ""]
  head = ["query", *(f"{p} → {m}" for p in POOLS for m in MODALITIES), "own share"]
  body = []
  for q, modality in enumerate(MODALITIES):
    share = _number(shown[name]["own_share"][modality])
    body.append([modality, *_direction_cells(shown[name], q), share])
  lines += _markdown(head, body)
  for line in [*_notes(shown, name), *notes]:
    lines += ["", line]
  return "\n".join(lines) + "\n"


def _markdown(head: list[str], body: list[list[str]]) -> list[str]:
  rule = ["---", *["---:"] * (len(head) - 1)]
  return ["| " + " | ".join(row) + " |" for row in [head, rule, *body]]


def _views(rows: Mapping[str, Mapping], center: bool) -> dict[str, Mapping]:
  """Row name -> view, with the centred view of the last row where it is asked for."""
  if not rows:
    raise ValueError("no rows to render")
  views = {
    name: next((row[view] for view in VIEWS if view in row), row)
    for name, row in rows.items()
  }
  name, last = list(rows.items())[-1]
  return views | rows_of(name, last) if center else views


def _number(value: float | None, form: str = ".1f") -> str:
  return EMPTY if value is None else format(value, form)


def _summary_cells(view: Mapping) -> list[str]:
  recalls = [_number(view[p][g][f"R@{k}"]) for p, g, k in COLUMNS]
  gap = _number(view["gap"]["delta"]["i-t"], ".2f")
  return [*recalls, _number(view["own_share"]["mean"]), gap]


def _table(title: str) -> Table:
  return Table(
    title=title,
    box=box.SIMPLE_HEAD,
    title_justify="left",
    title_style="",
    header_style="",
    padding=(0, 1, 0, 0),
    pad_edge=False,
  )


def _summary(views: Mapping[str, Mapping]) -> Table:
  table = _table("Recall in %: means over same- and other-modality directions")
  table.add_column("", overflow="fold", max_width=26)
  for pool, group, k in COLUMNS:
    table.add_column(f"{pool}\n{group}\nR@{k}", justify="right", no_wrap=True)
  table.add_column("\nown\nshare", justify="right", no_wrap=True)
  table.add_column("gap\n‖Δ‖\ni,t", justify="right", no_wrap=True)
  for name, view in views.items():
    table.add_row(_escape(name), *_summary_cells(view))
  return table


def _escape(name: str) -> str:
  return name.replace("[", r"\[")


def _direction_cells(view: Mapping, q: int) -> list[str]:
  out = []
  for pool in POOLS:
    for c in range(3):
      cell = view[pool]["cells"][cell_name(q, c)]
      mark = "†" if cell["marked"] else ""
      out.append(_number(cell["R@1"]) + mark)
  return out


def _directions(name: str, view: Mapping) -> Table:
  table = _table(f"R@1 in % by direction: {_escape(name)}")
  table.add_column("query", no_wrap=True)
  for pool in POOLS:
    for modality in MODALITIES:
      table.add_column(f"{pool}\n→ {modality}", justify="right", no_wrap=True)
  table.add_column("own\nshare", justify="right", no_wrap=True)
  for q, modality in enumerate(MODALITIES):
    share = _number(view["own_share"][modality])
    table.add_row(modality, *_direction_cells(view, q), share)
  return table


def _notes(views: Mapping[str, Mapping], name: str) -> list[str]:
  """The lines under the tables: sizes, chance, what a difference means, footnotes.

  They are about the row `name`.
  """
  view = views[name]
  cells = [cell for pool in POOLS for cell in view[pool]["cells"].values()]
  lines = [_sizes(view), *_chance(view), _difference(views), _gap(name, view)]
  even = [x for x in view["own_share"]["no_bias"].values() if x is not None]
  if even:
    lines.append(
      "Own share: how much of a global top 10 is of the query's modality, in %;"
      f" {sum(even) / len(even):.0f} = no bias, 100 = segregated."
    )
  if any(cell["marked"] for cell in cells):
    lines.append(
      "† the query picture is a crop of the document's (no second picture):"
      " left out of the means."
    )
  if any(cell["queries"] == 0 for cell in cells):
    lines.append(f"{EMPTY} no such queries in this data.")
  return lines


def _sizes(view: Mapping) -> str:
  counts = view["items"]
  cells = [cell for pool in POOLS for cell in view[pool]["cells"].values()]
  queries = sorted({cell["queries"] for cell in cells if cell["queries"]}) or [0]
  asked = f"{queries[0]:,}" + (f" to {queries[-1]:,}" if len(queries) > 1 else "")
  parts = [f"{counts['items']:,} items; {asked} queries a direction"]
  for key, words in (
    ("bad_records", "unreadable records"),
    ("bad_images", "unreadable pictures"),
    ("one_caption", "items with one caption only"),
    ("dropped_text_queries", "items without text queries, as documents say the same"),
  ):
    if counts.get(key):
      parts.append(f"{words}: {counts[key]:,}")
  return "; ".join(parts) + "."


def _chance(view: Mapping) -> list[str]:
  pools = {}
  for name in POOLS:
    cells = [cell for cell in view[name]["cells"].values() if cell["queries"]]
    if cells:
      pools[name] = max(cells, key=lambda cell: cell["pool"])
  if not pools:
    return []
  size = max(cell["pool"] for cell in pools.values())
  chance = next(c["chance"] for c in pools.values() if c["pool"] == size)
  # Not in .2g, for which 100 is 1e+02.
  first, ten = (
    f"{x:.0f}" if x >= 10 else f"{x:.2g}" for x in (chance["R@1"], chance["R@10"])
  )
  line = f"Pools of {size:,}; chance: R@1 {first}, R@10 {ten}."
  spread = view["global"]["other"]
  bounds = spread["interval"]["R@10"]
  if bounds:
    line += (
      f" Global other R@10 {spread['R@10']:.1f}"
      f" [{bounds[0]:.1f}, {bounds[1]:.1f}] (95 %, bootstrap over queries)."
    )
  return [line]


def _gap(name: str, view: Mapping) -> str:
  words = []
  for key, title in (
    ("delta", "‖Δ‖ of the means"),
    ("cosine", "their cosine"),
    ("pair_cosine", "true pairs' mean cosine"),
  ):
    pairs = view["gap"][key].items()
    parts = [f"{pair} {_number(value, '.2f')}" for pair, value in pairs]
    words.append(f"{title} {', '.join(parts)}")
  return f"Modality gap ({name}): {'; '.join(words)}."


def _difference(views: Mapping[str, Mapping]) -> str:
  """How large a difference between two rows means something."""
  errors = {column: _two_errors(views, *column) for column in COLUMNS}
  headline = errors["global", "other", 10]
  if not headline:
    return "Too little was found to say how large a difference means something."
  return (
    f"A difference between two rows means something above {headline:.1f} points in"
    f" global other R@10, {max(errors.values()):.1f} in the widest column (two standard"
    " errors over queries). Seeds of one training differ by more: compare several."
  )


def _two_errors(views: Mapping[str, Mapping], pool: str, group: str, k: int) -> float:
  """Two standard errors of the difference of the two rows with the largest errors.

  As if the rows had asked different items: on the same items it is less.
  """
  errors = sorted(view[pool][group]["se"][f"R@{k}"] or 0 for view in views.values())
  # One row alone is compared with another of its kind.
  a, b = (errors * 2)[-2:] if len(errors) == 1 else errors[-2:]
  return 2 * (a * a + b * b) ** 0.5
