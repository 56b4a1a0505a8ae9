"""VISTA's files: in and out to the bit, a start from two towers, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import vista_cases as cases

from gcl_jax.errors import UserError
from gcl_jax.models import (
  VistaConfig,
  is_text_encoder,
  read_model,
  read_pretrained,
  read_towers,
  write_pretrained,
  write_vista,
)


def assert_same(got: dict, want: dict) -> None:
  assert got.keys() == want.keys()
  for key, tensor in want.items():
    ours, theirs = np.asarray(got[key]), np.asarray(tensor)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, key
    assert ours.tobytes() == theirs.tobytes(), key


def test_a_pth_goes_in_and_out_to_the_bit(tmp_path):
  theirs = cases.write_folder(tmp_path / "in")
  config, _, params = read_pretrained(tmp_path / "in")
  assert config == cases.BASE  # sizes off the tensors, ids off the tokenizer
  write_vista(tmp_path / "out", config, params, pth=True)
  back = torch.load(tmp_path / "out" / "Visualized_BGE.pth", weights_only=True)
  assert_same(back, theirs)
  again, _, second = read_pretrained(tmp_path / "out")
  assert again == config
  assert_same(dict(_leaves(second)), dict(_leaves(params)))


def test_safetensors_keep_the_logit_scale_too(tmp_path):
  cases.write_folder(tmp_path / "in")
  config, _, params = read_pretrained(tmp_path / "in")
  assert params["logit_scale"] == np.float32(VistaConfig.logit_scale_init)
  params["logit_scale"] = np.float32(3.25)
  write_pretrained(tmp_path / "out", config, params)
  again, _, second = read_pretrained(tmp_path / "out")
  assert again == config
  assert_same(dict(_leaves(second)), dict(_leaves(params)))


def _leaves(tree, at=""):
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _leaves(value, f"{at}/{name}")
    else:
      yield f"{at}/{name}", value


def test_half_precision_is_widened(tmp_path):
  tensors = cases.write_folder(tmp_path)
  half = {k: v.half() for k, v in tensors.items()}
  torch.save(half, tmp_path / "Visualized_small.pth")
  params = read_pretrained(tmp_path)[2]
  kernel = half["visual_proj.weight"].float().numpy().T
  np.testing.assert_array_equal(params["image_projection"]["kernel"], kernel)


def test_a_start_from_a_text_encoder_and_an_eva_clip_file(tmp_path):
  text = cases.write_text_encoder(tmp_path / "bge")
  visual = cases.write_eva(tmp_path / "eva.pt")
  assert is_text_encoder(tmp_path / "bge")
  config, params = read_towers(tmp_path / "bge", tmp_path / "eva.pt", seed=0)
  assert config == cases.BASE
  np.testing.assert_array_equal(
    params["text"]["token_embedding"]["embedding"],
    text["embeddings.word_embeddings.weight"],
  )
  np.testing.assert_array_equal(
    params["vision"]["blocks"]["mlp"]["gate"]["kernel"][1],
    visual["visual.blocks.1.mlp.w1.weight"].T,
  )
  drawn = params["image_projection"]["kernel"]
  assert 0.5 < np.std(drawn) * (3 * 32) ** 0.5 < 2
  again = read_towers(tmp_path / "bge", tmp_path / "eva.pt", seed=0)[1]
  np.testing.assert_array_equal(again["image_projection"]["kernel"], drawn)


def test_a_start_from_a_text_encoder_and_a_shape(tmp_path):
  text = cases.write_text_encoder(tmp_path)
  config, params = read_towers(tmp_path, cases.M3.vision, seed=0)
  assert (config.vision, config.text) == (cases.M3.vision, cases.BASE.text)
  assert params["image_projection"]["kernel"].shape == (48, 48)
  np.testing.assert_array_equal(
    params["text"]["blocks"]["mlp"]["fc2"]["kernel"][2],
    text["encoder.layer.2.output.dense.weight"].T,
  )


def _bad(tmp_path, tensors=None, config=None):
  """Reads the folder with other tensors, or another config.json; the one message."""
  if tensors is not None:
    torch.save(tensors, tmp_path / "Visualized_small.pth")
  if config is not None:
    fields = json.loads((tmp_path / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(fields))
  with pytest.raises(UserError) as error:
    read_pretrained(tmp_path)
  message = str(error.value)
  assert str(tmp_path) in message and len(message) < 1200
  return message


def test_keys_missing_or_left_over_are_named(tmp_path):
  tensors = cases.write_folder(tmp_path)
  del tensors["bge_encoder.layer.1.output.dense.bias"]
  tensors["bge_encoder.layer.3.output.dense.bias"] = torch.zeros(48)
  tensors["bge_embeddings.position_ids"] = torch.arange(40)[None]  # of old files
  tensors["visual_proj.bias"] = torch.zeros(47)
  message = _bad(tmp_path, tensors)
  assert "1 missing: bge_encoder.layer.1.output.dense.bias" in message
  assert "1 left over: bge_encoder.layer.3.output.dense.bias" in message
  assert "visual_proj.bias (47,), not (48,)" in message and "VISTA" in message
  assert "position_ids" not in message


def test_an_unknown_layout_is_named(tmp_path):
  tensors = cases.write_folder(tmp_path)
  other = {k.replace("model_visual", "siglip"): v for k, v in tensors.items()}
  message = _bad(tmp_path, other)
  assert (
    "layout" in message and "model_visual.visual.patch_embed.proj.weight" in message
  )


def test_towers_that_do_not_fit_each_other_are_refused(tmp_path):
  tensors = cases.write_folder(tmp_path)
  tensors["bge_embeddings.position_embeddings.weight"] = torch.zeros(17, 48)
  message = _bad(tmp_path, tensors, {"max_position_embeddings": 17})
  assert "16 patches" in message and "17 positions" in message
  tensors = cases.write_folder(tmp_path)
  tensors["visual_proj.weight"] = torch.zeros(48, 64)
  assert "visual_proj.weight (48, 64), not (48, 32)" in _bad(tmp_path, tensors)


def test_a_pickle_that_is_more_than_tensors_is_refused(tmp_path):
  cases.write_folder(tmp_path)
  marker = tmp_path / "ran"

  class Payload:
    def __reduce__(self):
      return (open, (str(marker), "w"))

  assert "refused" in _bad(tmp_path, {"model_visual.logit_scale": Payload()})
  assert not marker.exists()


def test_a_rotary_table_of_one_block_that_differs_is_refused(tmp_path):
  tensors = cases.write_folder(tmp_path)
  key = "model_visual.visual.blocks.1.attn.rope.freqs_sin"
  tensors[key] = tensors[key] + 1e-3
  assert key in _bad(tmp_path, tensors)


def test_a_pth_alone_and_two_of_them(tmp_path):
  cases.write_folder(tmp_path)
  torch.save({}, tmp_path / "Visualized_m3.pth")
  assert "2 .pth files (Visualized_m3.pth, Visualized_small.pth)" in _bad(tmp_path)
  (tmp_path / "Visualized_m3.pth").unlink()
  (tmp_path / "config.json").unlink()
  assert "no config.json" in _bad(tmp_path)


def test_the_file_itself_may_be_named(tmp_path):
  cases.write_folder(tmp_path)
  torch.save({}, tmp_path / "Visualized_m3.pth")  # of two, the one that is meant
  found = read_model(tmp_path / "Visualized_small.pth")
  assert found.config == cases.BASE and found.processor.image.image_size == 32


def test_another_text_encoder_or_its_tokenizer_is_refused(tmp_path):
  cases.write_folder(tmp_path)
  assert "'roberta'" in _bad(tmp_path, config={"model_type": "roberta"})
  changes = {"model_type": "bert", "position_embedding_type": "relative_key"}
  assert "'relative_key'" in _bad(tmp_path, config=changes)
  changes = {"position_embedding_type": "absolute", "vocab_size": 5}
  assert "10 entries and config.json says 5" in _bad(tmp_path, config=changes)


def test_a_text_encoder_alone_says_what_is_missing(tmp_path):
  cases.write_text_encoder(tmp_path)
  with pytest.raises(UserError, match=r"half of a VISTA.*config\.init\.image_tower"):
    read_pretrained(tmp_path)


def test_an_image_tower_of_another_kind_is_refused(tmp_path):
  cases.write_text_encoder(tmp_path / "bge")
  torch.save({"visual.conv1.weight": torch.zeros(8, 3, 4, 4)}, tmp_path / "clip.pt")
  with pytest.raises(UserError, match=r"clip\.pt is of a layout that is not known"):
    read_towers(tmp_path / "bge", tmp_path / "clip.pt", seed=0)
  with pytest.raises(UserError, match=r"there is no file .*nowhere\.pt"):
    read_towers(tmp_path / "bge", tmp_path / "nowhere.pt", seed=0)


def test_without_pytorch_a_pth_says_what_to_do(tmp_path):
  cases.write_folder(tmp_path / "in")
  code = f"""
import sys
sys.modules["torch"] = None
from gcl_jax.errors import UserError
from gcl_jax.models import read_pretrained
try:
  read_pretrained({str(tmp_path / "in")!r})
except UserError as error:
  print(error)
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
  )
  assert "pip install torch" in done.stdout, done.stderr
