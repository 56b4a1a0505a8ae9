"""One process needs nobody; a stop is heard; half of a description is refused."""

import os
import signal
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
  """A coordination service that two processes share."""

  def __init__(self):
    self.kept = {"gcl_jax/width/0/1": "9", "gcl_jax/width/1/1": "2"}
    self.deleted = []

  def key_value_set(self, key, value):
    self.kept[key] = value

  def blocking_key_value_get(self, key, timeout):
    return self.kept[key]

  def key_value_delete(self, key):
    del self.kept[key]
    self.deleted.append(key)


def test_the_largest_of_two_round_by_round(monkeypatch):
  service = Service()
  monkeypatch.setattr(
    distributed, "global_state", types.SimpleNamespace(client=service)
  )
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  largest = processes.Largest("width")
  assert [largest(number) for number in (4, 7)] == [9, 7]
  assert service.deleted == ["gcl_jax/width/0/0"]  # what both have read
  assert service.kept["gcl_jax/width/1/0"] == "7"
