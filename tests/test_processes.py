"""One process needs nobody; a stop is heard; half of a description is refused."""

import collections
import os
import signal
import subprocess
import sys
import types

import jax
import pytest
from jax._src import distributed

from gcl_jax import processes
from gcl_jax.errors import UserError


def test_one_process_waits_for_nobody():
  processes.barrier("alone")
  largest = processes.Largest("alone")
  assert [largest(number) for number in (3, 1)] == [3, 1]
  assert processes.is_first()


def test_a_stop_is_heard_only_inside_and_once_is_enough():
  before = signal.getsignal(signal.SIGTERM)
  with processes.Stop() as stop:
    assert not stop.asked()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked()
    assert stop.asked()
  assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (("host:1", 0, -1), "go together"),
    (("", 2, 0), "go together"),
    (("host:1", 2, 2), "--process_id is 2 of --processes=2: it counts from 0"),
  ],
)
def test_half_a_description_is_refused(given, message, monkeypatch):
  monkeypatch.setattr(jax.distributed, "initialize", None)
  with pytest.raises(UserError, match=message):
    processes.join(*given)


def test_where_there_is_no_cluster_it_says_how_to_describe_one(monkeypatch):
  def fail():
    raise ValueError("coordinator_address should be defined.\nmore")

  monkeypatch.setattr(jax.distributed, "initialize", fail)
  with pytest.raises(UserError, match=r"should be defined.\)\. Outside a TPU pod"):
    processes.join()


class Service:
  """A coordination service, and what the other process has told it."""

  def __init__(self, **told):
    self.kept = {f"gcl_jax/{name}": value for name, value in told.items()}
    self.deleted = []

  def key_value_set(self, key, value):
    assert key not in self.kept
    self.kept[key] = value

  def blocking_key_value_get(self, key, timeout):
    return self.kept[key]

  def key_value_delete(self, key):
    self.deleted.append(key)


@pytest.fixture
def service(monkeypatch):
  service = Service()
  state = types.SimpleNamespace(client=service, num_processes=2)
  monkeypatch.setattr(distributed, "global_state", state)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes.Largest, "_used", collections.Counter())
  return service


def test_the_first_process_answers_round_by_round(service, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 0)
  service.kept |= {"gcl_jax/width/0/0/1": "9", "gcl_jax/width/0/1/1": "2"}
  largest = processes.Largest("width")
  assert [largest(number) for number in (4, 7)] == [9, 7]
  assert service.kept["gcl_jax/width/0/1/answer"] == "7"
  assert service.deleted == ["gcl_jax/width/0/0"]  # what both have read
  service.kept["gcl_jax/width/1/0/1"] = "5"
  unused, other = processes.Largest("width"), processes.Largest("width")
  assert other(4) == 5  # keys of its own, by first use
  del unused


def test_another_process_tells_and_listens(service, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  service.kept["gcl_jax/width/0/0/answer"] = "9"
  assert processes.Largest("width")(4) == 9
  assert service.kept["gcl_jax/width/0/0/1"] == "4"
  assert not service.deleted


def test_one_of_several_leaves_at_once(service):
  assert processes.is_one_of_several()
  code = (
    "import atexit, os\n"
    "from gcl_jax.processes import leave\n"
    "atexit.register(print, 'waited')\n"
    "print('said')\n"
    "leave(2)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (2, "said\n")
