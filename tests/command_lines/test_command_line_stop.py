"""What a command line says when the keyboard stops it."""

import pytest
from absl import app

from gcl_jax import command_line, processes
from gcl_jax.errors import Preempted, UserError


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


@pytest.mark.parametrize(
  ("raised", "code"),
  [(UserError("mend it"), 2), (RuntimeError("a bug"), 1), (KeyboardInterrupt(), 130)],
)
def test_one_of_several_that_fails_leaves_at_once(raised, code, monkeypatch, capsys):
  def main():
    raise raised

  monkeypatch.setattr(app, "run", lambda main, flags_parser: main([]))
  monkeypatch.setattr(processes, "is_one_of_several", lambda: True)
  left = []
  monkeypatch.setattr(processes, "leave", left.append)
  with pytest.raises((SystemExit, RuntimeError)):
    command_line.run(main)
  assert left == [code]
  assert ("RuntimeError: a bug" in capsys.readouterr().err) == (code == 1)


def test_one_that_is_told_to_stop_ends_with_the_others(monkeypatch, capsys):
  def main():
    raise Preempted("step 4 is saved")

  monkeypatch.setattr(app, "run", lambda main, flags_parser: main([]))
  monkeypatch.setattr(processes, "is_one_of_several", lambda: True)
  monkeypatch.setattr(processes, "leave", None)
  with pytest.raises(SystemExit) as stopped:
    command_line.run(main)
  assert stopped.value.code == command_line.RESTART_ME == 75
  assert "step 4 is saved" in capsys.readouterr().err


def test_by_default_nothing_goes_on(monkeypatch, capsys):
  monkeypatch.setattr(app, "run", lambda main, flags_parser: main([]))
  with pytest.raises(SystemExit):
    command_line.run(interrupted)
  assert capsys.readouterr().err == "\nstopped\n"
