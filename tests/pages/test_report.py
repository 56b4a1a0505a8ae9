"""The report's page: what is in the files is on it, escaped, and what is not is said."""

import itertools
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pages_fakes import STRANGE, evaluation, write, write_run

from gcl_jax.errors import UserError
from gcl_jax.pages import check_page, read_results, report_page, results, write_page
from gcl_jax.pages.charts import bar_chart, line_chart, scatter_chart, ticks

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("summary", "heat", "curves", "gap", "shares", "ranks", "losses", "examples")


@pytest.fixture(scope="module")
def even():
  return evaluation(0.0)


@pytest.fixture(scope="module")
def apart():
  return evaluation(3.0)


class Elements(HTMLParser):
  """Every element that a browser would see, with its attributes, and all text."""

  def __init__(self, page):
    super().__init__()
    self.elements, self.texts = [], []
    self.feed(page)

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))

  def handle_data(self, data):
    self.texts.append(data)


def page_of(tmp_path, **results):
  files = [
    f"{name}={write(tmp_path / (name + '.json'), r)}" for name, r in results.items()
  ]
  return report_page(read_results(files))


def section(page, name):
  return re.search(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL)[1]


def cells(html):
  return re.findall(r'data-k1="([^"|]*)\|h(\w+)"', html)


def test_heat_maps_hold_every_recall(tmp_path, even, apart):
  even, apart = (json.loads(json.dumps(result)) for result in (even, apart))
  values = itertools.count(0, 1.3)
  for result in (even, apart):
    for view in ("plain", "centered"):
      for pool in ("local", "global"):
        for cell in result[view][pool]["cells"].values():
          cell["R@1"] = next(values) % 100  # no two alike, whatever is swapped
  page = page_of(tmp_path, even=even, apart=apart)
  shown = cells(section(page, "heat"))
  expected = [
    cell["R@1"]
    for result in (even, apart)
    for pool in ("local", "global")
    for view in ("plain", "centered")
    for cell in result[view][pool]["cells"].values()
  ]
  assert len(expected) == 72
  assert [text for text, _ in shown] == [f"{value:.1f}" for value in expected]
  assert [int(level) for _, level in shown] == [round(value / 10) for value in expected]
  assert len(set(expected)) == 72


def test_the_summary_holds_the_means(tmp_path, even, apart):
  text = section(page_of(tmp_path, even=even, apart=apart), "summary")
  row = re.search(r"global, other modality, R@1</th>(.*?)</tr>", text)[1]
  values = re.findall(r"<td>([\d.]+)", row)
  assert values == ["100.0", "100.0", "0.0", "100.0"]  # centring mends a pure offset
  row = re.search(r"own share of the global top 10</th>(.*?)</tr>", text)[1]
  share = apart["plain"]["own_share"]["mean"]
  assert share > 80
  assert re.findall(r"<td>([\d.]+)", row)[2] == f"{share:.0f}"


def test_curves_and_ranks_are_the_counts(tmp_path, apart):
  page = page_of(tmp_path, apart=apart)
  html = section(page, "curves")
  table = re.search(
    r"<h3>global pool, other modality</h3>.*?<tbody>(.*?)</tbody>", html, re.S
  )[1]
  row = re.search(r"<th>apart, plain</th>(.*?)</tr>", table)[1]
  shown = [float(x) for x in re.findall(r"<td>([\d.]+)", row)]
  part = apart["plain"]["global"]
  names = part["other"]["cells"]
  expected = [
    sum(part["cells"][n]["found"][i] / part["cells"][n]["queries"] for n in names) / 6
    for i in range(len(part["ladder"]))
  ]
  assert shown == pytest.approx([100 * x for x in expected], abs=0.06)
  assert shown[0] == 0
  assert shown[-1] == 100
  ranks = section(page, "ranks")
  row = re.search(
    r"<th>of another modality|<th>other modality, %</th>(.*?)</tr>", ranks
  )[1]
  bins = [float(x) for x in re.findall(r"<td>([\d.]+)", row)]
  assert sum(bins) == pytest.approx(100, abs=0.5)
  assert bins[0] == 0


def test_shares_are_by_query_and_answer(tmp_path, even):
  result = json.loads(json.dumps(even))
  shares = result["plain"]["top10_share"]
  for place, name in enumerate(shares):
    shares[name] = 10.0 + place
  html = section(page_of(tmp_path, one=result), "shares")
  assert list(shares)[1] == "i->t"
  assert "image asks: 11.0 % of the top 10 are text" in html
  assert "text asks: 13.0 % of the top 10 are image" in html
  assert "fused asks: 17.0 % of the top 10 are text" in html


def test_points_keep_their_place():
  cloud = {"name": "text", "style": "text", "x": [1, -2], "y": [2, 0], "mean": [0, 0]}
  chart = scatter_chart([cloud], 2)
  (drawn,) = chart["clouds"]
  right_and_up, left = drawn["points"]
  assert drawn["mean"] == chart["centre"]
  assert left["x"] < chart["centre"]["x"] < right_and_up["x"]
  assert right_and_up["y"] < chart["centre"]["y"] == left["y"]
  half = chart["bar"]["to"] - chart["bar"]["from"]
  assert right_and_up["x"] - chart["centre"]["x"] == pytest.approx(2 * half, abs=0.2)


def test_everything_from_a_file_is_escaped(tmp_path):
  result = evaluation(0.0, strange=True)
  result["checkpoint"] = f"runs/{STRANGE}"
  page = page_of(tmp_path, **{'"><img src onerror>': result})
  seen = Elements(page)
  assert "alert" in " ".join(seen.texts)  # shown, as text
  scripts = [a for tag, a in seen.elements if tag == "script"]
  assert len(scripts) == 1
  assert not [a for tag, a in seen.elements if tag == "b"]
  assert not [a for _, a in seen.elements if any(k.startswith("on") for k in a)]
  sources = [a["src"] for tag, a in seen.elements if "src" in a]
  assert sources
  assert all(source.startswith("data:image/jpeg;base64,") for source in sources)


def test_the_page_forbids_itself_the_network(tmp_path, even):
  page = page_of(tmp_path, even=even)
  assert "default-src 'none'; img-src data:; style-src 'sha256-" in page
  assert "connect-src" not in page
  assert not re.search(r'(?:src|href)="(?!data:|#)', page)
  assert "url(" not in page
  assert "@import" not in page
  assert ' style="' not in page  # the policy would drop it


def older(result):
  """As evaluations were before they counted by k."""
  old = json.loads(json.dumps(result))
  del old["examples"]
  for view in ("plain", "centered"):
    del old[view]["sketch"], old[view]["top10_share"]
    for pool in ("local", "global"):
      del old[view][pool]["ladder"]
      for cell in old[view][pool]["cells"].values():
        del cell["found"]
  return old


def test_older_files_make_a_page_that_says_what_is_missing(tmp_path, even):
  page = page_of(tmp_path, old=older(even), new=even)
  for name in ("curves", "gap", "shares", "ranks", "examples"):
    assert "Not in old: " in section(page, name)
    assert "new" not in re.search(r"Not in (.*?):", section(page, name))[1]
  for name in ("curves", "gap", "shares", "ranks"):
    assert "<svg" in section(page, name)
  assert "Not in old, new: no metrics.jsonl" in section(page, "losses")
  assert len(cells(section(page, "heat"))) == 72
  alone = page_of(tmp_path, old=older(even))
  assert "<figure" not in section(alone, "curves")
  assert "Not in old" in section(alone, "curves")


def test_one_view_alone(tmp_path):
  result = evaluation(0.0, center="centered")
  page = page_of(tmp_path, one=result)
  assert len(cells(section(page, "heat"))) == 18
  assert "plain" not in re.findall(r"<caption>(.*?)</caption>", page)


def test_pictures_only(tmp_path):
  result = evaluation(0.0)
  for view in ("plain", "centered"):
    for pool in ("local", "global"):
      part = result[view][pool]
      for name, cell in part["cells"].items():
        if "t" in name.replace("it", ""):
          cell |= {"queries": 0, "median_rank": None, "found": [0] * len(cell["found"])}
          cell |= dict.fromkeys(("R@1", "R@5", "R@10", "R@50"))
      part["other"]["cells"] = ["i->it", "it->i"]
    result[view]["top10_share"] |= dict.fromkeys(("t->i", "t->t", "t->it"))
    result[view]["sketch"]["text"] = {"x": [], "y": [], "mean": None}
    result[view]["gap"]["delta"] |= {"i-t": None, "t-it": None}
  page = page_of(tmp_path, one=result)
  assert ("—", "none") in cells(section(page, "heat"))
  assert "image, text —" in section(page, "gap")


def test_different_items_are_pointed_out(tmp_path, even):
  note = "not evaluated on the same items"
  assert note not in page_of(tmp_path, a=even, b=even)
  assert note in page_of(tmp_path, a=even, b=evaluation(0.0, items=20))


def test_models_are_told_apart(tmp_path, even):
  folder = tmp_path / "a"
  folder.mkdir()
  first = write(folder / "first.json", even)
  second = write(tmp_path / "second.json", even)
  assert [r.name for r in read_results([first])] == ["gap0.0"]
  assert [r.name for r in read_results([first, second])] == ["first", "second"]
  named = read_results([first, f"x y={second}"])
  assert [r.name for r in named] == ["gap0.0", "x y"]
  strange = write(tmp_path / "b=c.json", even)
  assert read_results([strange])[0].path == strange


def test_losses_of_the_run_and_of_the_folder_of_the_evaluation(tmp_path, even):
  losses = [(float(step), 5 - step / 500) for step in range(10, 2000, 2)]
  run = write_run(tmp_path / "run", losses)
  there = write(tmp_path / "there.json", {**even, "checkpoint": run})
  beside = write(tmp_path / "run" / "evaluation.json", even)
  for file in (there, beside):
    assert read_results([file])[0].losses == losses
  html = section(report_page(read_results([there])), "losses")
  assert "<td>1,998</td><td>4.98</td><td>1.004</td>" in html
  assert html.count("L") < 350  # thinned to what a chart can show
  assert read_results([write(tmp_path / "no.json", even)])[0].losses is None


def test_losses_that_no_chart_can_show_are_dropped(tmp_path, even):
  losses = [(1, 5.0), (2, 1e308), (3, -1e308), (1e300, 2.0), (4, 5.0 + 1e-15)]
  run = write_run(tmp_path / "run", losses)
  file = write(tmp_path / "a.json", {**even, "checkpoint": run})
  assert read_results([file])[0].losses == [losses[0], losses[4]]
  assert "<svg" in section(report_page(read_results([file])), "losses")


def test_no_store_is_asked_for_what_a_file_names(tmp_path, even, monkeypatch):
  asked = []
  monkeypatch.setattr(results, "as_path", lambda text: asked.append(text) or Path(text))
  for scheme in ("s3", "gs", "memory"):
    file = write(tmp_path / "a.json", {**even, "checkpoint": f"{scheme}://bucket/run"})
    assert read_results([file])[0].losses is None
  assert set(asked) == {file, str(tmp_path)}


def test_examples_of_two_models_stand_together(tmp_path, even, apart):
  html = section(page_of(tmp_path, even=even, apart=apart), "examples")
  assert html.count("<article") == 2
  assert html.count('<li class="right">') == 2  # the even model finds both
  assert html.count("right answer at rank") == 2
  assert html.count("right answer only at rank") == 2


def damage(result, path, value):
  broken = json.loads(json.dumps(result))
  *inner, last = path
  at = broken
  for key in inner:
    at = at[key]
  at[last] = value
  return broken


@pytest.mark.parametrize(
  ("path", "value", "said"),
  [
    (("items",), [], "items is"),
    (("items", "items"), "many", "items.items is 'many'"),
    (("plain",), 3, "plain is 3"),
    (
      ("plain", "local", "cells", "i->t", "R@1"),
      "9",
      "plain.local.cells.i->t.R@1 is '9'",
    ),
    (("plain", "global", "cells", "i->t", "R@1"), float("nan"), "R@1 is nan"),
    (("plain", "global", "cells", "i->t", "R@1"), 10**400, "R@1 is 1000"),
    (("plain", "global", "cells", "t->t", "found"), [1], "t->t.found is [1]"),
    (("plain", "global", "ladder"), "x", "plain.global.ladder is 'x'"),
    (("plain", "global", "same", "cells"), ["x"], "plain.global.same.cells is ['x']"),
    (("plain", "global", "same", "cells"), [[1]], "plain.global.same.cells is [[1]]"),
    (("plain", "global", "ladder", 0), 0, "plain.global.ladder is [0,"),
    (("plain", "local", "ladder", 0), -1, "plain.local.ladder is [-1,"),
    (("plain", "global", "ladder", 1), 1, "plain.global.ladder is [1, 1,"),
    (("plain", "global", "cells", "i->t", "pool"), 0, "i->t.pool is 0"),
    (("plain", "global", "cells", "i->t", "queries"), -1, "i->t.queries is -1"),
    (("plain", "own_share", "mean"), {}, "plain.own_share.mean is {}"),
    (("plain", "sketch", "text", "x"), [1], "plain.sketch.text is"),
    (("examples",), 7, "examples is 7"),
    (("examples", 0, "found"), None, "examples[0].found is None"),
    (("examples", 0, "image"), "https://example.org/a.jpg", "examples[0].image is"),
    (("examples", 0, "found", 0, "image"), "data:text/html,x", "found[0].image is"),
    (("examples", 0, "rank"), None, "examples[0].rank is None"),
  ],
)
def test_damaged_files(tmp_path, even, path, value, said):
  file = write(tmp_path / "a.json", damage(even, path, value))
  with pytest.raises(UserError, match=re.escape(f"{file} is damaged: ")) as error:
    read_results([file])
  assert said in str(error.value)
  assert "evaluate the model again" in str(error.value)


def test_files_that_are_no_evaluations(tmp_path, even):
  good = write(tmp_path / "good.json", even)
  (tmp_path / "text.json").write_text("not json")
  (tmp_path / "other.json").write_text('{"step": 3}')
  (tmp_path / "cirr.json").write_text('{"benchmark": "cirr"}')
  for files, said in (
    ([], "name the evaluations"),
    ([str(tmp_path)], "is a folder: name the JSON file"),
    ([str(tmp_path / "none.json")], "there is no such file"),
    ([good, str(tmp_path / "text.json")], "text.json cannot be read as JSON"),
    ([str(tmp_path / "other.json")], "other.json is no evaluation in nine directions"),
    ([str(tmp_path / "cirr.json")], "cirr.json is the result of a public benchmark"),
    ([f"x={good}", f"x={good}"], 'two evaluations would be called "x"'),
  ):
    with pytest.raises(UserError, match=re.escape(said)):
      read_results(files)


def test_outputs_that_are_refused(tmp_path, even, monkeypatch):
  page = page_of(tmp_path, even=even)
  output = tmp_path / "out" / "report.html"
  check_page(output, "--output")
  write_page(output, page, "--output")
  check_page(output, "--output")  # a page of ours is written over
  theirs = tmp_path / "theirs.html"
  theirs.write_text("<html>")
  with pytest.raises(
    UserError, match=r"--output=.*theirs.html exists and is no page of"
  ):
    check_page(theirs, "--output")
  with pytest.raises(UserError, match=r"is a folder: name an \.html file"):
    check_page(tmp_path, "--output")
  with pytest.raises(UserError, match="cannot be written"):
    check_page(theirs / "x.html", "--output")

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "replace", full)
  with pytest.raises(UserError, match=r"cannot be written: .*No space left"):
    write_page(output, page, "--output")
  assert sorted(p.name for p in output.parent.iterdir()) == ["report.html"]


def test_the_command(tmp_path, even):
  file = write(tmp_path / "a.json", even)

  def run(*arguments):
    return subprocess.run(
      [sys.executable, "-m", "gcl_jax.report", *arguments],
      cwd=tmp_path,
      env={**os.environ, "PYTHONPATH": str(ROOT)},
      capture_output=True,
      text=True,
      timeout=120,
    )

  done = run(f"mine={file}", "--output=page.html")
  assert done.returncode == 0, done.stderr
  page = (tmp_path / "page.html").read_text()
  assert all(f'<section id="{name}">' in page for name in SECTIONS)
  done = run(file, f"--output={file}")
  assert (done.returncode, done.stderr.count("\n")) == (2, 1)
  assert "is no page of ours" in done.stderr


def test_ticks_are_round_and_inside():
  assert ticks(0, 100, 4) == [0, 20, 40, 60, 80, 100]
  assert ticks(1.19, 8.2, 4) == [2, 4, 6, 8]
  assert ticks(3, 3) == [3]
  assert ticks(0, 5e-324) == [0]
  assert ticks(0, 0.03, 3) == [0, 0.01, 0.02, 0.03]


def test_lines_keep_their_place():
  line = {"name": "a", "style": "model0", "points": [(1, 0), (10, 50), (100, 100)]}
  chart = line_chart([line], x_title="K", y_title="%", log_x=True, y_range=(0, 100))
  first, middle, last = chart["lines"][0]["marks"]
  assert (first["x"], first["y"]) == (chart["left"], chart["floor"])
  assert (last["x"], last["y"]) == (chart["right"], chart["top"])
  assert middle["x"] == pytest.approx((first["x"] + last["x"]) / 2)
  assert middle["y"] == pytest.approx((first["y"] + last["y"]) / 2)
  assert [t["text"] for t in chart["x_ticks"]] == ["1", "10", "100"]
  flat = line_chart([{**line, "points": [(5, 2), (5, 2)]}], x_title="", y_title="")
  assert flat["lines"][0]["marks"][0]["x"] == flat["left"]


def test_bars_stand_on_the_axis():
  chart = bar_chart(
    ["1", "2"],
    [{"name": "a", "style": "same", "values": [10.0, 0.0]}],
    x_title="",
    y_title="",
  )
  tall, none = chart["bars"]
  assert tall["y"] + tall["height"] == chart["floor"]
  assert tall["y"] == chart["top"]
  assert none["height"] == 0
