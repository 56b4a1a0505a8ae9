"""The loop with everything around it replaced: order of its acts, and when it stops."""

import itertools
import time
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gcl_jax.errors import Preempted, UserError
from gcl_jax.training.config import default_config
from gcl_jax.training.loop import run_loop


class Batches:
  def __init__(self, position=0):
    self.position = position

  def __iter__(self):
    return self

  def __next__(self):
    self.position += 4
    return {"rows": np.zeros(4)}

  texts_cut, longest = 0, 77

  def recent_errors(self):
    return ["photo 7: truncated"]


def state(step=0, bad=0, failed=-1):
  return {
    "step": jnp.int32(step),
    "bad_records": jnp.int32(bad),
    "failed_step": jnp.int32(failed),
  }


def loop(
  total,
  *,
  acts=None,
  start=0,
  bad_per_step=0,
  fails_at=None,
  stopped_at=None,
  records=1000,
  compiles_for=0.0,
  evaluates_for=0.0,
  written=None,
  **fields,
):
  config = default_config()
  config.batch_size, config.log.every, config.checkpoint.every = 4, 2, 3
  config.update_from_flattened_dict(fields)
  acts = [] if acts is None else acts
  asked = itertools.count(start + 1)

  def step(carried, batch, constants):
    number = int(carried["step"]) + 1
    acts.append(f"step {number}")
    time.sleep(compiles_for)
    step.compile_seconds += compiles_for
    failed = int(carried["failed_step"])
    if failed < 0 and fails_at == number:
      failed = number
    bad = int(carried["bad_records"]) + bad_per_step
    return state(number, bad, failed), {"loss": jnp.float32(1.0)}

  step.compile_seconds = 0.0

  def evaluate(_, number):
    acts.append(f"evaluate {number}")
    time.sleep(evaluates_for)

  def write(number, values):
    acts.append(f"write {number}")
    if written is not None:
      written[number] = values

  result = run_loop(
    state(start),
    config=config,
    total_steps=total,
    step_function=step,
    meter=types.SimpleNamespace(
      add=lambda batch: None, utilization=lambda seconds: {"mfu": 0.5}
    ),
    batches=Batches(start * 4),
    place=lambda batch: batch,
    constants={},
    checkpoints=types.SimpleNamespace(
      save=lambda number, _, position: acts.append(f"save {number} at {position}"),
      wait=lambda: acts.append("wait"),
    ),
    evaluate=evaluate,
    writer=types.SimpleNamespace(write=write),
    watch=lambda *_: None,
    stop=types.SimpleNamespace(asked=lambda: next(asked) == stopped_at),
    workdir=Path("nowhere"),
    records=records,
  )
  return result, acts


def test_a_stop_saves_the_step_and_evaluates_nothing():
  acts = []
  with pytest.raises(Preempted, match="step 4 is saved"):
    loop(9, acts=acts, stopped_at=4, **{"eval.every": 4})
  assert acts[-3:] == ["write 4", "save 4 at 16", "wait"]
  assert not any(act.startswith("evaluate") for act in acts)


@pytest.mark.parametrize("lost", ["compiles_for", "evaluates_for"])
def test_rates_leave_out_compilations_and_evaluations(lost):
  written = {}
  loop(3, written=written, **{lost: 0.2, "log.every": 1, "eval.every": 1})
  assert written.keys() == {1, 2, 3}
  # Four pairs in 0.2 seconds would be twenty a second.
  assert min(values["pairs_per_second"] for values in written.values()) > 100


def test_a_step_is_saved_before_it_is_evaluated_and_the_last_always():
  _, acts = loop(5, **{"eval.every": 4})
  assert acts == [
    "step 1",
    "step 2",
    "write 2",
    "step 3",
    "save 3 at 12",
    "step 4",
    "write 4",
    "save 4 at 16",
    "evaluate 4",
    "step 5",
    "write 5",
    "save 5 at 20",
    "evaluate 5",
    "wait",
  ]


def test_it_goes_on_from_the_state_s_own_step():
  _, acts = loop(5, start=3)
  assert [act for act in acts if act.startswith("step")] == ["step 4", "step 5"]
  assert "save 5 at 20" in acts


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4, 5])
def test_what_is_not_finite_is_never_saved_and_its_step_is_named(fails_at):
  acts = []
  with pytest.raises(UserError, match=f"not finite at step {fails_at};"):
    loop(6, acts=acts, fails_at=fails_at, **{"checkpoint.every": 1, "log.every": 6})
  saved = [act for act in acts if act.startswith("save")]
  assert len(saved) == fails_at - 1


def test_too_many_unreadable_records_stop_the_run_with_examples():
  with pytest.raises(UserError) as error:
    loop(100, bad_per_step=1, records=100)
  text = str(error.value)
  assert "2 of 8 records could not be read" in text
  assert "photo 7: truncated" in text
  assert "config.data.max_bad_fraction=0.01" in text


def test_few_unreadable_records_are_reported_after_the_epoch(capsys):
  loop(25, bad_per_step=1, records=40, **{"data.max_bad_fraction": 0.9})
  said = capsys.readouterr().err
  assert "epoch 1 done: 10 unreadable records so far" in said
  assert "epoch 2 done: 20" in said
  assert "\ndone: 25 unreadable" in said
  assert "texts" not in said


def test_texts_that_were_cut_are_counted(capsys, monkeypatch):
  monkeypatch.setattr(Batches, "texts_cut", 3)
  loop(2)
  said = capsys.readouterr().err
  assert (
    "done: cuts of texts in this process since it started: 3;" in said
    and "text_buckets has room for (77 tokens" in said
  )
