"""A user's mistake gets one message and exit code 2, before anything compiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from PIL import Image

from gcl_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def run(tool, *arguments):
  done = subprocess.run(
    [sys.executable, "-m", f"gcl_jax.{tool}", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
  ("tool", "arguments", "message"),
  [
    ("train", (), "name a recipe"),
    ("train", ("--config=configs/nope.py",), "configs/demo.py"),
    ("train", ("--config=configs/demo.py:foo",), "the variants are contrastive"),
    (
      "train",
      ("--config=configs/demo.py", "--config.loss.denominatr=literal"),
      '--config.loss.denominatr: there is no such field. Did you mean "denominator"?',
    ),
    (
      "train",
      ("--config=configs/demo.py", "--config.los.name=gcl"),
      'error: --config.los: there is no such field. Did you mean "loss"?\n',
    ),
    ("train", ("--config=configs/demo.py", "--config.steps=many"), "config.steps=many"),
    ("train", ("--config=configs/demo.py", "--workdr=x"), "workdr"),
    ("train", ("--config=configs/demo.py", "runs/x"), "'runs/x' is not a flag"),
    ("evaluate", (), "--checkpoint"),
    ("evaluate", ("--checkpoint=/nowhere", "--data=x"), "/nowhere"),
    ("evaluate", ("--checkpoint=tests/nope",), "tests/nope is no folder here"),
    ("evaluate", ("--checkpoint=x", "--output=gcl_jax"), "is a folder"),
    ("export", (), "--output"),
    ("export", ("--checkpoint=/nowhere", "--output=/tmp/out-of-nowhere"), "run.json"),
  ],
)
def test_flags(tool, arguments, message):
  code, output = run(tool, *arguments)
  assert code == 2, output
  assert message in output
  assert "Traceback" not in output


def recipe(name="demo", **fields):
  namespace: dict = {}
  path = ROOT / "configs" / f"{name}.py"
  exec(compile(path.read_text(), str(path), "exec"), namespace)
  config = namespace["get_config"]()
  config.data.scenes_train_size = 600
  config.update_from_flattened_dict(fields)
  return config


def refused(config, workdir, monkeypatch):
  """The message of a run that must end before a step is compiled."""
  from gcl_jax.train import train_and_evaluate
  from gcl_jax.training import run as run_module

  def compiled(*_, **__):
    raise AssertionError("a step was made: the mistake was found too late")

  monkeypatch.setattr(run_module, "make_step", compiled)
  with pytest.raises(UserError) as error:
    train_and_evaluate(config, Path(workdir))
  return str(error.value)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"batch_size": 12}, "config.batch_size is 12, which 8 devices cannot share"),
    ({"batch_size": 1024}, "600 records"),
    ({"optimizer.warmup_steps": 300}, "the run has only 300 steps"),
    ({"steps": 0, "epochs": 0.0}, "config.steps and config.epochs are both 0"),
    ({"loss.name": "sigmoid"}, "gcl, contrastive"),
    ({"loss.denominator": "all"}, "self_masked"),
    ({"loss.direction_weights": (1, 2)}, "3 rows of 3 weights"),
    ({"loss.form": "fast"}, "dense"),
    ({"loss.kernel": "cuda"}, "config.loss.kernel is 'cuda': it is one of xla, pallas"),
    ({"loss.kernel": "pallas", "loss.form": "dense"}, "'dense', which has no tiles"),
    ({"temperature.mode": "free"}, "learned, fixed"),
    ({"temperature.mode": "learned", "temperature.logit_scale": 150.0}, "1/tau"),
    ({"fusion.of": "cooked"}, "raw"),
    ({"model.dtype": "float16"}, "bfloat16"),
    ({"model.remat": "some"}, "none"),
    ({"optimizer.name": "sgd"}, "adamw"),
    ({"optimizer.multipliers": (("txt.*", 0.0),)}, "no parameter's path matches"),
    ({"data.source": "webdatasets"}, "scenes"),
    ({"data.eval_split": "tset"}, "tset"),
    ({"data.augment": "blur"}, "crop_flip"),
    ({"eval.best": "global.othr.R@10"}, "global.other.R@10"),
    ({"mesh.data": 3}, "config.mesh"),
    (
      {"mesh.data": 2, "mesh.tensor": 4, "model.hf.text_config.intermediate_size": 90},
      "config.mesh.tensor is 4, which does not divide the 90 of text/blocks/mlp/fc1",
    ),
    ({"log.every": 0}, "config.log.every is 0: it is at least 1"),
    ({"microbatches": 0}, "config.microbatches is 0: it is at least 1"),
    ({"microbatches": 3}, "3, which does not divide the 16 pairs of a device"),
    ({"accumulate_steps": 3}, "3, which does not divide the 16 pairs of a device"),
    (
      {"accumulate_steps": 4, "microbatches": 3},
      "the 4 pairs of a device (config.batch_size 128 over 8 devices in 4 parts): a batch "
      "of 96 would do",
    ),
    ({"lora.rank": 200}, "config.lora.rank is 200, but the vision tower's"),
    ({"lora.rank": 4, "lora.text": ("fc1",)}, "config.lora: there is no matrix 'fc1'"),
    ({"model.patch_dropout": 1.0}, "config.model.patch_dropout is 1.0"),
    ({"optimizer.warmup_steps": -1}, "config.optimizer.warmup_steps is -1"),
    (
      {"tokenizer.vocab_size": 100},
      "config.tokenizer.vocab_size is 100: it is at least 514",
    ),
    ({"init.vision_positions": -1.0}, "config.init.vision_positions is -1"),
    ({"log.wandb": "project"}, "pip install wandb"),
    ({"init.pretrained": "no/such-model"}, "Hugging Face hub"),
    ({"model.name": "ViT-B32", "data.source": "scenes"}, "ViT-B/32"),
    (
      {"loss.intra_modal_separation": 0.5, "loss.separation_features": "no.npy"},
      "no.npy",
    ),
  ],
)
def test_fields(fields, message, tmp_path, monkeypatch):
  text = refused(recipe(**fields), tmp_path / "run", monkeypatch)
  assert message in text


def test_a_work_folder_that_holds_something_else_is_left_alone(tmp_path, monkeypatch):
  (tmp_path / "thesis.tex").write_text("do not touch")
  text = refused(recipe(), tmp_path, monkeypatch)
  assert "holds something else (thesis.tex" in text
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_work_folder_below_a_file_is_refused(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  text = refused(recipe(), tmp_path / "file" / "run", monkeypatch)
  assert f"{tmp_path / 'file'} is a file" in text
  text = refused(recipe(), "gs://bucket/run", monkeypatch)
  assert "local or mounted" in text


def test_what_a_kill_left_of_a_first_file_does_not_block_the_next_start(tmp_path):
  from gcl_jax.checkpoints.folder import check_free

  (tmp_path / "run.json.part").write_text("{")
  (tmp_path / "processor").mkdir()
  check_free(tmp_path)


def write_folder(folder, pictures=40):
  folder.mkdir(parents=True, exist_ok=True)
  lines = []
  for k in range(pictures):
    Image.new("RGB", (20, 20), (k * 5, 99, 0)).save(folder / f"{k}.png")
    lines.append(json.dumps({"image": f"{k}.png", "captions": [f"picture {k}", "x"]}))
  (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
  return lines


def test_data_folders(tmp_path, monkeypatch):
  config = recipe("small", **{"batch_size": 8, "data.path": str(tmp_path / "no")})
  assert "no folder" in refused(config, tmp_path / "run", monkeypatch)
  (tmp_path / "empty").mkdir()
  config.data.path = str(tmp_path / "empty")
  assert "is empty" in refused(config, tmp_path / "run", monkeypatch)
  lines = write_folder(tmp_path / "broken")
  broken = "\n".join(line[:-9] if k % 3 else line for k, line in enumerate(lines))
  (tmp_path / "broken" / "captions.jsonl").write_text(broken)
  config.data.path = str(tmp_path / "broken")
  assert "captions.jsonl" in refused(config, tmp_path / "run", monkeypatch)
  assert not (tmp_path / "run").exists()


def test_the_two_ways_to_give_a_shape_are_not_mixed(tmp_path, monkeypatch):
  config = recipe(**{"init.pretrained": str(tmp_path), "model.name": "ViT-B/32"})
  text = refused(config, tmp_path / "run", monkeypatch)
  assert "config.model.name='ViT-B/32' shapes a model from scratch" in text


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path, monkeypatch):
  (tmp_path / "bert").mkdir()
  (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
  config = recipe(**{"init.pretrained": str(tmp_path / "bert")})
  assert "bert" in refused(config, tmp_path / "run", monkeypatch)


def test_a_recipe_touches_no_device(tmp_path):
  code = (
    "import jax; from gcl_jax import train;"
    "from gcl_jax.training.config import default_config; default_config();"
    "from jax._src import xla_bridge;"
    "assert not xla_bridge._backends, 'a device was touched'"
  )
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
  assert done.returncode == 0, done.stderr.decode()
  assert jax.device_count() == 8  # the tests above ran on a mesh of eight
