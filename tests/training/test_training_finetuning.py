"""LoRA, a moving average, patch dropout and parts: whole runs, stopped at every step."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from gcl_jax.sharding import make_mesh
from gcl_jax.training.config import default_config
from gcl_jax.training.run import train

STEPS = 2


def recipe(steps):
  config = default_config()
  tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
  tower["intermediate_size"] = 32
  config.model.hf.projection_dim = 16
  config.model.hf.vision_config = {**tower, "image_size": 32, "patch_size": 8}
  config.model.hf.text_config = {**tower, "max_position_embeddings": 24}
  config.update_from_flattened_dict(
    {
      "batch_size": 32,
      "steps": steps,
      "accumulate_steps": 2,
      "ema_decay": 0.5,
      "model.patch_dropout": 0.5,
      "lora.rank": 4,
      "lora.image": ("value", "mlp"),
      "lora.text": ("query",),
      "loss.name": "contrastive",
      "tokenizer.vocab_size": 520,
      "optimizer.schedule": "constant",
      "optimizer.learning_rate": 0.01,
      "optimizer.moment_dtype": "bfloat16",
      "data.source": "scenes",
      "data.scenes_train_size": 64,
      "data.scenes_image_size": 32,
      "data.text_buckets": (24,),
      "eval.before": False,
      "log.every": 1,
      "log.tensorboard": False,
    }
  )
  return config


def stored(workdir, step):
  """The whole state of a checkpoint, as bytes by path."""
  import orbax.checkpoint as ocp

  with ocp.PyTreeCheckpointer() as reader:
    state = reader.restore(
      workdir / "checkpoints" / str(step) / "state",
      args=ocp.args.PyTreeRestore(),
    )
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


class Runs(NamedTuple):
  straight: Path
  stopped: Path  # the same, stopped after every step
  evaluated: list[Any]  # the parameters that each evaluation was given


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
  straight, stopped = (tmp_path_factory.mktemp(name) / "run" for name in "ab")
  one = make_mesh(devices=jax.devices()[:1])  # the quickest to compile for
  evaluated = []

  def evaluate(model, params, processor, mesh, go_on):
    evaluated.append(jax.tree.map(np.asarray, params))
    return {}

  def go(steps, workdir):
    options = {"score": lambda _: 0.0, "summarize": dict}
    train(recipe(steps), workdir, evaluate=evaluate, **options)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("gcl_jax.training.run.make_mesh", lambda **_: one)
    go(STEPS, straight)
    for steps in range(1, STEPS + 1):
      go(steps, stopped)
  return Runs(straight, stopped, evaluated)


def test_a_run_stopped_at_every_step_ends_in_the_same_bits(runs):
  straight, stopped = (stored(workdir, STEPS) for workdir in runs[:2])
  assert straight.keys() == stopped.keys()
  for path, leaf in straight.items():
    assert leaf.tobytes() == stopped[path].tobytes(), path
  assert straight["step"] == STEPS
  assert any(path.startswith("ema/lora/vision") for path in straight)


def test_only_factors_and_the_scale_are_trained_averaged_and_stored_twice(runs):
  first, last = stored(runs.stopped, 1), stored(runs.straight, STEPS)
  for path in first:
    if path.startswith("params/"):
      moved = first[path].tobytes() != last[path].tobytes()
      assert moved == path.startswith(("params/lora/", "params/logit_scale")), path
  averaged = {path for path in last if path.startswith("ema/")}
  assert {path.split("/")[1] for path in averaged} == {"lora", "logit_scale"}
  assert "ema/lora/text/blocks/attention/query/a" in averaged
  assert "ema/lora/text/blocks/attention/key/a" not in averaged


def test_what_is_evaluated_read_and_exported_is_the_merged_average(runs, tmp_path):
  from gcl_jax.checkpoints import read_run
  from gcl_jax.checkpoints.export import export_run
  from gcl_jax.models import read_pretrained

  state = stored(runs.straight, STEPS)
  _, params, _, _ = read_run(runs.straight)
  assert params.keys() == {
    "vision",
    "text",
    "image_projection",
    "text_projection",
    "logit_scale",
  }
  place = "vision/blocks/mlp/fc1"
  a, b = (state[f"ema/lora/{place}/{factor}"].astype(np.float64) for factor in "ab")
  want = state[f"params/{place}/kernel"] + 16.0 / 4 * a @ b
  got = params["vision"]["blocks"]["mlp"]["fc1"]["kernel"]
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
  assert np.abs(got - state[f"params/{place}/kernel"]).max() > 1e-4
  assert params["logit_scale"] == state["ema/logit_scale"]
  folder = export_run(runs.straight, tmp_path / "hf")
  _, _, exported = read_pretrained(folder)  # plain CLIP: a further key is an error
  jax.tree.map(np.testing.assert_array_equal, exported, params)
  for evaluated in (runs.evaluated[0], runs.evaluated[-1]):
    jax.tree.map(np.testing.assert_array_equal, evaluated, params)
