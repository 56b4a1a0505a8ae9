"""Real photographs through a pretrained folder of TinyCLIP's widths, to PyTorch and on."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def write_hub_folder(folder, tokenizer_files):
  """What a user downloads: random weights, TinyCLIP-ViT-8M-16 but for its depth."""
  import torch
  import transformers

  from gcl_jax.models import named_config

  torch.manual_seed(0)
  fields = named_config("TinyCLIP-ViT-8M-16-Text-3M").to_hf()
  for tower in ("vision_config", "text_config"):
    fields[tower]["num_hidden_layers"] = 2
  model = transformers.CLIPModel(transformers.CLIPConfig(**fields))
  with torch.no_grad():
    for name, value in model.named_parameters():
      if name != "logit_scale":
        value.add_(0.02 * torch.randn_like(value))
  model.save_pretrained(folder)
  for file in tokenizer_files.iterdir():
    shutil.copy(file, folder)
  transformers.CLIPImageProcessor().save_pretrained(folder)


def recipe(name, **fields):
  namespace: dict = {}
  path = ROOT / "configs" / f"{name}.py"
  exec(compile(path.read_text(), str(path), "exec"), namespace)
  config = namespace["get_config"]()
  config.update_from_flattened_dict(fields)
  return config


def torch_embeddings(folder, images, texts):
  import torch
  import transformers

  model = transformers.CLIPModel.from_pretrained(folder).eval()
  processor = transformers.CLIPProcessor.from_pretrained(folder)
  inputs = processor(
    text=texts, images=images, return_tensors="pt", padding=True, truncation=True
  )
  with torch.no_grad():
    image = model.visual_projection(
      model.vision_model(inputs["pixel_values"]).pooler_output
    )
    text = model.text_projection(model.text_model(inputs["input_ids"]).pooler_output)
  unit = torch.nn.functional.normalize
  return [unit(x, dim=-1).numpy() for x in (image, text, image + text)]


@pytest.fixture(scope="module")
def trained(real_data, tmp_path_factory):
  from gcl_jax.train import train_and_evaluate

  root = tmp_path_factory.mktemp("pretrained")
  write_hub_folder(root / "hub", real_data / "clip_tokenizer")
  config = recipe(
    "tinyclip",
    **{
      "init.pretrained": str(root / "hub"),
      "data.path": str(real_data / "flickr8k"),
      "batch_size": 8,
      "steps": 2,
      "eval.max_items": 8,
      "eval.before": False,
      "eval.batch_size": 16,
      "log.every": 1,
      "log.tensorboard": False,
      "optimizer.learning_rate": 1e-3,
      "optimizer.multipliers": (("text.*", 0.0),),
    },
  )
  train_and_evaluate(config, root / "run")
  return root, config


def test_training_moved_what_it_may_and_nothing_else(trained):
  from gcl_jax.checkpoints import read_run
  from gcl_jax.models import read_pretrained

  root, _ = trained
  _, _, before = read_pretrained(root / "hub")
  after = read_run(root / "run")[1]
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
  assert not any(jax.tree.leaves(moved["text"]))  # frozen, to the bit
  assert not any(jax.tree.leaves(moved["text_projection"]))
  assert all(jax.tree.leaves(moved["vision"]))
  lines = [
    json.loads(x) for x in (root / "run" / "metrics.jsonl").read_text().splitlines()
  ]
  scales = [line["logit_scale"] for line in lines if "loss" in line]
  assert scales[0] == pytest.approx(14.2849, rel=1e-3)  # the folder's own
  assert scales[1] != scales[0]  # learned


def test_the_export_gives_pytorch_the_same_embeddings(trained, real_data, tmp_path):
  from PIL import Image

  import gcl_jax
  from gcl_jax.checkpoints.export import export_run

  root, _ = trained
  folder = export_run(root / "run", tmp_path / "hf")
  photos = sorted((real_data / "flickr8k" / "images" / "test-00").iterdir())[:4]
  texts = ["a dog runs", "two people .", "", "a photo of a cat"]
  ours = gcl_jax.load(root / "run")
  embedded = [
    ours.embed(images=photos, texts=[None] * 4),
    ours.embed(images=[None] * 4, texts=texts),
    ours.embed(images=photos, texts=texts),
  ]
  theirs = torch_embeddings(folder, [Image.open(p) for p in photos], texts)
  for a, b in zip(embedded, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
  again = gcl_jax.load(folder).embed(images=photos, texts=texts)
  np.testing.assert_allclose(again, embedded[2], atol=1e-6)


def test_a_run_can_start_from_another_run(trained, tmp_path):
  from gcl_jax.checkpoints import read_run
  from gcl_jax.train import train_and_evaluate

  root, config = trained
  config = config.copy_and_resolve_references()
  config.init.pretrained = str(root / "run")
  config.optimizer.learning_rate = 0.0
  config.steps = 1
  train_and_evaluate(config, tmp_path / "second")
  first, second = read_run(root / "run")[1], read_run(tmp_path / "second")[1]
  same = jax.tree.map(lambda a, b: bool((a == b).all()), first, second)
  assert all(jax.tree.leaves(same))
