"""Finding a model's folder: on this machine, or under a hub id."""

from __future__ import annotations

import shutil

import clip_cases as cases
import pytest
import torch

from gcl_jax.errors import UserError
from gcl_jax.models import local_folder, read_pretrained
from gcl_jax.models.huggingface import open_clip_weights


@pytest.fixture(scope="module")
def theirs():
  return cases.torch_model(cases.SMALL)


@pytest.fixture
def folder(theirs, tmp_path):
  """A CLIPModel's folder."""
  theirs.save_pretrained(tmp_path / "model")
  return tmp_path / "model"


def test_local_folders_are_taken_as_they_are(folder, tmp_path, monkeypatch):
  assert local_folder(folder) == folder
  monkeypatch.chdir(tmp_path)
  assert local_folder("model").resolve() == folder
  monkeypatch.setenv("HOME", str(tmp_path))
  assert local_folder("~/model") == folder


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "a/b/c", "two words"])
def test_what_can_be_no_hub_id_is_not_looked_up(name):
  with pytest.raises(UserError, match="there is no folder"):
    local_folder(name)


@pytest.mark.parametrize(
  "name",
  ["TinyCLIP-ViT.pt", "owner/x.pth", "/no/such/a.bin", "./a.safetensors", "a/b/c.pt"],
)
def test_a_mistyped_file_is_called_a_file(name):
  with pytest.raises(UserError, match=f"there is no file {name}"):
    local_folder(name)


def test_a_file_is_not_a_folder(folder):
  with pytest.raises(UserError, match="is a file"):
    local_folder(folder / "config.json")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
  """An empty cache of the hub's; the hub itself cannot be reached."""
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  return tmp_path / "hub"


def test_a_hub_id_without_network_says_so(hub_cache):
  with pytest.raises(UserError, match=r"owner/name.*could not be downloaded.*HF_HOME"):
    local_folder("owner/name")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_cached_hub_id_works_without_network(folder, theirs, hub_cache, weights):
  if weights.endswith(".bin"):
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / weights)
  cached = hub_cache / "models--owner--name"
  commit = "0123456789abcdef0123456789abcdef01234567"
  (cached / "refs").mkdir(parents=True)
  (cached / "refs" / "main").write_text(commit)
  shutil.copytree(folder, cached / "snapshots" / commit)
  found = local_folder("owner/name")
  assert found == cached / "snapshots" / commit
  read_pretrained(found)


def test_only_what_is_needed_is_downloaded(monkeypatch, tmp_path):
  import huggingface_hub

  asked = []

  def snapshot_download(name, allow_patterns):
    asked.append((name, allow_patterns))
    if "pytorch_model.bin" in allow_patterns:
      (tmp_path / "pytorch_model.bin").touch()
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  assert local_folder("owner/name") == tmp_path
  assert [("pytorch_model.bin" in patterns) for _, patterns in asked] == [False, True]
  wanted = {"config.json", "gcl_jax.json", "preprocessor_config.json", "tokenizer.json"}
  assert wanted <= set(asked[0][1])
  assert not any("Visualized*.pth" in patterns for _, patterns in asked)
  asked.clear()
  (tmp_path / "config.json").write_text('{"model_type": "bert"}')  # what we export has
  local_folder("owner/name")  # of a VISTA: no weights but a .pth
  assert [("Visualized*.pth" in patterns) for _, patterns in asked] == [False, True]
  asked.clear()
  (tmp_path / "model.safetensors").touch()
  assert local_folder("owner/name") == tmp_path
  assert len(asked) == 1


@pytest.mark.parametrize("there", [0, 1])
def test_of_open_clips_repositories_one_file_of_weights_is_downloaded(
  monkeypatch, tmp_path, there
):
  import huggingface_hub

  weights = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
  asked = []

  def snapshot_download(name, allow_patterns):
    asked.append(allow_patterns)
    (tmp_path / "open_clip_config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"architecture": "vit"}')  # timm's
    if weights[there] in allow_patterns:
      (tmp_path / weights[there]).touch()
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  assert local_folder("owner/name") == tmp_path
  assert [[w for w in weights if w in patterns] for patterns in asked] == [
    [],
    *[[w] for w in weights[: there + 1]],
  ]
  assert open_clip_weights(tmp_path) == tmp_path / weights[there]
  (tmp_path / "config.json").write_text('{"model_type": "clip"}')
  assert open_clip_weights(tmp_path) is None  # both kinds of folder: Hugging Face's


def test_a_tokenizer_costs_no_weights(monkeypatch, tmp_path):
  import huggingface_hub

  asked = []

  def snapshot_download(name, allow_patterns):
    asked.extend(allow_patterns)
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  assert local_folder("owner/name", weights=False) == tmp_path
  assert "vocab.json" in asked and not [name for name in asked if "model." in name]
