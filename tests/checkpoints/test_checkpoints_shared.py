"""What several processes see in one run's folder."""

import dataclasses
import json
import time

import pytest

from gcl_jax.checkpoints import read_contents, shared, wait_for_run
from gcl_jax.errors import UserError


@dataclasses.dataclass
class First:
  """What process 0 says, and what it does while another one waits."""

  says: str = ""
  does: object = None


@pytest.fixture
def first(monkeypatch):
  first = First()
  monkeypatch.setattr(shared, "told_by_first", lambda name, text: first.says or text)

  def sleep(seconds):
    if first.does:
      first.does()

  monkeypatch.setattr(time, "sleep", sleep)
  return first


def write_result(folder, step):
  (folder / "results").mkdir(exist_ok=True)
  (folder / "results" / f"{step}.json").write_text(json.dumps({"score": step}))


def test_a_folder_that_is_no_run_yet_holds_nothing(tmp_path, first):
  assert read_contents(tmp_path / "none") == (None, [], {})


def test_a_process_waits_for_what_the_first_one_sees(tmp_path, first):
  there, here = tmp_path / "there", tmp_path / "here"
  for folder in (there, here):
    folder.mkdir()
  write_result(there, 4)
  first.says = shared._look(there)[1]
  first.does = lambda: write_result(here, 4)
  assert read_contents(here).results == {4: {"score": 4}}


def test_a_process_that_sees_another_folder_says_so(tmp_path, first):
  write_result(tmp_path, 4)
  first.says = shared._look(tmp_path / "elsewhere")[1]
  with pytest.raises(UserError, match=r"else than process 0 in .*all machines share"):
    read_contents(tmp_path, patience=0.01)


def test_what_one_process_does_not_see_stops_all(tmp_path, first, monkeypatch):
  monkeypatch.setattr(shared, "Largest", lambda name: lambda number: 1)
  with pytest.raises(UserError, match="another process sees something else than"):
    read_contents(tmp_path)


def test_a_new_run_is_waited_for(tmp_path, first):
  with pytest.raises(UserError, match=r"sees no run\.json from process 0 in .*share"):
    wait_for_run(tmp_path, patience=0.01)
  first.does = lambda: (tmp_path / "run.json").write_text("{}")
  wait_for_run(tmp_path)
