"""What a comparison of losses runs, and how its rows are called."""

from types import SimpleNamespace

import pytest

from benchmarks import losses_compared
from benchmarks.losses_compared import LOSSES, configure
from gcl_jax.errors import UserError
from gcl_jax.training.config import default_config


def recipe(features="none", separation=0.0):
  config = default_config()
  config.loss.separation_features = features
  config.loss.intra_modal_separation = separation
  return config


@pytest.mark.parametrize("name", LOSSES)
def test_only_separation_separates(name):
  given = recipe("tfidf.npy", separation=0.25)
  _, config = configure(given, name, 3)
  assert config.loss.intra_modal_separation == (0.5 if "separation" in name else 0.0)
  assert config.loss.name == ("gcl" if name.startswith("GCL") else "contrastive")
  assert config.seed == 3
  assert (given.seed, given.loss.intra_modal_separation) == (0, 0.25)


@pytest.mark.parametrize(
  ("features", "name", "label", "folder"),
  [
    ("x/tfidf.npy", "CL+separation", "(tfidf.npy)", "-tfidf.npy"),
    ("initial_text_tower", "CL+separation", "(initial_text_tower)", None),
    ("x/tfidf.npy", "CL+image_separation", "(image only)", "-image-only"),
  ],
)
def test_a_separation_row_names_its_features(features, name, label, folder):
  said, config = configure(recipe(features), name, 0)
  assert said == f"CL+separation {label}"
  assert config.name == "CL+separation" + (folder or "-initial_text_tower")
  assert (config.loss.separation_features == "none") == (label == "(image only)")


def test_separation_without_features_is_refused():
  with pytest.raises(UserError, match=r"CL\+separation needs .*separation_features"):
    configure(recipe(), "CL+separation", 0)
  with pytest.raises(UserError, match="'cl' is none of CL, "):
    configure(recipe(), "cl", 0)


def test_a_run_that_starts_from_another():
  label, config = configure(recipe(), "GCL", 2, root="runs", start_from="CL")
  assert label == "CL, then GCL"
  assert config.name == "CL-then-GCL"
  assert config.init.pretrained == "runs/CL-seed2"


def test_rows_hold_the_steps_that_were_run(monkeypatch, tmp_path):
  means = {"other": {"se": {"R@1": 0.5, "R@10": 1.5}}, "same": {"se": {"R@10": 1.0}}}
  view = {"local": means, "global": means}
  view |= {"gap": {"delta": {"i-t": 0.5}}, "own_share": {"mean": 40.0}}
  monkeypatch.setattr(
    "gcl_jax.train.train_and_evaluate",
    lambda config, workdir: (True, {"after": {"plain": view, "centered": view}}),
  )
  monkeypatch.setattr(
    "gcl_jax.checkpoints.read_description",
    lambda workdir: SimpleNamespace(steps=77 if workdir.name == "CL-seed1" else 0),
  )
  monkeypatch.setattr("gcl_jax.evaluation.best_metric", lambda result, name: 50.0)
  flags = SimpleNamespace(config=recipe(), root=tmp_path, start_from="")
  monkeypatch.setattr(losses_compared, "_FLAGS", flags)
  rows = losses_compared._run("CL", 1, with_start=False)
  assert [(row["variant"], row["steps"]) for row in rows] == [
    ("plain", 77),
    ("centered", 77),
  ]
  text = losses_compared.table(rows)
  assert "| CL, centred | 50.0 |" in text
  assert "| two standard errors of a run | 1.0 | 3.0 | 2.0 | 1.0 | 3.0 | 2.0 |" in text


@pytest.mark.parametrize("mimic", ["", "+mimic"])
@pytest.mark.parametrize("inherit", ["", "+inherit"])
def test_a_teacher_serves_the_runs_that_name_it(mimic, inherit):
  given = recipe()
  given.distill.teacher, given.init.inherit = "old", "older"
  label, config = configure(given, f"GCL{mimic}{inherit}", 0)
  assert label == config.name == f"GCL{mimic}{inherit}"
  assert config.distill.teacher == ("old" if mimic else "")
  assert config.init.inherit == ("older" if inherit else "")
  with pytest.raises(UserError, match=r"needs --config.distill.teacher"):
    configure(recipe(), "GCL+mimic", 0)
