"""Headless Chromium, watched: what it logs and asks for."""

import os
import shutil

import pytest


@pytest.fixture(scope="session")
def chromium():
  """A browser. $CHROMIUM names another one than the system's."""
  from playwright.sync_api import sync_playwright

  path = os.environ.get("CHROMIUM") or shutil.which("chromium")
  assert path, "no chromium: apt-get install chromium, or set $CHROMIUM"
  with sync_playwright() as playwright:
    # The sandbox needs what a container's root does not have; pages here are our own.
    browser = playwright.chromium.launch(
      executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
    )
    yield browser
    browser.close()


@pytest.fixture
def visit(chromium):
  """visit(address, width, scheme) -> a page with lists `said` and `asked_for`."""
  contexts = []

  def opened(address, width=1280, scheme="light"):
    context = chromium.new_context(
      viewport={"width": width, "height": 844}, color_scheme=scheme
    )
    contexts.append(context)
    page = context.new_page()
    page.said, page.asked_for = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: page.asked_for.append(request.url))
    page.goto(address)
    return page

  yield opened
  for context in contexts:
    context.close()
