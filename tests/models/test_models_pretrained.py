"""What lies in a folder, and whose vocabulary is read with whose weights."""

from __future__ import annotations

import json

import clip_cases
import pytest
import torch
import vista_cases as cases

from gcl_jax.errors import UserError
from gcl_jax.models import (
  CLIPConfig,
  eva_from_hf,
  own_tokenizer,
  read_model,
  read_towers,
  read_without_weights,
)
from gcl_jax.processing import EncoderTokenizer, Tokenizer, default_clip_processor

WORDS = ["a small dog", "red square"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  """A CLIPModel's folder with a tokenizer and an image processor."""
  folder = tmp_path_factory.mktemp("clip")
  tokenizer = Tokenizer.train(WORDS, 520, 16)
  words = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id}
  fields = clip_cases.changed(clip_cases.SMALL)
  fields["text_config"] |= words | {"max_position_embeddings": 16}
  clip_cases.torch_model(fields).save_pretrained(folder)
  size = CLIPConfig.from_hf(fields).vision.image_size
  default_clip_processor(size, tokenizer).save(folder)
  return folder


def copied(clip, tmp_path, config=None):
  """The folder, its weights too, for changes."""
  for file in clip.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  if config is not None:
    fields = json.loads((tmp_path / "config.json").read_text())
    for tower, changes in config.items():
      fields[tower] |= changes
    (tmp_path / "config.json").write_text(json.dumps(fields))
  return tmp_path


def test_a_pth_of_a_training_does_not_make_a_clip_a_vista(clip, tmp_path):
  folder = copied(clip, tmp_path)
  want = read_model(clip)
  for name in ("rng_state.pth", "other.pth"):
    torch.save({"cpu": torch.zeros(3)}, folder / name)
    assert read_model(folder).config == want.config


def test_random_states_beside_a_text_encoder_are_no_weights(tmp_path):
  cases.write_text_encoder(tmp_path)
  torch.save({"cpu": torch.zeros(3)}, tmp_path / "rng_state_0.pth")
  config, _ = read_towers(tmp_path, cases.BASE.vision, seed=0)
  assert config.text == cases.BASE.text
  with pytest.raises(UserError, match="half of a VISTA"):
    read_model(tmp_path)


def test_a_vocabulary_that_is_named_is_for_models_without_one(clip, tmp_path):
  folder, other = tmp_path / "clip", tmp_path / "words"
  folder.mkdir()
  copied(clip, folder)
  Tokenizer.train(["other words"], 516, 16).save(other)
  with pytest.raises(UserError, match=r"words holds another vocabulary than .*clip"):
    read_model(folder, str(other))
  same = read_model(folder, str(clip)).processor.tokenizer
  for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
    (folder / name).unlink()
  assert read_model(folder, str(clip)).processor.tokenizer.reads_like(same)
  assert own_tokenizer(folder, str(clip)).reads_like(same)
  with pytest.raises(UserError, match=r"has \d+ entries and its end token is"):
    read_model(folder, str(other))


@pytest.mark.parametrize("end", [None, 2])
def test_a_text_encoders_vocabulary_is_no_clips(clip, tmp_path, end):
  config = {"text_config": {"eos_token_id": end}} if end else None
  folder = copied(clip, tmp_path, config)
  for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
    (folder / name).unlink()
  cases.write_tokenizer(folder / "bert")
  with pytest.raises(UserError, match=r"of another kind: this model takes a CLIP's"):
    read_model(folder, str(folder / "bert"))


def test_a_vista_has_its_own_vocabulary(clip, tmp_path):
  cases.write_folder(tmp_path)
  with pytest.raises(UserError, match="holds another vocabulary"):
    read_model(tmp_path, str(clip))
  assert read_model(tmp_path, str(tmp_path)).config == cases.BASE


def test_texts_are_cut_to_what_the_model_reads(clip, tmp_path):
  folder = copied(clip, tmp_path)
  words = Tokenizer.from_folder(clip)
  words.max_length = 40
  words.save(folder)
  assert read_model(folder).processor.tokenizer.max_length == 16
  cases.write_folder(tmp_path / "vista")
  kept = EncoderTokenizer.from_folder(tmp_path / "vista")
  kept.max_length = 512
  kept.save(tmp_path / "vista")
  assert read_model(tmp_path / "vista").processor.tokenizer.max_length == 40


def test_the_shape_is_read_without_the_weights(clip, tmp_path):
  folder = copied(clip, tmp_path)
  want = read_model(folder)
  (folder / "model.safetensors").unlink()
  config, fusion, processor = read_without_weights(folder)
  assert (config, fusion, processor.image) == (
    want.config,
    want.fusion,
    want.processor.image,
  )


def test_pictures_are_as_large_as_the_tower_wants(tmp_path):
  cases.write_folder(tmp_path)
  images = read_model(tmp_path).processor.image
  assert (images.shortest_edge, images.crop_size) == (32, 32)
  given = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
  fields = images.to_dict() | given
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
  images = read_model(tmp_path).processor.image
  assert (images.shortest_edge, images.crop_size) == (40, 32)


def test_a_folder_that_lacks_what_matters_says_that(tmp_path):
  cases.write_folder(tmp_path)
  for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
    (tmp_path / name).unlink(missing_ok=True)
  with pytest.raises(UserError, match=r"tokenizer files in .*Copy the tokenizer files"):
    read_model(tmp_path)
  (tmp_path / "config.json").unlink()
  with pytest.raises(
    UserError, match=r"no config\.json: a VISTA's \.pth holds weights"
  ):
    read_model(tmp_path)


def test_a_folder_of_one_file_names_it(tmp_path):
  torch.save({}, tmp_path / "TinyCLIP.pt")
  with pytest.raises(UserError, match=r"no config\.json.*\(TinyCLIP\.pt\)"):
    read_model(tmp_path)


def test_a_vistas_own_file_has_an_image_tower_to_begin_with(tmp_path):
  cases.write_text_encoder(tmp_path / "bge")
  theirs = cases.write_folder(tmp_path / "vista", seed=3)
  file = tmp_path / "vista" / "Visualized_small.pth"
  config, params = read_towers(tmp_path / "bge", file, seed=0)
  assert config == cases.BASE
  kernel = params["vision"]["blocks"]["mlp"]["gate"]["kernel"][1]
  assert (
    kernel == theirs["model_visual.visual.blocks.1.mlp.w1.weight"].numpy().T
  ).all()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ("abc", r"vision_config is 'abc': give its sizes by name"),
    ({"image_size": 100, "patch_size": 16}, "100, no multiple of its patch_size 16"),
    ({"hidden_size": 60, "num_attention_heads": 10}, "take a multiple of 4"),
  ],
)
def test_shapes_of_image_towers_that_cannot_be(fields, message):
  with pytest.raises(UserError, match=message):
    eva_from_hf(fields)
