"""Hugging Face folders: every layout that there is, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import clip_cases as cases
import jax
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings
from gcl_jax.models import (
  CLIPConfig,
  build,
  read_pretrained,
  write_pretrained,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def theirs():
  return cases.torch_model(cases.SMALL)


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory):
  folder = tmp_path_factory.mktemp("saved")
  theirs.save_pretrained(folder)
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  """A copy of a CLIPModel's folder, to break."""
  return Path(shutil.copytree(saved, tmp_path / "model"))


def _tensors(folder: Path) -> dict[str, np.ndarray]:
  return safetensors.numpy.load_file(folder / "model.safetensors")


def _assert_same(params, expected):
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def _edit(folder: Path, **fields) -> None:
  path = folder / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_written_and_read_again_is_bit_identical(saved, tmp_path):
  config, fusion, params = read_pretrained(saved)
  assert config == CLIPConfig.from_hf(cases.SMALL) and fusion == FusionSettings()
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
  out = tmp_path / "new" / "folder"
  write_pretrained(out, config, jax.tree.map(jax.numpy.asarray, params))
  before, after = _tensors(saved), _tensors(out)
  assert before.keys() == after.keys()
  for key, array in before.items():
    assert after[key].shape == array.shape and after[key].dtype == array.dtype
    assert after[key].tobytes() == array.tobytes(), key
  assert after["logit_scale"].shape == ()
  assert {p.name for p in out.iterdir()} == {
    "config.json",
    "model.safetensors",
    "gcl_jax.json",
  }
  again = read_pretrained(out)
  assert again[0] == config
  _assert_same(again[2], params)


def test_what_we_write_loads_in_pytorch_with_nothing_amiss(theirs, saved, tmp_path):
  config, _, params = read_pretrained(saved)
  write_pretrained(tmp_path, config, params)
  model, report = transformers.CLIPModel.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not any(report.values()), report
  assert model.dtype == torch.float32
  assert model.config.text_config.eos_token_id == cases.EOS
  pixels, tokens = cases.images(config), cases.texts(config, (3, 15))
  before = cases.torch_embeddings(theirs, pixels, tokens)
  after = cases.torch_embeddings(model.eval(), pixels, tokens)
  for a, b in zip(before, after, strict=True):
    np.testing.assert_array_equal(a, b)


def test_files_are_readable_by_others_and_replace_older_ones(saved, tmp_path):
  config, _, params = read_pretrained(saved)
  write_pretrained(tmp_path, config, params)
  params["logit_scale"] = np.float32(1.25)
  write_pretrained(tmp_path, config, params)
  assert read_pretrained(tmp_path)[2]["logit_scale"] == 1.25
  umask = os.umask(0)
  os.umask(umask)
  modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
  assert modes == {0o666 & ~umask}


def test_a_write_that_fails_leaves_what_was_there(saved, tmp_path, monkeypatch):
  config, _, params = read_pretrained(saved)
  write_pretrained(tmp_path, config, params)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

  def full_disk(tensors, path, metadata=None):
    Path(path).write_bytes(b"half a file")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(safetensors.numpy, "save_file", full_disk)
  with pytest.raises(UserError, match="No space left on device"):
    write_pretrained(tmp_path, config, params)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_place_that_cannot_be_written_is_named(saved, tmp_path):
  config, _, params = read_pretrained(saved)
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(UserError, match=r"cannot be written to .*file"):
    write_pretrained(tmp_path / "file", config, params)


def test_fusion_settings_travel_with_the_folder(saved, tmp_path):
  config, _, params = read_pretrained(saved)
  settings = FusionSettings(of="unit", image_weight=0.25, text_weight=1.5)
  write_pretrained(tmp_path, config, params, settings)
  assert read_pretrained(tmp_path)[1] == settings
  assert "fusion" not in read_pretrained(tmp_path)[2]


def test_learned_fusion_weights_travel_as_they_were_learned(saved, tmp_path):
  config, _, params = read_pretrained(saved)
  learned = {"image_weight": np.float32(0.1), "text_weight": np.float32(1 / 3)}
  settings = FusionSettings(learned=True)
  write_pretrained(tmp_path, config, {**params, "fusion": learned}, settings)
  _, fusion, again = read_pretrained(tmp_path)
  assert fusion.learned and again["fusion"] == learned
  shapes = jax.tree.map(np.shape, again)
  expected = build(config, fusion=fusion).abstract()
  assert shapes == jax.tree.map(lambda leaf: leaf.shape, expected)


@pytest.mark.parametrize("text", ["{", "[]", '{"fusion": 3}', '{"fusion": {"by": 1}}'])
def test_broken_fusion_settings_are_refused(folder, text):
  (folder / "gcl_jax.json").write_text(text)
  with pytest.raises(UserError, match=r"gcl_jax\.json"):
    read_pretrained(folder)


def test_position_ids_of_old_files_are_ignored(folder):
  expected = read_pretrained(folder)[2]
  tensors = _tensors(folder)
  tensors["text_model.embeddings.position_ids"] = np.arange(16)[None]
  tensors["vision_model.embeddings.position_ids"] = np.arange(17)[None]
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  _assert_same(read_pretrained(folder)[2], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(folder, theirs, dtype):
  tensors = {k: v.to(dtype).contiguous() for k, v in theirs.state_dict().items()}
  safetensors.torch.save_file(tensors, folder / "model.safetensors")
  _, _, params = read_pretrained(folder)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
  kernel = tensors["text_projection.weight"].float().numpy().T
  np.testing.assert_array_equal(params["text_projection"]["kernel"], kernel)


def test_a_scalar_kept_as_a_list_of_one_is_read(folder):
  tensors = _tensors(folder)
  scale = tensors["logit_scale"]
  tensors["logit_scale"] = scale.reshape(1)
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  params = read_pretrained(folder)[2]
  assert params["logit_scale"].shape == () and params["logit_scale"] == scale


def test_old_configs_with_dict_sub_configs_are_read(folder):
  expected = read_pretrained(folder)[2]
  fields = json.loads((folder / "config.json").read_text())
  # The field that was overwritten is wrong, as transformers never looks at it.
  _edit(
    folder,
    text_config={"hidden_size": 4096},
    text_config_dict=fields["text_config"],
    vision_config_dict=fields["vision_config"],
  )
  config, _, params = read_pretrained(folder)
  assert config == CLIPConfig.from_hf(cases.SMALL)
  _assert_same(params, expected)


def test_shards_are_read(theirs, saved, tmp_path):
  theirs.save_pretrained(tmp_path, max_shard_size="100KB")
  shards = list(tmp_path.glob("model-*.safetensors"))
  assert len(shards) > 1 and not (tmp_path / "model.safetensors").exists()
  _assert_same(read_pretrained(tmp_path)[2], read_pretrained(saved)[2])
  shards[0].unlink()
  with pytest.raises(UserError, match=shards[0].name):
    read_pretrained(tmp_path)


def test_an_index_may_not_point_outside_its_folder(theirs, saved, tmp_path):
  inside = tmp_path / "model"
  theirs.save_pretrained(inside, max_shard_size="100KB")
  path = inside / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  shutil.copy(saved / "model.safetensors", tmp_path / "secret.safetensors")
  index["weight_map"]["logit_scale"] = "../secret.safetensors"
  path.write_text(json.dumps(index))
  with pytest.raises(UserError, match=r"secret\.safetensors"):
    read_pretrained(inside)
  path.write_text("{}")
  with pytest.raises(UserError, match="weight_map"):
    read_pretrained(inside)


def test_a_plain_bin_file_is_read(folder, theirs):
  expected = read_pretrained(folder)[2]
  (folder / "model.safetensors").unlink()
  torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
  _assert_same(read_pretrained(folder)[2], expected)
  half = {key: value.bfloat16() for key, value in theirs.state_dict().items()}
  torch.save(half, folder / "pytorch_model.bin")
  params = read_pretrained(folder)[2]
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


class _Trap:
  """Runs when it is unpickled without care."""

  def __init__(self, path: Path):
    self.path = path

  def __reduce__(self):
    return (Path.touch, (self.path,))


@pytest.mark.parametrize("plain", [False, True])
def test_a_bin_file_that_would_run_code_is_refused(folder, theirs, tmp_path, plain):
  (folder / "model.safetensors").unlink()
  sprung = tmp_path / "sprung"
  content = {**theirs.state_dict(), "trap": _Trap(sprung)}
  if plain:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"trap": _Trap(sprung)}))
  else:
    torch.save(content, folder / "pytorch_model.bin")
  with pytest.raises(UserError, match=r"pytorch_model\.bin is refused"):
    read_pretrained(folder)
  assert not sprung.exists()


@pytest.mark.parametrize("version", ["2.5.1+cu121", "1.13.0"])
def test_an_old_pytorch_is_not_trusted_with_a_bin_file(
  folder, theirs, monkeypatch, version
):
  (folder / "model.safetensors").unlink()
  torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
  monkeypatch.setattr(torch, "__version__", version)
  with pytest.raises(UserError, match=r"PyTorch 2\.6"):
    read_pretrained(folder)


def test_safetensors_come_before_a_bin_file(folder):
  (folder / "pytorch_model.bin").write_bytes(b"not looked at")
  read_pretrained(folder)


def test_missing_and_left_over_keys_are_named(folder):
  tensors = _tensors(folder)
  tensors["text_model.encoder.layers.9.mlp.fc1.bias"] = tensors.pop(
    "text_model.encoder.layers.0.mlp.fc1.bias"
  )
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  with pytest.raises(UserError) as error:
    read_pretrained(folder)
  message = str(error.value)
  assert str(folder) in message
  assert "1 missing: text_model.encoder.layers.0.mlp.fc1.bias" in message
  assert "1 left over: text_model.encoder.layers.9.mlp.fc1.bias" in message


def test_a_config_of_another_shape_is_named(folder):
  _edit(folder, projection_dim=64)
  with pytest.raises(
    UserError, match=r"text_projection\.weight \(32, 32\), not \(64, 32\)"
  ):
    read_pretrained(folder)


@pytest.mark.parametrize(
  ("fields", "says"),
  [
    ({"model_type": "siglip", "architectures": ["SiglipModel"]}, "siglip.*SiglipModel"),
    ({"model_type": "clip_vision_model"}, "clip_vision_model"),
    ({"model_type": "bert"}, "bert"),
  ],
)
def test_another_model_is_refused_by_name(folder, fields, says):
  _edit(folder, **fields)
  with pytest.raises(UserError, match=says):
    read_pretrained(folder)


def test_a_config_that_names_no_kind_is_judged_by_its_towers(folder):
  fields = json.loads((folder / "config.json").read_text())
  del fields["model_type"]
  (folder / "config.json").write_text(json.dumps(fields))
  read_pretrained(folder)
  (folder / "config.json").write_text('{"hidden_size": 768}')
  with pytest.raises(UserError, match="not a CLIP"):
    read_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff"])
def test_a_broken_config_is_refused(folder, text):
  (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
  with pytest.raises(UserError, match=r"config\.json"):
    read_pretrained(folder)


def test_a_config_we_cannot_run_names_its_file(folder):
  fields = json.loads((folder / "config.json").read_text())["text_config"]
  _edit(folder, text_config={**fields, "hidden_act": "relu"})
  with pytest.raises(UserError, match=r"config\.json: text_config\.hidden_act"):
    read_pretrained(folder)


@pytest.mark.parametrize("size", [0, 5, 5000])
def test_a_truncated_weight_file_is_refused(folder, size):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(UserError, match=r"model\.safetensors.*whole"):
    read_pretrained(folder)


def test_a_folder_without_config_or_weights_is_refused(folder, tmp_path):
  (folder / "model.safetensors").unlink()
  with pytest.raises(UserError, match="has no weights"):
    read_pretrained(folder)
  with pytest.raises(UserError, match=r"has no config\.json"):
    read_pretrained(tmp_path)


_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # import torch raises ImportError
import numpy as np
from gcl_jax.errors import UserError
from gcl_jax.models import build, read_pretrained
config, fusion, params = read_pretrained(sys.argv[1])
embedded = build(config, fusion=fusion).bind(params).embed_text(np.array([[1, 299]]))
assert embedded.shape == (1, 32) and np.isfinite(embedded).all()
try:
  read_pretrained(sys.argv[2])
except UserError as error:
  print(error)
"""


def test_without_pytorch_safetensors_load_and_a_bin_file_says_what_to_do(
  saved, folder, theirs
):
  (folder / "model.safetensors").unlink()
  torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
  ran = subprocess.run(
    [sys.executable, "-c", _WITHOUT_TORCH, str(saved), str(folder)],
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=240,
    check=False,
  )
  assert ran.returncode == 0, ran.stderr
  assert "pip install torch" in ran.stdout
