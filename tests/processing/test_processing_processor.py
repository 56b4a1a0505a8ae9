"""`Processor`: its files are those of transformers, in both directions."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from gcl_jax.errors import UserError
from gcl_jax.processing import Processor, Tokenizer, default_clip_processor

TEXTS = ["a red circle", "", "zebra crossing!"]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
  return Tokenizer.train(["a red circle on a blue square"] * 3, 540, max_length=16)


def check(theirs, ours: Processor):
  """transformers' processor gives what ours gives."""
  image = Image.effect_noise((90, 70), 60).convert("RGB")
  size = ours.tokenizer.max_length
  out = theirs(
    text=TEXTS,
    images=image,
    padding="max_length",
    truncation=True,
    max_length=size,
    return_tensors="np",
  )
  np.testing.assert_array_equal(out["input_ids"], ours.tokenizer(TEXTS))
  want = ours.image.normalize(ours.image.pixels(image)).transpose(2, 0, 1)
  np.testing.assert_allclose(out["pixel_values"][0], want, atol=1e-6, rtol=0)


def test_transformers_loads_what_we_save(trained, tmp_path):
  from transformers import AutoProcessor, CLIPImageProcessor, CLIPProcessor

  ours = default_clip_processor(48, trained)
  assert ours.image.image_size == 48
  ours.save(tmp_path)
  check(CLIPProcessor.from_pretrained(tmp_path), ours)
  check(AutoProcessor.from_pretrained(tmp_path), ours)
  image_processor = CLIPImageProcessor.from_pretrained(tmp_path)
  assert image_processor.crop_size["height"] == 48
  again = Processor.from_folder(tmp_path)
  assert again.image == ours.image
  np.testing.assert_array_equal(again.tokenizer(TEXTS), ours.tokenizer(TEXTS))


def test_we_load_what_transformers_saves(trained, tmp_path):
  from transformers import CLIPProcessor

  ours = default_clip_processor(48, trained)
  ours.save(tmp_path / "ours")
  theirs = CLIPProcessor.from_pretrained(tmp_path / "ours")
  theirs.save_pretrained(tmp_path / "theirs")
  assert not (tmp_path / "theirs" / "preprocessor_config.json").exists()
  again = Processor.from_folder(tmp_path / "theirs")
  assert again.image == ours.image
  check(theirs, again)


def test_a_nested_file_wins_and_is_rewritten(trained, tmp_path):
  from transformers import CLIPProcessor

  default_clip_processor(48, trained).save(tmp_path)
  settings = default_clip_processor(40, trained).image.to_dict()
  nested = tmp_path / "processor_config.json"
  nested.write_text(json.dumps({"image_processor": settings}))
  assert Processor.from_folder(tmp_path).image.image_size == 40
  default_clip_processor(56, trained).save(tmp_path)
  assert Processor.from_folder(tmp_path).image.image_size == 56
  theirs = CLIPProcessor.from_pretrained(tmp_path)
  assert theirs.image_processor.crop_size["height"] == 56
  nested.write_text('{"processor_class": "CLIPProcessor"}')  # as older files are
  assert Processor.from_folder(tmp_path).image.image_size == 56


def test_missing_files_are_named(trained, tmp_path):
  with pytest.raises(UserError, match="no folder"):
    Processor.from_folder(tmp_path / "nowhere")
  trained.save(tmp_path / "a")
  with pytest.raises(UserError, match=r"preprocessor_config\.json is missing.*Copy"):
    Processor.from_folder(tmp_path / "a")
  default_clip_processor(48, trained).save(tmp_path / "b")
  for name in ("tokenizer.json", "vocab.json"):
    (tmp_path / "b" / name).unlink()
  with pytest.raises(UserError, match=r"neither tokenizer\.json nor vocab\.json"):
    Processor.from_folder(tmp_path / "b")
  (tmp_path / "b" / "preprocessor_config.json").write_text("[1]")
  with pytest.raises(UserError, match="JSON object"):
    Processor.from_folder(tmp_path / "b")


def test_the_real_tokenizer_in_a_folder(real_data, tmp_path):
  folder = tmp_path / "clip"
  shutil.copytree(real_data / "clip_tokenizer", folder)
  settings = default_clip_processor(224, None).image.to_dict()
  (folder / "preprocessor_config.json").write_text(json.dumps(settings))
  processor = Processor.from_folder(folder)
  assert processor.tokenizer.encode("a cat") == [49406, 320, 2368, 49407]


def test_importing_loads_neither_transformers_nor_jax():
  program = (
    "import sys, gcl_jax.processing; "
    "sys.exit(bool({'transformers', 'jax', 'torch'} & set(sys.modules)))"
  )
  subprocess.run([sys.executable, "-c", program], check=True)
