"""The served page, asked in this process: what it answers, and what it refuses."""

import io
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvicorn
from PIL import Image
from search_fakes import picture, searcher
from starlette.testclient import TestClient

from gcl_jax.errors import UserError
from gcl_jax.pages import server


@pytest.fixture(scope="module")
def asks(tmp_path_factory):
  return searcher(tmp_path_factory.mktemp("served") / "index")


@pytest.fixture(scope="module")
def app(asks):
  return server.make_app(asks)


@pytest.fixture
def client(app):
  return TestClient(app, base_url="http://localhost")


def png(image, **more):
  out = io.BytesIO()
  image.save(out, "PNG", **more)
  return out.getvalue()


def test_the_page(client):
  answer = client.get("/")
  assert answer.status_code == 200
  assert "4 image, 4 text, 4 fused" in answer.text
  assert "img-src data: 'self' blob:" in answer.text
  assert "connect-src 'self'" in answer.text
  assert answer.headers["content-security-policy"] == "frame-ancestors 'none'"
  assert answer.headers["x-content-type-options"] == "nosniff"


def test_words_a_picture_and_both(client):
  answer = client.post("/search", params={"text": "thing 2", "k": 3})
  assert answer.status_code == 200
  assert answer.text.count("<li>") == 3
  assert answer.text.index("id 2") > 0
  first = client.post("/search", params={"k": 1}, content=png(picture(1)))
  assert "picture/3" in first.text
  both = client.post("/search?text=thing 3&k=1&modality=", content=png(picture(3)))
  assert "picture/11" in both.text
  only = client.post("/search", params={"text": "thing 1", "modality": "fused"})
  assert only.text.count('class="tag fused"') == 4
  assert only.text.count('class="tag ') == 4


@pytest.mark.parametrize(
  ("params", "said"),
  [
    ({}, "ask with a text, a picture, or both."),
    ({"text": "  "}, "ask with a text"),
    ({"image": "/etc/passwd"}, "ask with a text"),  # a path is no picture
    ({"text": "a", "k": "0"}, "k: a number from 1 to 100."),
    ({"text": "a", "k": "101"}, "k: a number from 1 to 100."),
    ({"text": "a", "k": "9" * 5000}, "k: a number from 1 to 100."),
    ({"text": "a", "k": "²"}, "k: a number from 1 to 100."),
    ({"text": "a", "modality": "sound"}, "the index holds no sound documents"),
    ({"text": "a" * 2001}, "the text has 2,001 letters; at most 2,000"),
  ],
)
def test_queries_that_are_refused(client, params, said):
  answer = client.post("/search", params=params)
  assert answer.status_code == 400
  assert said in answer.text
  assert answer.headers["content-type"].startswith("text/plain")


def test_uploads_that_are_refused(client, monkeypatch):
  for data, said in (
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture in a known format"),
    (png(Image.effect_noise((40, 30), 90))[:500], "image bytes (500): "),
    (png(Image.new("1", (8000, 6000))), "8000 x 6000 pixels are more than the limit"),
  ):
    answer = client.post("/search", content=data)
    assert answer.status_code == 400, data[:20]
    assert said in answer.text
  answer = client.post("/search", content=b"x" * (server.MOST_BYTES + 1))
  assert answer.status_code == 413
  assert answer.text == "the picture is larger than 10 MB: make it smaller."

  def chunks():
    for _ in range(50):
      sent.append(1)
      yield b"x" * 1000

  sent = []
  monkeypatch.setattr(server, "MOST_BYTES", 2500)
  assert client.post("/search", content=chunks()).status_code == 413


def test_pictures_by_row_alone(client):
  answer = client.get("/picture/3")
  assert answer.headers["content-type"] == "image/jpeg"
  shown = Image.open(io.BytesIO(answer.content))
  assert shown.size == (40, 30)
  assert abs(shown.convert("RGB").getpixel((5, 5))[0] - 60) < 6
  assert client.get("/picture/4").status_code == 404  # a text
  assert client.get("/picture/12").text == "the index has no such row."
  for path in ("/picture/-1", "/picture/1.png", "/picture//etc/passwd", "/picture/"):
    assert client.get(path).status_code == 404
  for row in ("9" * 18, "9" * 5000, "²", "+3", "1_0"):
    answer = client.get(f"/picture/{row}")
    assert (answer.status_code, answer.text) == (404, "the index has no such row.")
  assert client.get("/picture/..%2f..%2fetc%2fpasswd").status_code == 404
  assert client.get("/static/style.css").status_code == 404
  assert client.get("/search").status_code == 405


def test_pictures_that_are_gone(tmp_path):
  asks = searcher(tmp_path / "index")
  client = TestClient(server.make_app(asks), base_url="http://localhost")
  (tmp_path / "pictures" / "1.png").write_bytes(b"no picture")
  answer = client.get("/picture/3")
  assert (answer.status_code, answer.text) == (
    404,
    "the picture of this row cannot be read.",
  )


def test_pictures_are_decoded_few_at_a_time(client, monkeypatch):
  counted, now, most = threading.Lock(), [0], [0]

  def slow(source, **_):
    with counted:
      now[0] += 1
      most[0] = max(most[0], now[0])
    time.sleep(0.05)
    with counted:
      now[0] -= 1
    return b""

  monkeypatch.setattr(server, "thumbnail", slow)
  with ThreadPoolExecutor(6) as pool:
    answers = list(pool.map(client.get, ["/picture/3"] * 12))
  assert [answer.status_code for answer in answers] == [200] * 12
  assert most[0] == server.DECODED_AT_ONCE


def test_pictures_of_the_index_are_no_larger_than_uploads(client, monkeypatch):
  monkeypatch.setattr(server, "MOST_PIXELS", 40 * 30 - 1)
  assert client.get("/picture/3").text == "the picture of this row cannot be read."


@pytest.mark.parametrize(
  ("headers", "status"),
  [
    ({}, 200),
    ({"origin": "http://localhost"}, 200),
    ({"sec-fetch-site": "same-origin", "origin": "https://proxy.example"}, 200),
    ({"origin": "http://evil.example"}, 403),
    ({"origin": "http://localhost:3000"}, 403),
    ({"origin": "null"}, 403),
    ({"origin": "http://[a"}, 403),
    ({"sec-fetch-site": "cross-site"}, 403),
    ({"sec-fetch-site": "same-site", "origin": "http://localhost"}, 403),
  ],
)
def test_queries_of_other_sites_are_refused(client, headers, status):
  answer = client.post("/search", params={"text": "thing 1"}, headers=headers)
  assert answer.status_code == status


class Idle:
  """A server that has nothing to do."""

  def __init__(self, config):
    del config

  def run(self, sockets):
    assert len(sockets) == 1


@pytest.mark.parametrize(
  ("host", "address", "is_open"),
  [
    ("127.0.0.2", "127.0.0.2", False),
    ("127.1", "127.0.0.1", False),
    ("0:0:0:0:0:0:0:1", "::1", False),
    ("0.0.0.0", "0.0.0.0", True),
  ],
)
def test_loopback_however_it_is_written(
  asks, monkeypatch, capsys, host, address, is_open
):
  hosts = []
  monkeypatch.setattr(server, "make_app", lambda _, *, host: hosts.append(host))
  monkeypatch.setattr(uvicorn, "Config", lambda app, **_: app)
  monkeypatch.setattr(uvicorn, "Server", Idle)
  try:
    server.serve(asks, host=host, port=0)
  except UserError:
    if ":" not in host:
      raise
    return  # no IPv6 here
  assert hosts == [address]
  assert ("is open to others" in capsys.readouterr().err) == is_open


@pytest.mark.parametrize(
  ("address", "name"),
  [("127.0.0.2", "127.0.0.2"), ("::1", "[::1]"), ("::ffff:127.0.0.1", "LOCALHOST")],
)
def test_names_on_every_loopback_address(asks, address, name):
  app = server.make_app(asks, host=address)
  assert TestClient(app, base_url=f"http://{name}:7860").get("/").status_code == 200
  evil = TestClient(app, base_url="http://evil.example:7860")
  assert evil.get("/").status_code == 400


def test_only_this_machine_by_its_own_names(app, tmp_path):
  for name in ("localhost", "127.0.0.1:7860", "[::1]:7860"):
    assert TestClient(app, base_url=f"http://{name}").get("/").status_code == 200
  evil = TestClient(app, base_url="http://evil.example:7860")
  assert evil.get("/").status_code == 400
  assert evil.post("/search", params={"text": "thing 1"}).status_code == 400
  open_app = server.make_app(searcher(tmp_path / "index"), host="0.0.0.0")
  lan = TestClient(open_app, base_url="http://machine.lan:7860")
  assert lan.get("/").status_code == 200


def test_addresses_that_cannot_be_had():
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(UserError, match=f"--port={port} cannot be had .*--port, or 0"):
      server.bound("127.0.0.1", port)
  with pytest.raises(UserError, match="--host=no such host --port=80: no such address"):
    server.bound("no such host", 80)
  with pytest.raises(
    UserError, match="--port=99999: a port is a number from 0 to 65535"
  ):
    server.bound("127.0.0.1", 99999)
  with server.bound("127.0.0.1", 0) as free:
    assert free.getsockname()[0] == "127.0.0.1"


def test_without_the_libraries(monkeypatch, tmp_path):
  import sys

  asks = searcher(tmp_path / "index")
  monkeypatch.setitem(sys.modules, "uvicorn", None)
  with pytest.raises(UserError, match=r"needs Starlette and uvicorn.*pip install"):
    server.serve(asks, host="127.0.0.1", port=0)
  monkeypatch.setitem(sys.modules, "starlette.applications", None)
  with pytest.raises(UserError, match=r"needs Starlette and uvicorn.*pip install"):
    server.make_app(asks)
