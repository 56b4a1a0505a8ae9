"""A run with a frozen teacher: the step's arithmetic, a whole run, and what it refuses."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import objective_cases
import pytest
from ahead_cases import tiny_config

from gcl_jax.errors import UserError
from gcl_jax.losses import affinity_loss
from gcl_jax.processing import ImageProcessor, Tokenizer
from gcl_jax.sharding import batch_sharding, make_mesh
from gcl_jax.training import ahead
from gcl_jax.training.config import default_config
from gcl_jax.training.objective import make_objective
from gcl_jax.training.start import model_from_config

ROOT = Path(__file__).resolve().parents[2]


def distilled(devices, its, config=None):
  """Loss, metrics and gradients of a batch of 32 under a teacher with these parameters."""
  config = config or default_config()
  mesh = make_mesh(devices=jax.devices()[:devices])
  images = ImageProcessor.from_dict(objective_cases._IMAGES)
  model = objective_cases.Model()
  function = make_objective(model, images, config, mesh, (model, images))
  batch = jax.device_put(objective_cases.batch(32), batch_sharding(mesh))
  (loss, metrics), gradients = jax.jit(jax.value_and_grad(function, has_aux=True))(
    objective_cases.params(), batch, {"teacher_params": its}
  )
  return loss, metrics, gradients


def teachers():
  rng = np.random.default_rng(8)
  return jax.tree.map(
    lambda leaf: np.float32(leaf + 0.5 * rng.normal(size=leaf.shape)),
    objective_cases.params(),
  )


def test_the_two_losses_are_added_with_their_weights():
  found = {}
  for own, weight in ((1.0, 0.0), (0.0, 1.0), (0.5, 3.0)):
    config = default_config()
    config.distill.loss_weight, config.distill.weight = own, weight
    found[own, weight] = distilled(1, teachers(), config)
  plain, mimicry, both = found.values()
  assert plain[0] != mimicry[0]
  np.testing.assert_allclose(both[0], 0.5 * plain[0] + 3 * mimicry[0], rtol=1e-6)
  assert mimicry[0] == mimicry[1]["loss/affinity"] == plain[1]["loss/affinity"]
  added = jax.tree.map(lambda x, y: 0.5 * x + 3 * y, plain[2], mimicry[2])
  objective_cases.assert_near(both[2], added)


def test_nothing_is_learned_of_a_teacher_who_knows_the_same():
  config = default_config()
  config.distill.loss_weight = 0.0
  own, other = objective_cases.params(), teachers()
  *_, nothing = distilled(1, own, config)
  *_, something = distilled(1, other, config)
  for x, y in zip(jax.tree.leaves(nothing), jax.tree.leaves(something), strict=True):
    assert np.abs(x).max() < 1e-5 * np.abs(y).max()


def test_the_teachers_scale_and_directions_are_the_configs():
  config = default_config()
  config.distill.loss_weight = 0.0
  config.distill.direction_weights = (0, 2, 0, 0, 0, 0, 0, 0, 0)
  config.distill.logit_scale = 3.0
  loss, *_ = distilled(1, teachers(), config)
  batch = objective_cases.batch(32)
  images = ImageProcessor.from_dict(objective_cases._IMAGES)
  present = {name: batch[name] for name in ("has_image", "has_text")}
  banks = []
  for params in (objective_cases.params(), teachers()):
    image, text, mix = (
      objective_cases.Model()
      .bind(params)
      .embed_pair(images.normalize(batch["pixels"]), batch["tokens"], **present)
    )
    banks.append((image, text, mix.alpha[:, None] * image + mix.beta[:, None] * text))
  want, _ = affinity_loss(
    *banks[0],
    *banks[1],
    logit_scale=np.exp(2.0),
    teacher_scale=3.0,
    direction_weights=np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0]]),
    **present,
    form="dense",
  )
  np.testing.assert_allclose(loss, want, rtol=1e-5)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_eight_devices_and_microbatches_are_one_device(microbatches):
  config = default_config()
  config.microbatches = microbatches
  want_loss, want_metrics, want = distilled(1, teachers())
  loss, metrics, gradients = distilled(8, teachers(), config)
  np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
  np.testing.assert_allclose(
    metrics["loss/affinity"], want_metrics["loss/affinity"], rtol=1e-5
  )
  objective_cases.assert_near(gradients, want)


def recipe(teacher, steps, **fields):
  namespace: dict = {}
  path = ROOT / "configs" / "demo.py"
  exec(compile(path.read_text(), str(path), "exec"), namespace)
  config = namespace["get_config"]()
  config.update_from_flattened_dict(
    {
      "model.hf.vision_config.num_hidden_layers": 1,
      "model.hf.text_config.num_hidden_layers": 1,
      "batch_size": 32,
      "steps": steps,
      "optimizer.warmup_steps": 0,
      "data.scenes_train_size": 64,
      "eval.max_items": 16,
      "eval.before": False,
      "log.every": 1,
      "log.tensorboard": False,
      "distill.teacher": str(teacher),
      **fields,
    }
  )
  return config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  from gcl_jax.train import train_and_evaluate

  folder = tmp_path_factory.mktemp("teacher") / "run"
  deeper = {"model.hf.vision_config.num_hidden_layers": 2}
  train_and_evaluate(recipe("", 1, **deeper), folder)
  return folder


def test_a_student_inherits_mimics_and_goes_on_without_its_teacher(teacher, tmp_path):
  from gcl_jax.checkpoints import read_run
  from gcl_jax.train import train_and_evaluate
  from gcl_jax.training.weights import read_weights

  moved, run = tmp_path / "teacher", tmp_path / "run"
  shutil.copytree(teacher, moved)
  fields = {"init.inherit": str(moved), "optimizer.schedule": "constant"}
  train_and_evaluate(recipe(moved, 1, **fields), run)
  its, kept = read_weights(str(moved)), read_weights(str(run / "teacher"))
  for x, y in zip(
    jax.tree.leaves(its.params), jax.tree.leaves(kept.params), strict=True
  ):
    np.testing.assert_array_equal(x, y)
  train_and_evaluate(recipe(moved, 2, **fields), tmp_path / "whole")
  shutil.rmtree(moved)
  train_and_evaluate(recipe(moved, 2, **fields), run)
  lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
  found = [line["loss/affinity"] for line in lines if "loss" in line]
  assert len(found) == 2
  assert np.isfinite(found).all()
  model, params, processor, _ = read_run(run)
  assert processor.tokenizer.reads_like(its.processor.tokenizer)
  assert (model.config.vision.layers, its.config.vision.layers) == (1, 2)
  ours, theirs = (
    np.asarray(x["text"]["token_embedding"]["embedding"]) for x in (params, its.params)
  )
  whole = read_run(tmp_path / "whole")[1]
  for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(x, y)  # stopped after a step, or never
  # Two steps from where it began, which was the teacher.
  assert 0 < np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"distill.teacher": "nowhere/at/all"}, "there is no folder nowhere/at/all"),
    ({"model.hf.vision_config.image_size": 32}, "sees 64 pixels a side and this.* 32"),
    ({"init.inherit": "nowhere/at/all"}, "there is no folder nowhere/at/all"),
    ({"distill.weight": -1.0}, "config.distill.weight is -1"),
    ({"distill.weight": float("inf")}, "config.distill.weight is inf"),
    ({"distill.weight": 0.0, "distill.loss_weight": 0.0}, "both 0: nothing would be"),
    (
      {"distill.direction_weights": ((0, 1, float("nan")), (1, 0, 1), (1, 1, 0))},
      r"config.distill.direction_weights is .*nan",
    ),
    ({"distill.direction_weights": (1, 2)}, r"config.distill.direction_weights is \(1"),
    (
      {"init.inherit": "SAME", "model.hf.text_config.num_hidden_layers": 3},
      "text.layers is 3 here, more than the larger",
    ),
    (
      {"init.inherit": "SAME", "init.pretrained": "SAME", "model.hf": {}},
      "has them: set one of the two",
    ),
  ],
)
def test_what_does_not_fit_is_refused(fields, message, teacher, tmp_path):
  from gcl_jax.train import train_and_evaluate

  fields = {k: str(teacher) if v == "SAME" else v for k, v in fields.items()}
  config = recipe(teacher, 1)
  config.update_from_flattened_dict(fields)
  with pytest.raises(UserError, match=message):
    train_and_evaluate(config, tmp_path / "run")


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize(
  "field", ["distill.teacher", "init.inherit", "init.pretrained"]
)
def test_another_vocabulary_is_refused(teacher, tmp_path, exported, field):
  from gcl_jax.checkpoints.export import export_run
  from gcl_jax.train import train_and_evaluate

  Tokenizer.train(["other words"], 520, 32).save(tmp_path / "words")
  elder = export_run(teacher, tmp_path / "hf") if exported else teacher
  config = recipe("", 1, **{"tokenizer.path": str(tmp_path / "words")})
  config.update_from_flattened_dict({field: str(elder)})
  with pytest.raises(UserError, match="another vocabulary"):
    train_and_evaluate(config, tmp_path / "run")
  assert not (tmp_path / "run" / "run.json").exists()


def test_the_step_with_a_teacher_compiles_from_shapes_alone():
  config = tiny_config()
  model = model_from_config(config)
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  step, arguments = ahead.step_and_shapes(config, model, mesh, model)
  alone, _ = ahead.step_and_shapes(config, model, mesh)
  with_teacher = step.lower(*arguments)
  assert "teacher_params" in arguments[2]
  flops = with_teacher.compile().cost_analysis()["flops"]
  plain = alone.lower(*arguments[:2], {}).compile().cost_analysis()["flops"]
  assert flops > 1.2 * plain
