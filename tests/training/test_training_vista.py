"""A VISTA is trained, resumed, searched with and handed to PyTorch as a CLIP is."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from gcl_jax.errors import UserError
from gcl_jax.models import VISTA_SHAPES, build, read_pretrained
from gcl_jax.models.lora import merge_lora
from gcl_jax.processing import EncoderTokenizer, ImageProcessor, Processor
from gcl_jax.sharding import batch_sharding, make_mesh, map_with_path, path_of
from gcl_jax.training.adapters import adapted_shapes
from gcl_jax.training.config import default_config
from gcl_jax.training.flops import flops_options, pair_flops
from gcl_jax.training.objective import make_objective
from gcl_jax.training.optimizer import frozen_mask
from gcl_jax.training.start import make_start, model_from_config
from gcl_jax.training.state import place_parameters

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "models"))
import vista_cases as cases  # noqa: E402

WORDS = (
  "[PAD]",
  "[UNK]",
  "[CLS]",
  "[SEP]",
  "a",
  "the",
  "red",
  "blue",
  "green",
  "circle",
)
MLP = ("mlp/fc1", "mlp/fc2", "mlp/gate")
WORDS += ("square", "triangle", "small", "large", "two", "left", "right", "above", "of")


SMALL_TOWER = {
  "hidden_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 100,
  "patch_size": 14,
  "image_size": 56,
  "projection_dim": 12,
}


def recipe(variant: str = "finetune", **fields):
  """configs/vista.py at a size for tests."""
  namespace: dict = {}
  path = ROOT / "configs" / "vista.py"
  exec(compile(path.read_text(), str(path), "exec"), namespace)
  config = namespace["get_config"](variant)
  small = {
    "model.dtype": "float32",
    "batch_size": 16,
    "steps": 2,
    "data.source": "scenes",
    "data.scenes_train_size": 64,
    "data.scenes_image_size": 32,
    "data.text_buckets": (24,),
    "data.threads": 1,
    "eval.max_items": 16,
    "eval.before": False,
    "eval.batch_size": 16,
    "checkpoint.every": 1,
    "log.every": 1,
    "log.tensorboard": False,
    "optimizer.learning_rate": 1e-3,
  }
  config.update_from_flattened_dict({**small, **fields})
  return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  from gcl_jax.train import train_and_evaluate

  root = tmp_path_factory.mktemp("vista")
  cases.write_folder(root / "hub")
  cases.write_tokenizer(root / "hub", WORDS)
  config = recipe(**{"init.pretrained": str(root / "hub")})
  train_and_evaluate(config, root / "run")
  return root, config


def test_training_moves_both_towers_and_not_what_is_fixed(trained):
  from gcl_jax.checkpoints import read_run

  root, _ = trained
  before, after = read_pretrained(root / "hub")[2], read_run(root / "run")[1]
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
  assert not any(jax.tree.leaves(moved["fixed"]))
  for part in ("vision", "text", "image_projection"):
    assert all(jax.tree.leaves(moved[part])), part
  np.testing.assert_allclose(np.exp(after["logit_scale"]), 50, rtol=1e-6)
  lines = (root / "run" / "metrics.jsonl").read_text().splitlines()
  values = [json.loads(line) for line in lines]
  losses = [line for line in values if "loss" in line]
  assert len(losses) == 2 and all(np.isfinite(line["loss"]) for line in losses)
  assert all(line["loss/text_to_fused"] > 0 for line in losses)
  assert not any(name.startswith("fusion/") for name in losses[0])


def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(trained):
  from gcl_jax.checkpoints import read_run
  from gcl_jax.train import train_and_evaluate

  root, config = trained
  shutil.copytree(root / "run", root / "again")
  shutil.rmtree(root / "again" / "checkpoints" / "2")
  shutil.rmtree(root / "again" / "results")
  shutil.rmtree(root / "hub")  # what it began from is not needed any more
  train_and_evaluate(config, root / "again")
  whole, resumed = read_run(root / "run")[1], read_run(root / "again")[1]
  same = jax.tree.map(lambda a, b: bool((a == b).all()), whole, resumed)
  assert all(jax.tree.leaves(same))


def test_the_export_gives_pytorch_the_same_embeddings(trained, tmp_path):
  from PIL import Image

  import gcl_jax
  from gcl_jax.checkpoints.export import export_run

  root, _ = trained
  folder = export_run(root / "run", tmp_path / "out")
  rng = np.random.default_rng(0)
  images = [
    Image.fromarray(rng.integers(0, 256, (40, 47, 3), np.uint8)) for _ in range(3)
  ]
  texts = ["a red circle above a square", "two", "the small blue triangle " * 20]
  ours = gcl_jax.load(root / "run", batch_size=8)
  got = [
    ours.embed(images=images, texts=[None] * 3),
    ours.embed(images=[None] * 3, texts=texts),
    ours.embed(images=images, texts=texts),
  ]
  assert ours.processor.tokenizer.texts_cut == 2  # once alone, once beside an image
  tensors = torch.load(folder / "Visualized_BGE.pth", weights_only=True)
  tokenizer = EncoderTokenizer.from_folder(folder)
  processor = ours.processor.image
  pixels = np.stack([processor.normalize(processor.pixels(image)) for image in images])
  config = ours.model.config
  alone, beside = (tokenizer(texts, most) for most in (40, config.pair_context))
  text = cases.embed_text(
    config,
    tensors,
    torch.from_numpy(alone).long(),
    torch.tensor(tokenizer.lengths(alone)),
  )
  want = cases.embed(config, tensors, pixels, beside, tokenizer.lengths(beside))
  text = torch.nn.functional.normalize(text, dim=-1)
  for a, b in zip(got, (want[0], text, want[2]), strict=True):
    np.testing.assert_allclose(a, b.numpy(), atol=2e-5)
  again = gcl_jax.load(folder, batch_size=8).embed(images=images, texts=texts)
  np.testing.assert_allclose(again, got[2], atol=1e-6)
  card = (folder / "README.md").read_text()
  assert "gcl_jax.load" in card and "CLIPModel" not in card
  assert "No class of PyTorch's holds this shape" in card
  assert "vocab.txt" in {path.name for path in folder.iterdir()}


def test_the_class_that_loads_an_export_is_named_for_its_two_shapes_alone(tmp_path):
  from gcl_jax.checkpoints.card import in_pytorch, vista_card

  for name, encoder in (("VISTA-base", "bge-base-en-v1.5"), ("VISTA-m3", "bge-m3")):
    # What the logit scale begins from is no part of the file.
    config = dataclasses.replace(VISTA_SHAPES[name], logit_scale_init=1.0)
    assert f'model_name_bge="{encoder}"' in vista_card("run", config, "")
    assert "Visualized_BGE with model_weight=" in in_pytorch(config, tmp_path)
  for config in (cases.BASE, cases.M3):
    assert "model_name_bge" not in vista_card("run", config, "")
    said = in_pytorch(config, tmp_path)
    assert said.startswith("no class holds this shape") and "FlagEmb" not in said


def test_without_pytorch_an_export_fails_before_the_checkpoint_is_read(
  trained, tmp_path, monkeypatch
):
  from gcl_jax.checkpoints import export

  def refuse(*_):
    raise AssertionError("the checkpoint was read")

  monkeypatch.setattr(export, "read_run", refuse)
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(
    UserError, match=r"\.pth, which only PyTorch .* pip install torch"
  ):
    export.export_run(trained[0] / "run", tmp_path / "out")
  assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_refused_halfway_leaves_nothing(
  trained, tmp_path, monkeypatch
):
  from gcl_jax.checkpoints import export

  # As where it is found, and yet cannot be imported.
  monkeypatch.setattr(export, "_check_pytorch", lambda config: None)
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(UserError, match="pip install torch"):
    export.export_run(trained[0] / "run", tmp_path / "out")
  assert list(tmp_path.iterdir()) == []


def objective_of(model, mesh=None, **fields):
  config = default_config()
  config.update_from_flattened_dict({"loss.form": "dense", **fields})
  size = model.config.vision.image_size
  images = ImageProcessor(shortest_edge=size, crop_size=size)
  mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
  return make_objective(model, images, config, mesh)


def batch(config, rows: int = 4):
  size = config.vision.image_size
  rng = np.random.default_rng(0)
  return {
    "pixels": rng.integers(0, 256, (rows, size, size, 3), np.uint8),
    "tokens": cases.tokens(config, (9, 4, 12, 5)),
    "has_image": np.array([True, True, False, True]),
    "has_text": np.array([True, False, True, True]),
    "pair_ids": np.arange(2 * rows, dtype=np.int32).reshape(rows, 2),
  }


def test_in_microbatches_the_bank_is_that_of_the_whole_batch():
  model = build(cases.BASE)
  params = jax.jit(model.init)(jax.random.key(0))
  rows = batch(cases.BASE)
  loss, metrics = jax.jit(objective_of(model))(params, rows, {})
  parts, same = jax.jit(objective_of(model, microbatches=2))(params, rows, {})
  np.testing.assert_allclose(parts, loss, rtol=1e-6)
  for name, value in metrics.items():
    np.testing.assert_allclose(same[name], value, rtol=1e-5, err_msg=name)
  assert metrics["loss/image_to_fused"] > 0


def test_split_over_a_mesh_loss_and_gradient_are_those_of_one_device(tmp_path):
  config = cases.changed(cases.BASE, "vision", mlp=88)  # a multiple of the axis
  cases.write_folder(tmp_path, config)
  model, rows = build(config), batch(config)
  params = read_pretrained(tmp_path)[2]
  want_loss, want = gradient_of(objective_of(model), params, rows)
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  split = objective_of(model, mesh)
  placed = jax.device_put(rows, batch_sharding(mesh))
  parts = place_parameters(params, mesh)
  kernel = parts["vision"]["blocks"]["mlp"]["gate"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 16, 44)
  loss, got = gradient_of(split, parts, placed)
  np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
  # BERT's key bias moves no softmax: its gradient is what rounding leaves of zero.
  attention = [tree["text"]["blocks"]["attention"] for tree in (got, want)]
  scale = np.abs(attention[1]["query"]["bias"]).max()
  for tree in attention:
    assert np.abs(tree["key"].pop("bias")).max() < 1e-4 * scale

  def near(path, ours, theirs):
    gap, size = np.abs(ours - theirs).max(), np.abs(theirs).max()
    assert gap <= 1e-4 * size, path
    assert size > 0 or path[0].key == "fixed", path

  jax.tree_util.tree_map_with_path(near, jax.device_get(got), jax.device_get(want))


def gradient_of(objective, params, rows):
  def loss(params):
    return objective(params, rows, {})[0]

  return jax.jit(jax.value_and_grad(loss))(params)


def test_lora_trains_the_matrices_that_are_named_the_gate_among_them():
  model, config = build(cases.BASE), recipe(**{"lora.rank": 2})
  config.lora.image, config.lora.text = ("query", "mlp"), ("value",)
  shapes = adapted_shapes(config, model.abstract())
  trained, mask = set(), frozen_mask(config.optimizer, config.temperature, shapes)
  map_with_path(lambda path, frozen: frozen or trained.add(path), mask)
  image = [f"vision/blocks/{m}" for m in ("attention/query", *MLP)]
  named = [*image, "text/blocks/attention/value"]
  assert trained == {f"lora/{path}/{factor}" for path in named for factor in "ab"}
  # And what the model is given differs from its own in them alone.
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
  merged, changed = merge_lora(params, alpha=4.0), set()
  del params["lora"]

  def compare(path, before, after):
    if (before != after).any():
      changed.add(path.removesuffix("/kernel"))

  jax.tree_util.tree_map_with_path(
    lambda path, *leaves: compare(path_of(path), *leaves), params, merged
  )
  assert changed == set(named)


@pytest.mark.parametrize(("loss", "loops"), [("gcl", 4), ("contrastive", 3)])
def test_cl_does_not_pay_for_the_pass_that_gcl_needs(loss, loops):
  model = build(cases.BASE)
  objective = objective_of(model, **{"loss.name": loss})
  compiled = jax.jit(objective).lower(model.abstract(), batch(cases.BASE), {}).compile()
  assert compiled.as_text().count(" while(") == loops  # the tower, and each encoding


def _by_hand(tokens: int, width: int, mlp: int, products: int) -> int:
  """Multiply-adds of a block: 4 of attention, `products` of the MLP, logits and mix."""
  return tokens * width * (4 * width + products * mlp) + 2 * tokens**2 * width


@pytest.mark.parametrize("locked", ["", "image", "text"])
def test_operations_of_a_pair_are_those_of_the_formula(locked):
  vision, text = cases.BASE.vision, cases.BASE.text
  tower = 2 * _by_hand(17, 32, vision.mlp, 3) + 16 * (3 * 8 * 8 * 32 + 32 * 48)
  alone, image, both = (3 * _by_hand(n, 48, text.mlp, 2) for n in (10, 18, 26))
  times = {"": (3, 3, 3), "image": (1, 3, 3), "text": (3, 1, 2)}[locked]
  want = tower * times[0] + alone * times[1] + (image + both) * times[2]
  model = build(cases.BASE)
  assert pair_flops(model, 10, locked=locked) == 2 * want
  without = 2 * (want - both * times[2])
  assert pair_flops(model, 10, locked=locked, fused=False) == without


def test_a_teacher_asks_for_the_pass_that_cl_does_without():
  model, config = build(cases.BASE), default_config()

  def of(loss, teacher):
    config.loss.name = loss
    return pair_flops(model, 10, **flops_options(config, teacher))

  pass_of_both = 6 * 3 * _by_hand(26, 48, cases.BASE.text.mlp, 2)  # and its backward
  assert of("gcl", None) - of("contrastive", None) == pass_of_both
  assert of("gcl", model) == of("contrastive", model)


def test_freezing_is_by_tower_and_by_what_is_fixed():
  def frozen(**fields):
    config = recipe(**fields)
    found = {}
    mask = frozen_mask(
      config.optimizer, config.temperature, build(cases.BASE).abstract()
    )
    map_with_path(
      lambda path, f: found.setdefault(path.split("/")[0], set()).add(f), mask
    )
    return {name for name, flags in found.items() if flags == {True}}

  assert frozen() == {"fixed", "logit_scale"}
  assert frozen(variant="stage1") == {"fixed", "logit_scale", "text"}
  locked = frozen(**{"optimizer.locked_tower": "image"})
  assert locked == {"fixed", "logit_scale", "vision", "image_projection"}


def test_a_start_from_a_text_encoder(tmp_path):
  cases.write_text_encoder(tmp_path / "bge")
  cases.write_eva(tmp_path / "eva.pt")
  config = recipe("stage1", **{"init.pretrained": str(tmp_path / "bge")})
  with pytest.raises(UserError, match=r"config\.init\.image_tower, or give"):
    make_start(config, [], None, False)
  config.init.image_tower = str(tmp_path / "eva.pt")
  start = make_start(config, [], None, False)
  assert start.model.config == cases.BASE and start.processor.image.image_size == 32
  np.testing.assert_allclose(np.exp(start.params()["logit_scale"]), 50, rtol=1e-6)
  config.init.image_tower = ""
  config.model.hf.vision_config = SMALL_TOWER
  start = make_start(config, [], None, False)
  assert start.model.config.vision == cases.M3.vision
  assert start.processor.image.image_size == 56
  config.fusion.image_weight = 2.0
  with pytest.raises(UserError, match=r"config\.fusion .* by itself"):
    make_start(config, [], None, False)


def test_an_image_tower_beside_a_whole_model_is_refused(tmp_path):
  cases.write_folder(tmp_path)
  fields = {"init.pretrained": str(tmp_path), "init.image_tower": "eva.pt"}
  with pytest.raises(UserError, match=r"image_tower='eva\.pt' .* tower empty"):
    make_start(recipe(**fields), [], None, False)
  scratch = {"model.name": "ViT-B/32", "init.image_tower": "eva.pt"}
  with pytest.raises(UserError, match=r"image_tower='eva\.pt' .* tower empty"):
    make_start(recipe(**scratch), [], None, False)
  with pytest.raises(UserError, match=r"image_tower='eva\.pt' .* tower empty"):
    model_from_config(recipe(**scratch))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"init.image_tower": "eva.pt"}, "has sizes of its own"),
    (
      {"model.hf.text_config": {"hidden_size": 48}},
      "text_config shapes a text encoder",
    ),
    ({"tokenizer.path": "WORDS"}, "holds another vocabulary"),
  ],
)
def test_settings_that_a_text_encoder_leaves_no_room_for(tmp_path, fields, message):
  cases.write_text_encoder(tmp_path / "bge")
  cases.write_tokenizer(tmp_path / "words", WORDS)
  config = recipe(**{"init.pretrained": str(tmp_path / "bge")})
  config.model.hf.vision_config = SMALL_TOWER
  fields = {
    k: str(tmp_path / "words") if v == "WORDS" else v for k, v in fields.items()
  }
  hf = fields.pop("model.hf.text_config", None)
  config.update_from_flattened_dict(fields)
  if hf:
    config.model.hf.text_config = hf
  with pytest.raises(UserError, match=message):
    make_start(config, [], None, False)


def test_a_drawn_image_tower_has_the_size_that_is_asked_for(tmp_path):
  cases.write_text_encoder(tmp_path)
  config = recipe(**{"init.pretrained": str(tmp_path), "model.image_size": 28})
  config.model.hf.vision_config = SMALL_TOWER
  start = make_start(config, [], None, False)
  assert start.model.config.vision.image_size == 28
  assert start.processor.image.image_size == 28
  at_one = start.params()["vision"]["position_embedding"]["embedding"]
  config.init.vision_positions = 3.0
  scaled = make_start(config, [], None, False).params()
  np.testing.assert_allclose(
    scaled["vision"]["position_embedding"]["embedding"], 3 * at_one, rtol=1e-6
  )


def test_weights_are_inherited_from_clip_to_clip(tmp_path):
  cases.write_folder(tmp_path)
  config = default_config()
  config.model.name, config.init.inherit = "VISTA-base", str(tmp_path)
  with pytest.raises(UserError, match="from CLIP to CLIP"):
    make_start(config, [], None, False).params()


def test_a_recipe_that_is_not_there():
  with pytest.raises(UserError, match=r"vista\.py:other: there are finetune, stage1"):
    recipe("other")


def test_the_small_recipe_begins_from_a_text_encoder(tmp_path):
  cases.write_text_encoder(tmp_path)
  config = recipe("small", **{"init.pretrained": str(tmp_path)})
  with pytest.raises(
    UserError, match="40 positions: no text fits"
  ):  # it has 36 patches
    config.model.image_size = 160
    make_start(config, [], None, False)
  config.model.image_size = 0
  start = make_start(config, [], None, False)
  assert start.model.config.vision.layers == 4 and start.model.config.pair_context == 4


def test_from_scratch_it_needs_a_text_encoders_vocabulary(tmp_path):
  config = default_config()
  config.model.name = "VISTA-base"
  with pytest.raises(UserError, match=r"config\.tokenizer\.path"):
    make_start(config, [], None, False)
  cases.write_tokenizer(tmp_path)
  config.tokenizer.path = str(tmp_path)
  start = make_start(config, [], None, False)
  assert start.model.config.text.vocab_size == 10
  assert start.processor.image == ImageProcessor(round_crop=True)
  config.model.name = "ViT-B/32"
  with pytest.raises(UserError, match=r"of another kind: this model takes a CLIP's"):
    make_start(config, [], None, False)
  config.model.name, config.tokenizer.path = "VISTA-m3", ""
  assert model_from_config(config).config.text.vocab_size == 250_002


def test_a_run_counts_the_texts_that_do_not_fit_beside_their_image(tmp_path):
  from PIL import Image

  from gcl_jax.training.run import _pipeline

  class Long:
    def __len__(self):
      return 16

    def __getitem__(self, i):
      images = [Image.new("RGB", (32, 32))] if i % 4 else []
      return {"id": f"r{i}", "texts": ["a " * 28], "images": images}

  cases.write_tokenizer(tmp_path, WORDS)
  tokenizer = EncoderTokenizer.from_folder(tmp_path)
  processor = Processor(ImageProcessor(shortest_edge=32, crop_size=32), tokenizer)
  config = recipe(**{"data.text_buckets": (40,)})
  mesh = make_mesh(devices=jax.devices()[:1])
  assert cases.BASE.pair_context < 30 <= cases.BASE.text.context
  with _pipeline(config, Long(), build(cases.BASE), processor, mesh) as batches:
    assert next(batches)["tokens"].shape == (16, 40)
    assert batches.texts_cut == 12  # the pictures'
