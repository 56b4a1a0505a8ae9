"""Pruned TinyCLIPs and ResNets through a whole run: trained, resumed, exported, reread."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
import native_cases as cases

from gcl_jax.errors import UserError
from gcl_jax.models import build, named_config, read_model
from gcl_jax.models.lora import lora_shapes
from gcl_jax.models.native import native_config
from gcl_jax.sharding import PARAMETER_RULES, map_with_path, shardings
from gcl_jax.training import run
from gcl_jax.training.config import default_config
from gcl_jax.training.depth import depth_factors
from gcl_jax.training.flops import pair_flops
from gcl_jax.training.objective import make_objective


def weights(kind, path):
  """A file of weights, small enough to train."""
  import torch

  if kind == "pruned":
    plan = {
      "visual.transformer": {"hidden": range(3, 103), "heads": [[0, 1], [1]]},
      "transformer": {"hidden": range(60), "heads": [[], [0, 1]]},
    }
    plan["visual.transformer"]["mlps"] = [list(range(8, 64)), None]
    plan["transformer"]["mlps"] = [list(range(40)), list(range(100, 150))]
    for cut in plan.values():
      cut["hidden"] = list(cut["hidden"])
    state = cases.pruned(cases.vit(width=128, grid=2), plan)
  else:
    state = cases.resnet(width=4, stages=(1, 1, 1, 1), grid=1)
  torch.save(cases.tinyclip_keys(state), path)
  cases.tokenizer_folder(path.parent)
  return state


def recipe(path, mesh):
  config = default_config()
  config.init.pretrained = str(path)
  config.data.source = "scenes"
  config.data.scenes_train_size = config.batch_size = 16
  config.steps, config.log.every = 2, 1
  config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-3, 0
  config.checkpoint.every = 1
  config.eval.before = False
  config.log.tensorboard = False
  config.mesh.update(mesh)
  return config


def losses(folder):
  lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  return [line["loss"] for line in lines if "loss" in line]


def train(config, folder):
  """A run without evaluations, which compile for longer than the step does."""
  run.train(
    config,
    folder,
    evaluate=lambda *_: {},
    score=lambda result: 0.0,
    summarize=lambda result: {},
  )


@pytest.fixture(
  scope="module", params=["pruned", pytest.param("resnet", marks=pytest.mark.slow)]
)
def trained(request, tmp_path_factory):
  """Two steps with parameters split over all axes."""
  root = tmp_path_factory.mktemp(request.param)
  weights(request.param, root / "tiny.pt")
  train(recipe(root / "tiny.pt", {"data": 2, "fsdp": 2, "tensor": 2}), root / "run")
  return request.param, root


@pytest.mark.slow
def test_devices_change_nothing(trained):
  _, root = trained
  train(recipe(root / "tiny.pt", {"data": 8}), root / "other")
  found = losses(root / "run"), losses(root / "other")
  assert len(found[0]) == 2
  np.testing.assert_allclose(*found, rtol=1e-5)


def test_all_moves_but_what_is_constant(trained):
  from gcl_jax.checkpoints import read_run

  kind, root = trained
  before, after = read_model(root / "tiny.pt").params, read_run(root / "run")[1]
  moved = {}
  map_with_path(lambda path, leaf: moved.update({path: leaf}), after)

  def compare(path, leaf):
    same = np.array_equal(leaf, moved[path])
    assert same == path.endswith(("/mean", "/var")), path

  map_with_path(compare, before)
  if kind == "pruned":  # and what is beyond a layer's own size is still exactly zero
    kernel = moved["vision/blocks/attention/query/kernel"]
    assert kernel[0].all() and not kernel[1][:, 64:].any()
    assert not moved["text/blocks/attention/out/kernel"][0].any()
    assert not moved["text/blocks/mlp/fc2/kernel"][0][40:].any()


def test_a_run_is_embedded_exported_and_read_again(trained, tmp_path):
  import gcl_jax
  from gcl_jax.checkpoints.export import export_run

  _, root = trained
  image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
  from PIL import Image

  documents = {"images": [Image.fromarray(image), None], "texts": ["a dot", "two dots"]}
  want = gcl_jax.load(root / "run").embed(**documents)
  folder = export_run(root / "run", tmp_path / "out")
  loaded = gcl_jax.load(folder)
  assert loaded.config == gcl_jax.load(root / "tiny.pt").config
  np.testing.assert_allclose(loaded.embed(**documents), want, atol=1e-6)
  # The card's own lines, in PyTorch.
  card = (folder / "README.md").read_text()
  code = card.split("```python\n")[1].split("```")[0]
  Image.fromarray(image).save(folder / "picture.jpg", quality=100, subsampling=0)
  code = code.replace('"."', repr(str(folder)))
  code = code.replace('"picture.jpg"', repr(str(folder / "picture.jpg")))
  code = code.replace('["a caption"]', '["a dot"]')
  scope = {}
  sys.path.insert(0, str(folder))
  try:
    exec(code, scope)
  finally:
    sys.path.remove(str(folder))
    sys.modules.pop("pytorch_clip", None)
  fused = loaded.embed(images=[str(folder / "picture.jpg")], texts=["a dot"])
  np.testing.assert_allclose(scope["fused"].numpy(), fused, atol=2e-5)


def test_a_folder_with_an_export_may_be_exported_to_again(trained, tmp_path):
  from gcl_jax.checkpoints.export import check_output, export_run

  _, root = trained
  check_output(export_run(root / "run", tmp_path / "out"))


def uneven_config(path):
  """The shape of `cases.uneven`, by its tensors."""
  state = cases.pruned(*cases.uneven())
  shapes = {key: tuple(value.shape) for key, value in state.items()}
  return native_config(shapes, str(path), act="gelu", pruned=True)


@pytest.mark.parametrize("name", ["TinyCLIP-ResNet-19M-Text-19M", "pruned"])
def test_flops_of_a_pair_are_those_of_its_products(name, tmp_path):
  if name == "pruned":
    config = uneven_config(tmp_path / "tiny.pt")
    vision = 10 * 152 * (2 * (3 + 1) * 4 * 64 / 2 + 2 * (300 + 77))
    vision += 2 * (3 + 1) * 64 * 10 * 10  # scores and mixtures
    vision += 9 * 192 * 152 + 152 * 24
    text = 16 * 90 * (4 * 64 * (2 + 4 + 1) + 2 * (55 + 0 + 200))
    text += 2 * (2 + 4 + 1) * 64 * 16 * 16 + 90 * 24
    want = 6 * (vision + text)
    assert pair_flops(build(config), 16) == want
  else:
    config = named_config(name)
    found = pair_flops(build(config), 77)
    # The release's table has 4.4 G multiply-adds for an image and a text. It counts the
    # pool for every one of its 50 places, of which one is read, and computed here.
    width = config.vision.features
    others = 49 * (width**2 + width * 1024 + 2 * 50 * width)
    assert found / 6 + others == pytest.approx(4.4e9, rel=0.01)


@pytest.mark.parametrize(
  "name, count",
  [
    ("TinyCLIP-ResNet-19M-Text-19M", 63_372_703),
    ("TinyCLIP-ResNet-30M-Text-29M", 83_816_869),
  ],
)
def test_named_resnets_are_the_releases(name, count):
  from gcl_jax.sharding import make_mesh

  shapes = build(named_config(name)).abstract()
  total = 0

  def add(path, leaf):
    nonlocal total
    total += 0 if path.endswith(("/mean", "/var")) else leaf.size

  map_with_path(add, shapes)
  assert total == count
  shardings(make_mesh(data=1, fsdp=8), shapes, PARAMETER_RULES)  # all covered, all fit


def test_first_values_of_a_resnet():
  import dataclasses

  config = named_config("TinyCLIP-ResNet-19M-Text-19M")
  vision = dataclasses.replace(config.vision, width=8, heads=4, image_size=64)
  text = dataclasses.replace(config.text, layers=1, width=64, heads=1, vocab_size=99)
  model = build(dataclasses.replace(config, vision=vision, text=text))
  params = jax.jit(model.init)(jax.random.key(0))["vision"]
  kernel = params["stage4_block1"]["conv2"]["kernel"]
  assert kernel.shape == (3, 3, 64, 64)
  assert kernel.std() == pytest.approx((2 / 576) ** 0.5, rel=0.05)
  norm = params["stage4_block1"]["norm3"]
  assert not norm["scale"].any() and not norm["mean"].any() and (norm["var"] == 1).all()
  assert params["stage4_block1"]["norm2"]["scale"].all()
  assert params["pool"]["key"]["kernel"].std() == pytest.approx(1 / 16, rel=0.05)


def test_what_a_resnet_does_not_have_is_refused():
  from gcl_jax.processing import ImageProcessor
  from gcl_jax.sharding import make_mesh

  model = build(named_config("TinyCLIP-ResNet-19M-Text-19M"))
  config = default_config()
  config.model.patch_dropout = 0.5
  with pytest.raises(UserError, match=r"patch_dropout is 0\.5, but .* a ResNet"):
    make_objective(model, ImageProcessor(), config, make_mesh())
  with pytest.raises(UserError, match=r"layer_decay is 0\.8, but .* a ResNet"):
    depth_factors(0.8, model.abstract())
  with pytest.raises(UserError, match=r"config\.lora names query of the image tower"):
    lora_shapes(model.abstract(), 4, {"vision": ("query",), "text": ("query",)})


def test_lora_reaches_a_pruned_tower(tmp_path):
  model = build(uneven_config(tmp_path / "tiny.pt"))
  shapes = lora_shapes(model.abstract(), 4, {"vision": ("query", "out")})
  query = shapes["vision"]["blocks"]["attention"]["query"]
  assert query["a"].shape == (3, 152, 4) and query["b"].shape == (3, 4, 192)
