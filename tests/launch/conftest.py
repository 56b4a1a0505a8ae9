"""Stub commands on PATH: the launchers run as they are, the machines they talk to do not."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

# Stands for `python`: gcl_jax.train is $TRAIN, a script of the test's; all else is Python.
PYTHON = """#!/bin/sh
if [ "$1" = -m ] && [ "$2" = gcl_jax.train ]; then
  shift 2
  exec {python} "$TRAIN" "$@"
fi
exec {python} "$@"
"""


def _heed_the_keyboard() -> None:
  """Tests that run in the background ignore SIGINT, and so would all that they start."""
  signal.signal(signal.SIGINT, signal.SIG_DFL)


class Launches:
  """Runs launchers with stubs in place of what they call; the stubs keep a journal."""

  def __init__(self, folder: Path):
    self.folder = folder
    self.bin = folder / "bin"
    self.bin.mkdir()
    self.journal_file = folder / "journal"
    self.journal_file.touch()
    self.environment = {
      **os.environ,
      "PATH": f"{self.bin}:{os.environ['PATH']}",
      "JOURNAL": str(self.journal_file),
      "STUBS": str(folder),
      "XLA_FLAGS": "",
    }
    self.started: list[subprocess.Popen] = []
    self.stub("python", PYTHON.format(python=sys.executable))

  def stub(self, name: str, text: str) -> None:
    """A command; a text without a first line `#!` is Python."""
    path = self.bin / name
    if not text.startswith("#!"):
      text = f"#!{sys.executable} -SE\n{text}"
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)

  def train(self, text: str) -> None:
    """What gcl_jax.train does."""
    path = self.folder / "train.py"
    path.write_text(text)
    self.environment["TRAIN"] = str(path)

  def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
    process = subprocess.Popen(
      ["bash", ROOT / "launch" / script, *arguments],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={**self.environment, **environment},
      cwd=self.folder,
      start_new_session=True,
      preexec_fn=_heed_the_keyboard,
    )
    self.started.append(process)
    return process

  def run(self, script: str, *arguments: str, **environment: str):
    process = self.start(script, *arguments, **environment)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)

  def journal(self) -> list[str]:
    return self.journal_file.read_text().splitlines()

  def await_journal(self, line: str, times: int = 1) -> None:
    deadline = time.monotonic() + 20
    while self.journal().count(line) < times:
      assert time.monotonic() < deadline, self.journal()
      time.sleep(0.02)


@pytest.fixture
def launches(tmp_path) -> Iterator[Launches]:
  launches = Launches(tmp_path)
  yield launches
  for process in launches.started:  # what a failed test left running
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
      process.communicate()
