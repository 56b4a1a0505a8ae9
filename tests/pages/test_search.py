"""Queries against a small index: who is found, and how it is shown."""

import json
import re
from types import SimpleNamespace

import pytest
from search_fakes import STRANGE, picture, searcher, write_index

from gcl_jax import search
from gcl_jax.errors import UserError
from gcl_jax.pages.search import results_page, results_part
from gcl_jax.retrieval.searcher import Hit


@pytest.fixture(scope="module")
def asks(tmp_path_factory):
  return searcher(tmp_path_factory.mktemp("search") / "index")


def test_a_text_a_picture_and_both(asks):
  by_text = asks.ask("thing 2", k=3)
  assert (by_text[0].id, by_text[0].modality) == ("id 2", "text")
  assert {h.id for h in by_text} == {"id 2"}
  assert [h.rank for h in by_text] == [1, 2, 3]
  assert by_text[0].score == pytest.approx(1)
  assert [h.score for h in by_text] == sorted((h.score for h in by_text), reverse=True)
  by_picture = asks.ask(image=picture(1), k=1)[0]
  assert (by_picture.row, by_picture.text) == (3, None)
  assert by_picture.image.endswith("1.png")
  both = asks.ask("thing 3", picture(3), k=1)[0]
  assert (both.id, both.modality, both.text) == ("id 3", "fused", "thing 3")
  mixed = {h.id for h in asks.ask("thing 0", picture(3), k=6)}
  assert mixed == {"id 0", "id 3"}


def test_one_modality(asks):
  for modality in ("image", "text", "fused"):
    hits = asks.ask("thing 2", k=9, modality=modality)
    assert [h.modality for h in hits] == [modality] * 4  # all that there are
    assert hits[0].id == "id 2"


def test_queries_that_are_none(asks, tmp_path):
  for arguments, said in (
    ({}, "ask with a text, a picture, or both"),
    ({"text": " \n"}, "ask with a text, a picture, or both"),
    ({"text": "thing 1", "k": 0}, "k=0: ask for at least one answer"),
    ({"text": "thing 1", "k": 10_001}, "k=10001: ask for no more than 10,000 answers"),
  ):
    with pytest.raises(UserError, match=said):
      asks.ask(**arguments)
  pictures_only = searcher(tmp_path / "index", modalities=(0,))
  assert pictures_only.modalities == ["image"]
  with pytest.raises(UserError, match="holds no text documents: it holds image"):
    pictures_only.ask("thing 1", modality="text")


def hit(**more):
  values = {"rank": 1, "score": 0.5, "row": 0, "id": "a", "modality": "text"}
  return Hit(**{**values, "text": "b", "image": None, **more})


def test_the_table_is_plain_text():
  text = search.table([hit(), hit(rank=2, id=STRANGE, text=STRANGE * 3)], width=80)
  assert all(len(line) <= 80 for line in text.splitlines())
  assert "\x1b" not in text
  assert "\x07" not in text
  assert "[red]it[/red]" in text.replace("\n", "")
  assert re.search(r"1\s+0.500\s+text\s+a\s+b", text)


def test_json_is_what_was_found(asks):
  hits = asks.ask("thing 2", k=2)
  assert json.loads(search.as_json(hits)) == [h._asdict() for h in hits]


def test_a_page_of_results(tmp_path):
  asks = searcher(tmp_path / "index", strange=True)
  (tmp_path / "pictures" / "0.png").unlink()
  (tmp_path / "pictures" / "1.png").write_bytes(b"no picture")
  hits = asks.ask("thing 2", k=99)
  page = results_page(
    asks, hits, text="<b>thing</b> 2", image=picture(2), modality="fused"
  )
  assert page.count("<li>") == 12
  assert page.count('src="data:image/jpeg;base64,') == 1 + 2 * 2
  assert page.count("its picture is not there any more") == 2 * 2
  assert "&lt;b&gt;thing" in page
  assert "<b>" not in page
  assert "<img src=x" not in page
  assert "12 answers among fused documents of index" in page
  assert str(tmp_path) not in page
  assert "default-src 'none'; img-src data:; style-src 'sha256-" in page


def test_a_part_of_the_served_page(asks):
  part = results_part(asks.ask("thing 2", k=3))
  assert set(re.findall(r'src="([^"]*)"', part)) == {"picture/6", "picture/8"}
  assert "Nothing was found" in results_part([])


def flags_of(monkeypatch, **given):
  values = {
    "index": "",
    "text": "",
    "image": "",
    "k": 10,
    "modality": None,
    "checkpoint": "",
    "step": "",
    "approximate": False,
    "json": False,
    "html": "",
    "serve": False,
    "host": "127.0.0.1",
    "port": 0,
  }
  assert not given.keys() - values.keys()
  monkeypatch.setattr(search, "_FLAGS", SimpleNamespace(**{**values, **given}))


def test_mistakes_are_said_before_a_model_is_loaded(tmp_path, monkeypatch):
  index = str(write_index(tmp_path / "index", modalities=(0,)))
  (tmp_path / "a.txt").write_text("a")
  there = tmp_path / "page.html"
  there.write_text("mine")
  for given, said in (
    ({}, "name an index: --index="),
    ({"index": index}, 'ask with --text="..."'),
    ({"index": index, "text": " "}, 'ask with --text="..."'),
    ({"index": str(tmp_path), "text": "a"}, "holds no index"),
    ({"index": index, "image": f"{tmp_path}/none.png"}, "none.png: no such file"),
    ({"index": index, "image": f"{tmp_path}/a.txt"}, "a.txt: not a picture in a known"),
    ({"index": index, "image": str(tmp_path)}, "is a folder: name a picture's file"),
    ({"index": index, "text": "a", "k": 0}, "k=0: ask for at least one"),
    ({"index": index, "text": "a", "modality": "text"}, "holds no text documents"),
    ({"index": index, "text": "a", "html": str(there)}, "is no page of ours"),
    ({"index": index, "text": "a", "serve": True}, "--serve takes its queries on its"),
    ({"index": index, "text": "a"}, "made by runs/fake, which cannot be opened"),
  ):
    flags_of(monkeypatch, **given)
    with pytest.raises(UserError, match=re.escape(said)):
      search.main()


def test_the_model_that_made_the_index(tmp_path, tiny_run, monkeypatch, capsys):
  from gcl_jax.retrieval import load
  from gcl_jax.retrieval.identity import identity

  model = identity(load(tiny_run, batch_size=1))
  about = {"checkpoint": str(tiny_run), "step": 2}
  mine = str(write_index(tmp_path / "mine", model=model, about=about))
  file = tmp_path / "query.png"
  picture(1).save(file)
  page = tmp_path / "page.html"
  flags_of(
    monkeypatch,
    index=mine,
    text="a red box",
    image=str(file),
    modality="image",
    k=2,
    json=True,
    html=str(page),
  )
  search.main()
  hits = json.loads(capsys.readouterr().out)
  assert [(h["rank"], h["modality"]) for h in hits] == [(1, "image"), (2, "image")]
  assert page.read_text().count("data:image/jpeg") == 3

  other = {**model, "weights": "0" * 64}
  theirs = write_index(tmp_path / "theirs", model=other, about=about)
  flags_of(monkeypatch, index=str(theirs), text="a red box")
  with pytest.raises(UserError, match=r"made by another model .*differs: weights"):
    search.main()
