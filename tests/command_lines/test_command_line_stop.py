"""What a command line says when the keyboard stops it."""

import pytest
from absl import app

from gcl_jax import command_line


def interrupted():
  raise KeyboardInterrupt


@pytest.mark.parametrize("resumable", [True, False])
def test_only_what_can_go_on_says_that_it_goes_on(resumable, monkeypatch, capsys):
  monkeypatch.setattr(app, "run", lambda main, flags_parser: main([]))
  with pytest.raises(SystemExit) as stopped:
    command_line.run(interrupted, resumable=resumable)
  assert stopped.value.code == 130
  said = capsys.readouterr().err
  assert said.startswith("\nstopped")
  assert ("goes on where it was saved" in said) == resumable


def test_by_default_nothing_goes_on(monkeypatch, capsys):
  monkeypatch.setattr(app, "run", lambda main, flags_parser: main([]))
  with pytest.raises(SystemExit):
    command_line.run(interrupted)
  assert capsys.readouterr().err == "\nstopped\n"
