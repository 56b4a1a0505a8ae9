"""Numbers by name, steps by name."""

import json
import shutil

import numpy as np
import pytest
from evaluation_fakes import records, segregated

from gcl_jax.checkpoints import Checkpoints
from gcl_jax.errors import UserError
from gcl_jax.evaluation import (
  best_metric,
  build_items,
  check_metric,
  choose_step,
  evaluate_nine,
  metric_names,
  scalars,
)


@pytest.fixture(scope="module")
def result():
  embed, _ = segregated(40)
  return evaluate_nine(build_items(records(40)), embed)


def test_a_path_picks_a_number(result):
  assert best_metric(result, "global.other.R@10") == 0
  assert best_metric(result, "plain.global.other.R@10") == 0
  assert best_metric(result, "centered.global.other.R@10") == 100
  assert best_metric(result, "local.other.R@1") == 100
  assert best_metric(result, "global.i->t.R@1") == 0
  assert best_metric(result, "global.it->it.R@1") == 100


def test_every_name_works(result):
  names = metric_names()
  assert len(names) == 2 * 11 * 4
  for name in names:
    for view in ("", "plain.", "centered."):
      check_metric(view + name)
      assert 0 <= best_metric(result, view + name) <= 100


@pytest.mark.parametrize("path", ["global.other.R@11", "global.othr.R@10", "loss", ""])
def test_an_unknown_name_says_the_nearest(path):
  with pytest.raises(UserError, match=r"did you mean .*global\.other\.R@10"):
    check_metric(path)


def test_a_metric_without_queries_or_view_is_refused():
  embed, _ = segregated(40)
  texts = evaluate_nine(build_items(records(40, views=0)), embed, center=False)
  with pytest.raises(UserError, match="no such queries"):
    best_metric(texts, "global.other.R@10")
  with pytest.raises(UserError, match="no such queries"):
    best_metric(texts, "global.i->t.R@10")
  with pytest.raises(UserError, match="computed only plain"):
    best_metric(texts, "centered.local.same.R@1")


def test_scalars_are_flat_numbers(result):
  flat = scalars(result)
  assert flat["plain.global.other.R@1"] == 0
  assert flat["plain.own_share.mean"] == 100
  assert flat["centered.gap.i-t"] == pytest.approx(0, abs=1e-6)
  assert all(isinstance(value, float) for value in flat.values())
  assert len(flat) == 2 * (16 + 4 + 3)


WRITTEN = "40.orbax-checkpoint-tmp-7"  # a live run is writing it


@pytest.fixture
def run(tmp_path, result):
  """A run's folder as far as choosing a step looks at it: steps 10, 20, 30."""

  checkpoints = Checkpoints(tmp_path, keep_last=3)
  for step in (10, 20, 30):
    checkpoints.save(step, {"weight": np.ones(3, np.float32)}, step)
  checkpoints.close()
  (tmp_path / "checkpoints" / WRITTEN).mkdir()
  (tmp_path / "results").mkdir()
  for step, score in ((0, 9.0), (10, 7.0), (20, 8.0), (30, 7.5)):
    stored = json.loads(json.dumps(result))
    stored["plain"]["global"]["other"]["R@10"] = score
    (tmp_path / "results" / f"{step:09d}.json").write_text(json.dumps(stored))
  return tmp_path


def test_steps_by_name(run):
  metric = "plain.global.other.R@10"
  assert choose_step(run, "latest", metric) == 30
  assert choose_step(run, "best", metric) == 20  # step 0 has no checkpoint
  assert choose_step(run, "10", metric) == 10
  assert choose_step(run, 10, metric) == 10
  for step in ("15", "first", "-1"):
    with pytest.raises(UserError, match="choose latest, best or one of 10, 20, 30"):
      choose_step(run, step, metric)


def test_choosing_writes_and_deletes_nothing(run):
  there = sorted(run.rglob("*"))
  assert run / "checkpoints" / WRITTEN in there
  choose_step(run, "best", "plain.global.other.R@10")
  assert sorted(run.rglob("*")) == there


def test_best_without_results_says_so(run):
  for path in (run / "results").iterdir():
    path.unlink()
  with pytest.raises(UserError, match="was evaluated while it trained"):
    choose_step(run, "best", "global.other.R@10")


def test_a_run_without_checkpoints_says_so(run):
  shutil.rmtree(run / "checkpoints")
  with pytest.raises(UserError, match="no whole checkpoint"):
    choose_step(run, "latest", "global.other.R@10")
