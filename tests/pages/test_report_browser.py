"""The report in headless Chromium: quiet, whole, and as wide as the screen."""

import pytest
from pages_fakes import evaluation, write, write_run

from gcl_jax.pages import read_results, report_page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(tmp_path_factory):
  folder = tmp_path_factory.mktemp("report")
  files = []
  for name, gap in (("even", 0.0), ("a-name-that-does-not-break-" * 3, 3.0)):
    result = evaluation(gap, strange=True)
    result["examples"][0]["found"][-1]["right"] = True  # beyond a phone's edge
    losses = [(float(s), 3 / s) for s in range(1, 50)]
    result["checkpoint"] = write_run(folder / f"run{gap}", losses)
    files.append(f"{name}={write(folder / f'{gap}.json', result)}")
  page = folder / "report.html"
  page.write_text(report_page(read_results(files)))
  return page.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_quiet_whole_and_fits(visit, address, width, scheme):
  page = visit(address, width, scheme)
  assert page.said == []
  assert [url for url in page.asked_for if not url.startswith("data:")] == [address]
  assert page.evaluate("document.documentElement.scrollWidth") == width
  counts = {
    name: page.locator(f"#{name} svg.chart").count()
    for name in ("curves", "gap", "shares", "ranks", "losses")
  }
  assert counts == {"curves": 4, "gap": 4, "shares": 4, "ranks": 2, "losses": 1}
  assert page.locator("#heat table").count() == 8
  assert page.locator("#examples article").count() == 2
  pictures = page.locator("#examples img")
  assert pictures.count() > 4
  assert pictures.evaluate_all("all => all.every(i => i.naturalWidth > 0)")
  for chart in page.locator("svg.chart").all():
    box = chart.bounding_box()
    assert box["width"] > 200
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
  # The style has arrived: the policy has not dropped it.
  dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
  assert (dark == "rgb(17, 17, 16)") == (scheme == "dark")


def test_a_switch_and_a_tip(visit, address):
  page = visit(address)
  cell = page.locator("#heat td").nth(1)
  shown = {k: cell.get_attribute(f"data-k{k}").split("|")[0] for k in (1, 5, 10)}
  assert cell.inner_text() == shown[10]
  page.get_by_role("button", name="R@1", exact=True).click()
  assert cell.inner_text() == shown[1]
  assert page.locator("[data-k-name]").first.inner_text() == "R@1"
  pressed = page.locator('.switch button[aria-pressed="true"]')
  assert pressed.all_inner_texts() == ["R@1"]
  cell.hover()
  tip = page.locator("#tip")
  assert tip.is_visible()
  assert "image asks for text: 30 queries" in tip.inner_text()
  assert page.said == []


def contrast(page):
  """The lowest contrast of letters against what is behind them, in heat maps."""
  return page.evaluate(
    """() => {
    const light = (text) => {
      const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map((v) => {
        v /= 255;
        return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
      });
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    return Math.min(...[...document.querySelectorAll("#heat td, .ramp span")].map((e) => {
      const style = getComputedStyle(e);
      const both = [light(style.color), light(style.backgroundColor)].sort((a, b) => a - b);
      return (both[1] + 0.05) / (both[0] + 0.05);
    }));
  }"""
  )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_on_every_step_of_the_ramp_can_be_read(visit, address, scheme):
  assert contrast(visit(address, scheme=scheme)) >= 4.5  # WCAG 2.2, AA
