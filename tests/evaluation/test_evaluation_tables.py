"""Tables: the numbers of a result, readable in a hundred columns."""

import pytest
from evaluation_fakes import perfect, records, segregated

from gcl_jax.evaluation import build_items, evaluate_nine, render, rows_of, to_markdown


@pytest.fixture(scope="module")
def before():
  embed, _ = segregated(60)
  return evaluate_nine(build_items(records(60)), embed)


@pytest.fixture(scope="module")
def after():
  return evaluate_nine(build_items(records(60, views=1)), perfect(60))


def find(text, start):
  """The cells of the first line that starts so."""
  line = next(x for x in text.splitlines() if x.strip().startswith(start + " "))
  return line.strip()[len(start) :].split()


def flat(rows):
  """The text in one line."""
  return " ".join(render(rows, center=False).split())


def test_summary_rows(before, after):
  text = render({"before": before, "after": after})
  full = ["100.0"] * 6 + ["0.0", "0.0", "100.0", "1.27"]
  assert find(text, "before") == full
  assert find(text, "after")[:8] == ["100.0"] * 8
  share = f"{after['centered']['own_share']['mean']:.1f}"
  assert find(text, "after + centring") == ["100.0"] * 8 + [share, "0.00"]
  assert "before + centring" not in text
  assert "after + centring" not in render({"after": after}, center=False)


def test_directions_are_those_of_the_last_given_row(before, after):
  text = render({"after": after, "before": before})
  assert "R@1 in % by direction: before" in text
  assert find(text, "image") == ["100.0"] * 4 + ["0.0", "0.0", "100.0"]
  assert find(text, "fused") == ["100.0"] * 3 + ["0.0", "0.0", "100.0", "100.0"]
  assert "†" not in text


def test_marks_and_empty_cells():
  one = evaluate_nine(build_items(records(30, views=1, captions=1)), perfect(30))
  text = render({"model": one})
  image = find(text, "image")
  assert image[:6] == ["100.0†", "100.0", "100.0†"] * 2
  assert find(text, "text")[:6] == ["100.0", "—", "—"] * 2
  assert find(text, "fused") == ["—"] * 7
  assert find(text, "model")[:4] == ["—", "—", "100.0", "100.0"]
  assert "† the query picture is a crop" in text
  assert "— no such queries" in text
  assert "items with one caption only: 30." in text


def test_what_a_difference_means(before, after):
  def with_error(view, se):
    spread = {f"R@{k}": se for k in (1, 5, 10, 50)}
    pools = {}
    for pool in ("local", "global"):
      means = {g: {**view[pool][g], "se": spread} for g in ("same", "other")}
      pools[pool] = {**view[pool], **means}
    return {**view, **pools}

  rows = {"a": with_error(before["plain"], 3.0), "b": with_error(after["plain"], 4.0)}
  assert "above 10.0 points in global other R@10, 10.0 in" in flat(rows)  # 2 √(9 + 16)
  alone = {"a": with_error(before["plain"], 3.0)}
  assert "above 8.5 points in global other R@10, 8.5 in" in flat(alone)  # 2 √(9 + 9)


def test_sizes_and_chance_are_printed(before):
  text = render({"before": before})
  assert "60 items; 60 queries a direction." in text
  assert "Pools of 60; chance: R@1 1.7, R@10 17." in text
  assert "‖Δ‖ of the means i-t 1.27" in text


def test_in_a_pool_of_ten_chance_is_a_hundred():
  result = evaluate_nine(build_items(records(10)), segregated(10)[0])
  assert "Pools of 10; chance: R@1 10, R@10 100." in flat({"a": result})


def test_a_hundred_columns_and_no_escapes(before, after):
  rows = rows_of("a run with a rather long name [sic]", before) | {"after": after}
  text = render(rows)
  assert max(map(len, text.splitlines())) <= 100
  assert "\x1b" not in text
  assert "[sic]" in text
  assert len(text.splitlines()) < 40


def test_ascii_where_the_terminal_wants_it(before, monkeypatch):
  class Terminal:
    encoding = "ascii"

  monkeypatch.setattr("sys.stdout", Terminal())
  text = render({"before": before})
  assert text.isascii()
  assert "> image" in text


def test_markdown_has_the_same_numbers(before, after):
  text = to_markdown({"before": before, "after": after})
  lines = text.splitlines()
  row = "| before | " + " | ".join(["100.0"] * 6 + ["0.0", "0.0", "100.0", "1.27"])
  assert f"{row} |" in lines
  tables = [line for line in lines if line.startswith("|")]
  assert {line.count("|") for line in tables[:5]} == {12}
  assert {line.count("|") for line in tables[5:]} == {9}
  assert any(line.startswith("| image | 100.0† | 100.0 | 100.0†") for line in lines)


def test_notes_come_last(before):
  notes = ["Loss: GCL [self_masked].", "words " * 30]
  lines = render({"before": before}, notes=notes).splitlines()
  at = lines.index(notes[0])  # brackets are no markup
  assert any(line.startswith("Own share:") for line in lines[:at])
  assert " ".join(lines[at + 1 :]).split() == ["words"] * 30
  assert max(map(len, lines)) <= 100
  text = to_markdown({"before": before}, notes=notes)
  assert text.endswith(f"\n\n{notes[0]}\n\n{notes[1]}\n")


def test_no_rows_is_an_error():
  with pytest.raises(ValueError, match="no rows"):
    render({})
