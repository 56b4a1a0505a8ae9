"""The search pages in headless Chromium; one test runs the real command."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import expect
from search_fakes import STRANGE, picture, searcher, write_index

from gcl_jax.pages import server
from gcl_jax.pages.search import results_page

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("uploads")
  for k in range(4):
    picture(k).save(folder / f"{k}.png")
  (folder / "no.png").write_bytes(b"no picture")
  (folder / "large.png").write_bytes(b"x" * (server.MOST_BYTES + 1))
  return folder


@pytest.fixture(scope="module")
def address(tmp_path_factory):
  asks = searcher(tmp_path_factory.mktemp("served") / "index", strange=True)
  running = uvicorn.Server(uvicorn.Config(server.make_app(asks), log_level="warning"))
  with server.bound("127.0.0.1", 0) as listening:
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    running.should_exit = True
    thread.join()


def found(page):
  expect(page.locator("#results:not([aria-busy]) li").first).to_be_visible()
  page.wait_for_load_state("networkidle")
  return page.locator("#results .tag").evaluate_all("all => all.map(e => e.innerText)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_words_then_a_picture(visit, address, files, width, scheme):
  page = visit(address, width, scheme)
  page.get_by_label("Words").fill("thing 2")
  page.keyboard.press("Enter")
  assert found(page)[0] == "text"
  assert page.locator("#results .id").first.inner_text().startswith("id 2<img")
  assert page.locator("#results img").count() == 6  # ten documents, four of them texts
  page.get_by_label("Words").fill("")
  page.locator("#image").set_input_files(files / "1.png")
  expect(page.locator("#preview")).to_be_visible()
  page.get_by_label("Find").select_option("image")
  page.get_by_role("button", name="Search").click()
  expect(page.locator("#results li")).to_have_count(4)
  assert found(page) == ["image"] * 4
  page.wait_for_function(
    "[...document.querySelectorAll('#results img')].every(i => i.naturalWidth == 40)"
  )
  assert page.evaluate("document.documentElement.scrollWidth") == width
  assert page.said == []
  outside = [u for u in page.asked_for if not u.startswith((address, "blob:", "data:"))]
  assert outside == []


def test_a_dropped_picture(visit, address):
  page = visit(address)
  page.evaluate(
    """async () => {
    const canvas = Object.assign(document.createElement("canvas"), {width: 8, height: 8});
    const draw = canvas.getContext("2d");
    draw.fillStyle = "rgb(180, 75, 0)";
    draw.fillRect(0, 0, 8, 8);
    const data = await new Promise((done) => canvas.toBlob(done, "image/png"));
    const files = new DataTransfer();
    files.items.add(new File([data], "../../etc/passwd", {type: "image/png"}));
    document.dispatchEvent(new DragEvent("drop", {
      bubbles: true, cancelable: true, dataTransfer: files,
    }));
  }"""
  )
  expect(page.locator("#preview")).to_be_visible()
  page.get_by_role("button", name="Search").click()
  assert found(page)[0] == "image"
  assert page.locator("#results .id").first.inner_text().startswith("id 3")
  assert all("passwd" not in url for url in page.asked_for)  # no name travels
  page.get_by_role("button", name="Remove").click()
  assert not page.locator("#preview").is_visible()
  assert page.said == []


def test_refusals_are_shown(visit, address, files):
  page = visit(address)
  said = page.locator("#said")
  page.get_by_role("button", name="Search").click()
  expect(said).to_have_text("ask with a text, a picture, or both.")
  page.locator("#image").set_input_files(files / "no.png")
  page.get_by_role("button", name="Search").click()
  expect(said).to_contain_text("not a picture in a known format")
  page.locator("#image").set_input_files(files / "large.png")
  expect(said).to_have_text("the picture is larger than 10 MB: make it smaller.")
  assert all("status of 400" in line for line in page.said)  # Chromium's own note
  assert len(page.said) == 2


@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_of_results_on_disk(visit, tmp_path, width):
  asks = searcher(tmp_path / "index", strange=True)
  hits = asks.ask("thing 2", k=12)
  page = tmp_path / "hits.html"
  asked = {"text": STRANGE * 5, "image": picture(2), "modality": None}
  page.write_text(results_page(asks, hits, **asked))
  seen = visit(page.as_uri(), width)
  assert seen.said == []
  assert [u for u in seen.asked_for if not u.startswith("data:")] == [page.as_uri()]
  assert seen.locator("li").count() == 12
  assert seen.locator("img").evaluate_all("all => all.every(i => i.naturalWidth > 0)")
  assert seen.evaluate("document.documentElement.scrollWidth") == width


def test_the_command_serves_and_stops(visit, tmp_path, tiny_run):
  from gcl_jax.retrieval import load
  from gcl_jax.retrieval.identity import identity

  index = write_index(
    tmp_path / "index",
    model=identity(load(tiny_run, batch_size=1)),
    about={"checkpoint": str(tiny_run), "step": 2},
  )
  running = subprocess.Popen(
    [
      sys.executable,
      "-m",
      "gcl_jax.search",
      f"--index={index}",
      "--serve",
      "--port=0",
    ],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": ""},
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    ready = running.stdout.readline()
    assert re.fullmatch(r"ready: http://127\.0\.0\.1:\d+\n", ready)  # loopback alone
    page = visit(ready.split()[1])
    page.get_by_label("Words").fill("a red box")
    page.keyboard.press("Enter")
    assert len(found(page)) == 10
    assert page.said == []
  finally:
    running.send_signal(signal.SIGINT)
    code = running.wait(timeout=30)
  assert code == 130
