"""Files of OpenAI, OpenCLIP and TinyCLIP against PyTorch, and what is refused."""

from __future__ import annotations

import ast
import collections
import functools
import importlib.util
import io
import json
import pickle
import zipfile
from pathlib import Path

import clip_cases
import jax
import jax.numpy as jnp
import native_cases as cases
import numpy as np
import pytest
import safetensors.torch
import torch

from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings
from gcl_jax.models import build, read_model, read_pretrained, write_pretrained
from gcl_jax.models.config import ACTIVATIONS, CLIPConfig, ResNetConfig
from gcl_jax.models.layers import activate
from gcl_jax.models.native import native_config
from gcl_jax.models.weights import open_weights
from gcl_jax.processing import Tokenizer

CLOSE = 2e-5  # between unit vectors, float32


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  """A folder with tokenizer files of as many entries as the cases have."""
  return cases.tokenizer_folder(tmp_path_factory.mktemp("words"))


@functools.cache
def _embed(config):
  model = build(config)

  def embed(params, pixels, tokens):
    clip = model.bind(params)
    return clip.embed_image(pixels), clip.embed_text(tokens)

  return jax.jit(embed)


def embeddings(config, params, pixels, tokens):
  return _embed(config)(params, pixels, tokens)


def gaps(read, state, act):
  """The largest differences of unit rows from PyTorch's, of images and of texts."""
  pixels = cases.pictures(read.config.vision.image_size)
  ours = embeddings(read.config, read.params, pixels, cases.sentences())
  theirs = cases.torch_embeddings(state, pixels, cases.sentences(), act)
  return [clip_cases.unit_gap(a, b) for a, b in zip(ours, theirs, strict=True)]


def save_scripted(state, path):
  """As `torch.jit.save` writes a model: a module of modules with these parameters."""

  class Holder(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
      return x + 1

  root = Holder()
  for key, value in state.items():
    *parents, last = key.split(".")
    node = root
    for name in parents:
      if name not in node._modules:
        node.add_module(name, Holder())
      node = node._modules[name]
    if value.is_floating_point():
      node.register_parameter(last, torch.nn.Parameter(value))
    else:
      node.register_buffer(last, value)
  torch.jit.save(torch.jit.script(root), str(path))


def describe(folder, quick_gelu, state, **preprocess):
  """An `open_clip_config.json` for `cases.vit` or `cases.resnet`."""
  width, outputs = state["text_projection"].shape
  resnet = "visual.proj" not in state
  vision = {"layers": [2, 1, 2, 1], "width": 4, "image_size": 64}
  if not resnet:
    vision = {"layers": 2, "width": 128, "patch_size": 8, "image_size": 32}
  text = {"context_length": 16, "vocab_size": cases.VOCABULARY, "width": width}
  model = {
    "embed_dim": outputs,
    "quick_gelu": quick_gelu,
    "vision_cfg": vision,
    "text_cfg": {**text, "heads": width // cases.HEAD, "layers": 2},
  }
  settings = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1], **preprocess}
  content = {"model_cfg": model, "preprocess_cfg": settings}
  (folder / "open_clip_config.json").write_text(json.dumps(content))
  return content


@pytest.mark.parametrize("made", [cases.vit, cases.resnet], ids=["vit", "resnet"])
def test_an_openai_archive_equals_pytorch(tmp_path, words, made):
  state = {k: v.half() if v.ndim > 1 else v for k, v in made().items()}
  numbers = {"input_resolution": 32, "context_length": 16, "vocab_size": 514}
  extra = {key: torch.tensor(value) for key, value in numbers.items()}
  save_scripted({**state, **extra}, tmp_path / "model.pt")
  read = read_model(tmp_path / "model.pt", str(words))
  assert read.config.text.act == "quick_gelu" and read.fusion == FusionSettings()
  assert read.processor.image.image_size == read.config.vision.image_size
  assert max(gaps(read, state, "quick_gelu")) < CLOSE


@pytest.mark.parametrize(
  "kind, act",
  [
    ("safetensors", "gelu"),
    ("bin", "quick_gelu"),
    ("pt", "gelu"),
    ("resnet", "gelu"),
  ],
)
def test_open_clip_files_equal_pytorch(tmp_path, words, act, kind):
  state = cases.resnet() if kind == "resnet" else cases.vit()
  described = describe(tmp_path, act == "quick_gelu", state, resize_mode="squash")
  source = tmp_path
  if kind == "bin":
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
  elif kind == "pt":  # as a training checkpoint, its text tower a module of its own
    beside = ("visual.", "logit_scale")
    wrapped = {
      f"module.{key if key.startswith(beside) else f'text.{key}'}": value
      for key, value in state.items()
    }
    source = tmp_path / "epoch_3.pt"
    torch.save({"epoch": 3, "state_dict": wrapped}, source)
  else:
    safetensors.torch.save_file(state, tmp_path / "open_clip_model.safetensors")
  read = read_model(source, str(words))
  assert max(gaps(read, state, act)) < CLOSE
  assert read.config.text.act == act and read.config.plain == (kind != "resnet")
  image = read.processor.image
  assert list(image.mean) == described["preprocess_cfg"]["mean"]
  assert list(image.std) == described["preprocess_cfg"]["std"]
  assert not image.keep_aspect and image.image_size == read.config.vision.image_size


def test_a_scripted_clip_of_another_is_read_by_its_description(tmp_path, words):
  state = cases.vit()
  save_scripted(state, tmp_path / "model.pt")
  with pytest.raises(UserError, match=r"which activation.*open_clip_config\.json"):
    read_model(tmp_path / "model.pt", str(words))
  describe(tmp_path, False, state)
  read = read_model(tmp_path / "model.pt", str(words))
  assert read.config.vision.act == read.config.text.act == "gelu"
  assert list(read.processor.image.mean) == [0.5, 0.4, 0.3]


def test_a_name_is_no_reason_to_pass_over_a_description(tmp_path, words):
  state = cases.vit()
  torch.save(state, tmp_path / "TinyCLIP-mine.pt")
  assert read_model(tmp_path / "TinyCLIP-mine.pt", str(words)).config.text.act == "gelu"
  describe(tmp_path, True, state)
  read = read_model(tmp_path / "TinyCLIP-mine.pt", str(words))
  assert read.config.text.act == "quick_gelu"
  assert list(read.processor.image.mean) == [0.5, 0.4, 0.3]


def test_pixels_that_are_left_over_are_in_the_description_alone(tmp_path, words):
  state = cases.vit()
  described = describe(tmp_path, False, state)
  vision = described["model_cfg"]["vision_cfg"]
  safetensors.torch.save_file(state, tmp_path / "open_clip_model.safetensors")

  def read(size):
    vision["image_size"] = size
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    return read_model(tmp_path, str(words))

  found = read(36)  # 4 patches of 8 a side
  assert found.config.vision.image_size == found.processor.image.image_size == 36
  assert max(gaps(found, state, "gelu")) < CLOSE
  assert read([39, 39]).config.vision.image_size == 39
  for size in (31, 40, [36, 38]):
    with pytest.raises(UserError, match=r"says vision_cfg\.image_size"):
      read(size)


@pytest.mark.parametrize("ddp", [False, True])
def test_a_tinyclip_file_equals_pytorch(tmp_path, words, ddp):
  state = cases.vit(width=192)
  torch.save({"state_dict": cases.tinyclip_keys(state, ddp)}, tmp_path / "any.pt")
  read = read_model(tmp_path / "any.pt", str(words))
  assert read.config.text.act == "gelu" and read.config.plain
  assert max(gaps(read, state, "gelu")) < CLOSE


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, words):
  """A pruned TinyCLIP's state dict, and what is read of its file."""
  state, plan = cases.uneven()
  path = tmp_path_factory.mktemp("pruned") / "TinyCLIP-auto.pt"
  cut = cases.pruned(state, plan)
  torch.save(cases.tinyclip_keys(cut), path)
  return cut, read_model(path, str(words))


def test_a_pruned_tinyclip_equals_pytorch(uneven):
  cut, read = uneven
  vision, text = read.config.vision, read.config.text
  assert (vision.width, text.width, vision.head) == (152, 90, 64)
  assert vision.layer_heads == (3, None, 1) and vision.layer_mlps == (300, 77, None)
  assert text.layer_heads == (2, 4, 1) and text.layer_mlps == (55, 0, 200)
  assert max(gaps(read, cut, "gelu")) < CLOSE


def test_the_releases_own_way_to_load_differs_by_its_folded_gates(uneven):
  _, read = uneven
  state, plan = cases.uneven()
  folded = cases.pruned(state, plan, cases.GATE)
  found = gaps(read, folded, "gelu")
  # Measured: 2.5e-6. With gates of 1 it is rounding alone, 2e-7.
  assert 1e-6 < max(found) < 2e-5


def _gradient(config, params, pixels, tokens, remat="none"):
  model = build(config, remat=remat)

  def total(params):
    clip = model.bind(params)
    return (clip.embed_image(pixels) ** 2).sum() + (clip.embed_text(tokens) ** 2).sum()

  return jax.jit(jax.grad(total))(params)


def test_gradients_of_a_pruned_model_are_pytorchs_and_zero_beyond_its_sizes(uneven):
  cut, read = uneven
  pixels, tokens = cases.pictures(24), cases.sentences()
  ours = _gradient(read.config, read.params, pixels, tokens, "pointwise")
  leaves = {k: v.clone().requires_grad_() for k, v in cut.items()}
  image = cases.embed_image(
    leaves, torch.from_numpy(pixels.transpose(0, 3, 1, 2)), "gelu"
  )
  text = cases.embed_text(leaves, torch.from_numpy(tokens).long(), "gelu")
  ((image**2).sum() + (text**2).sum()).backward()
  kernel = np.asarray(ours["vision"]["blocks"]["attention"]["query"]["kernel"])
  want = (
    leaves["visual.transformer.resblocks.0.attn.in_proj_weight"].grad[:192].T.numpy()
  )
  np.testing.assert_allclose(kernel[0], want, rtol=1e-3, atol=1e-5 * np.abs(want).max())
  assert not kernel[1].any() and not kernel[2][:, 64:].any() and kernel[2].any()
  bias = np.asarray(ours["text"]["blocks"]["mlp"]["fc2"]["bias"])
  want = leaves["transformer.resblocks.1.mlp.c_proj.bias"].grad.numpy()
  np.testing.assert_allclose(bias[1], want, rtol=1e-3, atol=1e-5 * np.abs(want).max())


@pytest.fixture(scope="module")
def rn(tmp_path_factory, words):
  """A TinyCLIP with a ResNet: its state dict, and what is read of its file."""
  state = cases.resnet()
  path = tmp_path_factory.mktemp("rn") / "tiny.pt"
  torch.save(cases.tinyclip_keys(state, ddp=True), path)
  return state, read_model(path, str(words))


def test_a_resnet_equals_pytorch(rn):
  state, read = rn
  assert read.config.vision == ResNetConfig(4, (2, 1, 2, 1), 2, 64)
  assert max(gaps(read, state, "gelu")) < CLOSE


def test_statistics_of_batch_norms_get_no_gradient(rn):
  _, read = rn
  inputs = cases.pictures(64, 1), cases.sentences(1)
  found = _gradient(read.config, read.params, *inputs)
  again = _gradient(read.config, read.params, *inputs, "full,none")
  # A key's bias moves no softmax: its gradient is what rounding leaves of zero.
  whole = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(found)))
  for a, b in zip(*map(jax.tree.leaves, (found, again)), strict=True):
    assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a) + 1e-6 * whole
  norm = found["vision"]["stage2_block0"]["norm2"]
  assert not norm["mean"].any() and not norm["var"].any() and norm["scale"].any()


def _pytorch_file(folder):
  spec = importlib.util.spec_from_file_location("exported", folder / "pytorch_clip.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("which", ["uneven", "rn"])
def test_an_export_runs_in_pytorch_alone(request, which, tmp_path):
  state, read = request.getfixturevalue(which)
  fusion = FusionSettings(of="unit", image_weight=0.5, text_weight=2.0)
  write_pretrained(tmp_path, read.config, read.params, fusion)
  exported = _pytorch_file(tmp_path).load(tmp_path)
  pixels = cases.pictures(read.config.vision.image_size)
  tokens = cases.sentences()
  with torch.no_grad():
    image = exported.encode_image(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    text = exported.encode_text(torch.from_numpy(tokens).long())
    fused = exported.fuse(image, text).numpy()
  want = cases.torch_embeddings(state, pixels, tokens, "gelu")
  ours = embeddings(read.config, read.params, pixels, tokens)
  for got, theirs, jaxs in zip((image, text), want, ours, strict=True):
    assert clip_cases.unit_gap(got, theirs) < CLOSE
    assert clip_cases.unit_gap(got, jaxs) < CLOSE
  units = [clip_cases.unit(rows) for rows in want]
  assert clip_cases.unit_gap(fused, 0.5 * units[0] + 2 * units[1]) < CLOSE


@pytest.mark.parametrize("which", ["uneven", "rn"])
def test_an_export_is_bit_identical(request, which, tmp_path):
  state, read = request.getfixturevalue(which)
  write_pretrained(tmp_path, read.config, read.params)
  written = safetensors.torch.load_file(tmp_path / "model.safetensors")
  state = {k: v for k, v in state.items() if "num_batches" not in k}
  assert written.keys() == state.keys()
  for key, tensor in state.items():
    assert torch.equal(written[key], tensor) and written[key].shape == tensor.shape, key
  config, _, params = read_pretrained(tmp_path)
  assert (
    config == read.config == CLIPConfig.from_hf(json.loads(json.dumps(config.to_hf())))
  )
  jax.tree.map(np.testing.assert_array_equal, params, read.params)


@pytest.mark.parametrize("size, cells", [(31, 1), (62, 1), (63, 2), (95, 3)])
def test_a_resnet_looks_at_as_many_cells_as_its_stem_leaves(size, cells):
  config = CLIPConfig(ResNetConfig(4, (1, 1, 1, 1), 2, size))
  model = build(config)
  pixels = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
  found = jax.eval_shape(
    lambda params, pixels: model.bind(params).embed_image(pixels),
    model.abstract(),
    pixels,
  )
  assert config.vision.grid == cells and found.shape == (1, 512)
  theirs = _pytorch_file(Path(build.__code__.co_filename).parent)
  tower = theirs.ResNet(config.to_hf()["vision_config"], 8)
  assert tower(torch.zeros(1, 3, size, size)).shape == (1, 8)


def test_the_pytorch_file_has_our_activations_and_ends_of_text(rn, tmp_path):
  theirs = _pytorch_file(Path(build.__code__.co_filename).parent)
  x = np.linspace(-6, 6, 101, dtype=np.float32)
  assert theirs.ACTIVATIONS.keys() == set(ACTIVATIONS)
  for name, act in theirs.ACTIVATIONS.items():
    np.testing.assert_allclose(
      act(torch.from_numpy(x)).numpy(), activate(jnp.asarray(x), name), atol=1e-6
    )
  _, read = rn
  write_pretrained(tmp_path, read.config, read.params)
  exported, tokens = theirs.load(tmp_path), torch.from_numpy(cases.sentences()).long()
  with torch.no_grad():
    want = exported.encode_text(tokens)
    exported.end = 2  # of old configs: the largest id
    assert torch.equal(exported.encode_text(tokens), want)
    exported.end = 3
    assert not torch.equal(exported.encode_text(tokens), want)


def test_the_pytorch_file_imports_torch_and_safetensors_alone():
  source = Path(build.__code__.co_filename).with_name("pytorch_clip.py").read_text()
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.ImportFrom):
      found.add(node.module.split(".")[0])
    elif isinstance(node, ast.Import):
      found |= {alias.name.split(".")[0] for alias in node.names}
  assert found == {"__future__", "json", "pathlib", "torch", "safetensors"}


def test_clips_vocabulary_from_its_merges(real_data, tmp_path):
  import gzip

  merges = (real_data / "clip_tokenizer" / "merges.txt").read_text().splitlines()[1:]
  file = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
  lines = ["a header", *merges, "more m", "erges x"]
  with gzip.open(file, "wt", encoding="utf-8") as out:
    out.write("\n".join(lines))
  ours = Tokenizer.from_merges(file)
  theirs = Tokenizer.from_folder(real_data / "clip_tokenizer")
  texts = ["a photo of a cat", "café naïve 3.14", "😀 emoji", "don't I'll ! wow!"]
  assert [ours.encode(text) for text in texts] == [theirs.encode(t) for t in texts]
  assert (ours.vocab_size, ours.eos_id) == (49408, 49407)
  file.write_bytes(gzip.compress(b"not merges\n"))
  with pytest.raises(UserError, match="not CLIP's list of merges"):
    Tokenizer.from_merges(file)
  file.write_bytes(b"no gzip")
  with pytest.raises(UserError, match="cannot be read as CLIP's merges"):
    Tokenizer.from_merges(file)


# What is refused.


@pytest.fixture
def tiny(tmp_path):
  """A small OpenCLIP folder, to break: its state dict and its description."""
  state = cases.vit()
  return state, describe(tmp_path, False, state)


def _refused(folder, words, state, match, name="open_clip_model.safetensors"):
  safetensors.torch.save_file(state, folder / name)
  with pytest.raises(UserError, match=match) as caught:
    read_model(folder, str(words))
  return str(caught.value)


def test_missing_and_left_over_keys_are_named(tiny, tmp_path, words):
  state, _ = tiny
  del state["visual.transformer.resblocks.1.mlp.c_fc.weight"]
  del state["transformer.resblocks.0.attn.in_proj_weight"]
  state["visual.extra"] = torch.zeros(2)
  said = _refused(tmp_path, words, state, "2 missing")
  assert "visual.transformer.resblocks.1.mlp.c_fc.weight" in said
  assert "1 left over: visual.extra" in said
  assert "transformer.resblocks.0.attn.in_proj_weight" in said


def test_a_missing_key_that_says_the_shape(tiny, tmp_path, words):
  state, _ = tiny
  del state["text_projection"]
  _refused(tmp_path, words, state, "has no text_projection")


@pytest.mark.parametrize(
  "key, value, match",
  [
    ("vision_cfg.patch_size", 16, "says vision_cfg.patch_size 16, but its tensors"),
    ("text_cfg.no_causal_mask", True, "text_cfg.no_causal_mask=True, which is not"),
    ("vision_cfg.pool_type", "avg", "vision_cfg.pool_type='avg', which is not"),
    ("vision_cfg.timm_model_name", "vit_base_patch16_siglip_224", "a SigLIP, which is"),
    ("vision_cfg.timm_model_name", "fastvit_mci1", "a MobileCLIP, which"),
    ("vision_cfg.timm_model_name", "eva02_base_patch16_clip_224", "an EVA-CLIP, which"),
    ("vision_cfg.timm_model_name", "convnext_base", "an image tower of timm, which"),
    ("multimodal_cfg", {"layers": 12}, "a CoCa, which"),
    ("text_cfg", None, "has no text_cfg"),
    ("vision_cfg", "ViT-B-32", "has vision_cfg='ViT-B-32', which has no fields"),
    ("text_cfg", [1], r"has text_cfg=.1., which has no fields"),
    ("text_cfg.heads", "2", "text_cfg.heads='2', which is no size"),
    ("text_cfg.heads", -2, "text_cfg.heads=-2, which is no size"),
    ("text_cfg.heads", 0, "text_cfg.heads=0, which is no size"),
    ("text_cfg.heads", 3, "text_cfg.heads=3, which does not divide the 128"),
    ("text_cfg.heads", 1000, "text_cfg.heads=1000, which does not divide the 128"),
    ("vision_cfg.head_width", "64", "vision_cfg.head_width='64', which is no size"),
    ("vision_cfg.head_width", 48, "vision_cfg.head_width=48, which does not divide"),
    ("vision_cfg.image_size", [32], r"vision_cfg.image_size=.32., which is no size"),
    ("vision_cfg.layers", [2, 1, 2, 1], "says vision_cfg.layers"),
    ("text_cfg.width", 128.0, "text_cfg.width=128.0, which is no size"),
    ("text_cfg.layers", True, "text_cfg.layers=True, which is no size"),
    ("embed_dim", 999, "says model_cfg.embed_dim 999, but its tensors are of 24"),
    ("embed_dim", "24", "model_cfg.embed_dim='24', which is no size"),
    ("quick_gelu", "false", "model_cfg.quick_gelu='false', which is neither true"),
    ("act_kwargs", {"a": 1}, "model_cfg.act_kwargs={'a': 1}, which is not supported"),
  ],
)
def test_a_description_that_means_something_else(
  tiny, tmp_path, words, key, value, match
):
  state, described = tiny
  *parents, last = key.split(".")
  part = described["model_cfg"]
  for name in parents:
    part = part[name]
  part[last] = value
  (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
  _refused(tmp_path, words, state, match)


def test_fields_without_effect_are_let_through(tiny, tmp_path, words):
  state, described = tiny
  described["model_cfg"] |= {
    "custom_text": True,
    "init_logit_scale": 2.6,
    "unknown": {},
  }
  described["model_cfg"]["vision_cfg"]["patch_dropout"] = 0.5
  described["preprocess_cfg"]["mode"] = "RGB"
  (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
  safetensors.torch.save_file(state, tmp_path / "open_clip_model.safetensors")
  read_model(tmp_path, str(words))


@pytest.mark.parametrize("model", ["ViT-B-32", ["ViT-B-32"]])
def test_a_description_without_fields(tiny, tmp_path, words, model):
  state, _ = tiny
  (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
  _refused(tmp_path, words, state, "has model_cfg=.*, which has no fields")


@pytest.mark.parametrize(
  "settings, match",
  [
    ({"resize_mode": "longest"}, "resizes by 'longest'"),
    ({"interpolation": ["bicubic"]}, r"and \['bicubic'\]; supported"),
    ({"mode": "L"}, "preprocess_cfg.mode='L', which is not supported"),
    ("squash", "has preprocess_cfg='squash', which has no fields"),
  ],
)
def test_a_way_of_preparing_images_that_is_not_supported(
  tiny, tmp_path, words, settings, match
):
  state, described = tiny
  described["preprocess_cfg"] = settings
  (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
  _refused(tmp_path, words, state, match)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_description_that_is_no_json_object(tiny, tmp_path, words, content):
  state, _ = tiny
  (tmp_path / "open_clip_config.json").write_text(content)
  _refused(tmp_path, words, state, "open_clip_config.json")


def test_a_folder_without_its_weights(tiny, tmp_path, words):
  with pytest.raises(UserError, match="no weights beside it"):
    read_model(tmp_path, str(words))


@pytest.mark.parametrize(
  "keys, match",
  [
    (["bge_encoder.layer.0.x", "model_visual.visual.cls_token"], "a VISTA"),
    (["text_decoder.resblocks.0.x", "visual.conv1.weight"], "a CoCa"),
    (["visual.trunk.pos_embed", "logit_bias"], "a SigLIP"),
    (["visual.blocks.0.attn.q_bias"], "an EVA-CLIP"),
    (["image_encoder.model.patch_embed.0.x"], "a MobileCLIP"),
    (["visual.trunk.stem.0.weight"], "an image tower of timm"),
    (["text.transformer.embeddings.x"], "a text tower of transformers"),
    (["vision_model.pre_layrnorm.weight"], "name the folder that holds both"),
    (["alpha", "beta"], "unknown layout .it holds alpha, beta"),
    (["_image_encoder.l0_module.hidden_loga"], "still has gates"),
    (["token_embedding.weight", "visual.conv1.weight"], "which activation"),
  ],
)
def test_other_models_are_refused_by_name(tmp_path, words, keys, match):
  if "gates" in match:
    keys = [*keys, "_t.token_embedding.weight", "_image_encoder.visual.conv1.weight"]
    keys += ["_text_encoder.token_embedding.weight"]
  path = tmp_path / "model.safetensors"
  safetensors.torch.save_file({key: torch.zeros(2, 2) for key in keys}, path)
  with pytest.raises(UserError, match=match):
    read_model(path, str(words))


def test_no_tokenizer_beside_a_file(tmp_path, words):
  torch.save(cases.tinyclip_keys(cases.vit()), tmp_path / "tiny.pt")
  with pytest.raises(UserError, match=r"no tokenizer.*config\.tokenizer\.path"):
    read_model(tmp_path / "tiny.pt")
  cases.tokenizer_folder(tmp_path)
  read = read_model(tmp_path / "tiny.pt")
  tokens = read.processor.tokenizer(["a text that is longer than its context"])
  assert tokens.shape == (1, cases.CONTEXT) and tokens[0, -1] == cases.END
  cases.tokenizer_folder(tmp_path, cases.VOCABULARY + 1)
  with pytest.raises(UserError, match="has 515 entries"):
    read_model(tmp_path / "tiny.pt")


@pytest.mark.parametrize(
  "key, shape, match",
  [
    ("visual.positional_embedding", (11, 192), "no square image"),
    ("visual.transformer.resblocks.0.attn.in_proj_weight", (100, 192), "whole number"),
    ("text_projection", (192,), "not its shape in any CLIP"),
    ("visual.transformer.resblocks.0.attn.in_proj_weight", (), "not its shape"),
    ("visual.transformer.resblocks.1.attn.in_proj_weight", (0, 192), "not its shape"),
    ("transformer.resblocks.1.mlp.c_fc.weight", (), "not its shape"),
    ("token_embedding.weight", (514, 0), "not its shape"),
    ("visual.conv1.weight", (192, 3, 0, 0), "not its shape"),
  ],
)
def test_sizes_that_are_no_model(tmp_path, words, key, shape, match):
  state = cases.vit(width=192)
  state[key] = torch.zeros(shape)
  torch.save(cases.tinyclip_keys(state), tmp_path / "tiny.pt")
  with pytest.raises(UserError, match=match):
    read_model(tmp_path / "tiny.pt", str(words))


class Bomb:
  def __reduce__(self):
    return print, ("run",)


def test_a_pickle_that_is_more_than_tensors_is_refused(tmp_path, words, capsys):
  torch.save({"state_dict": {"a": torch.zeros(1)}, "x": Bomb()}, tmp_path / "a.pt")
  with pytest.raises(UserError, match=r"more than tensors \(print\)"):
    read_model(tmp_path / "a.pt", str(words))
  assert "run" not in capsys.readouterr().out


def _saved(old=False, **what):
  out = io.BytesIO()
  torch.save(what, out, _use_new_zipfile_serialization=not old)
  return out.getvalue()


_NUMBERS = torch.zeros(1000)


@pytest.mark.parametrize(
  "content, match",
  [
    (_saved(a=torch.nn.Linear(2, 2)), r"more than tensors \(torch\.nn\.modules\.lin"),
    (_saved(old=True, a=Bomb()), r"more than tensors \(print\)"),
    (b"", "no file that PyTorch saved"),
    (b"hello", "no file that PyTorch saved"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "no file that PyTorch saved"),
    (pickle.dumps({"a": 1}, 2), "no file that PyTorch saved"),
    (_saved(a=_NUMBERS)[:-100], "damaged, or only a part"),
    (_saved(a=_NUMBERS)[:700], "damaged, or only a part"),
    (_saved(old=True, a=_NUMBERS)[:-100], "damaged, or only a part"),
  ],
)
def test_a_file_that_pytorch_does_not_read_is_refused_in_our_words(
  tmp_path, content, match
):
  path = tmp_path / "a.pt"
  path.write_bytes(content)
  with pytest.raises(UserError, match=match) as caught, open_weights([path]):
    pass
  said = str(caught.value)
  assert str(path) in said and "\n" not in said and "\x1b" not in said
  assert not any(word in said for word in ("weights_only", "trust", "safe_globals"))
  assert not any(word in said for word in ("(101)", "Errno", "operand"))


def test_a_zip_of_another_kind_is_refused(tmp_path):
  with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
    archive.writestr("a.txt", "x")
  with (
    pytest.raises(UserError, match="no file that PyTorch saved"),
    open_weights([tmp_path / "a.pt"]),
  ):
    pass


def test_one_tensor_is_no_model(tmp_path, words):
  torch.save(torch.zeros(3), tmp_path / "a.pt")
  with pytest.raises(UserError, match="holds a Tensor, not weights by name"):
    read_model(tmp_path / "a.pt", str(words))


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_kinds_of_tensors_that_are_not_read(tmp_path, ending):
  path = tmp_path / f"a.{ending}"
  odd = {"a": torch.ones(2).to(torch.float8_e4m3fn), "b": torch.ones(2).cfloat()}
  whole = {"c": torch.ones(2, dtype=torch.bfloat16), "d": torch.arange(2)}
  if ending == "pt":
    odd |= {"e": torch.eye(2).to_sparse(), "f": torch.ones(2, device="meta")}
    torch.save(odd | whole, path)
  else:
    safetensors.torch.save_file(odd | whole, path)
  with open_weights([path]) as tensors:
    for key in odd:
      with pytest.raises(UserError, match=f"{path}: {key} is a tensor of kind"):
        tensors[key]
    np.testing.assert_array_equal(tensors["c"].astype("f4"), [1, 1])
    np.testing.assert_array_equal(tensors["d"], [0, 1])


def test_parameters_are_read_as_their_tensors(tmp_path):
  values = {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.ones(2)}
  torch.save(values, tmp_path / "a.pt")
  with open_weights([tmp_path / "a.pt"]) as tensors:
    np.testing.assert_array_equal(tensors["a"], tensors["b"])


def test_two_names_of_one_tensor(tiny, tmp_path, words):
  state, _ = tiny
  state["module.visual.proj"] = state["visual.proj"].clone()
  safetensors.torch.save_file(state, tmp_path / "open_clip_model.safetensors")
  read_model(tmp_path, str(words))  # the same twice
  state["module.visual.proj"] += 1
  said = _refused(tmp_path, words, state, "two different tensors")
  assert "holds module.visual.proj and visual.proj," in said


def _rewritten(source, target, change):
  """A copy of an archive whose members a function may change: (name, bytes) -> bytes."""
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
    for name in old.namelist():
      content = change(name, old.read(name))
      if content is not None:
        new.writestr(name, content)


@pytest.mark.parametrize("how", ["code", "short", "missing", "rubbish"])
def test_a_scripted_archive_runs_nothing(tmp_path, words, capsys, how):
  save_scripted(cases.vit(), tmp_path / "good.pt")
  bomb = pickle.dumps(collections.OrderedDict(a=Bomb()), protocol=2)

  def change(name, content):
    if name.endswith("/data.pkl"):
      return {"code": bomb, "rubbish": b"\x80\x02("}.get(how, content)
    if "/data/" in name and name.endswith("/0"):
      return {"short": content[:-4], "missing": None}.get(how, content)
    return content

  _rewritten(tmp_path / "good.pt", tmp_path / "bad.pt", change)
  with pytest.raises(UserError, match="TorchScript archive that holds more"):
    read_model(tmp_path / "bad.pt", str(words))
  assert "run" not in capsys.readouterr().out


def test_a_scripted_archive_is_read_whole(tmp_path):
  state = {"a.b.c": torch.arange(6.0).reshape(2, 3), "d": torch.tensor(2.0)}
  state["e"] = torch.arange(4)
  save_scripted({**state, "t": state["a.b.c"].T}, tmp_path / "small.pt")
  with open_weights([tmp_path / "small.pt"]) as tensors:
    assert set(tensors) == {*state, "t"}
    for key, value in state.items():
      np.testing.assert_array_equal(tensors[key], value.numpy())
    np.testing.assert_array_equal(tensors["t"], state["a.b.c"].T.numpy())


def test_zero_sized_tensors_of_a_model_that_is_not_pruned():
  shapes = {k: tuple(v.shape) for k, v in cases.vit().items()}
  shapes["transformer.resblocks.1.mlp.c_fc.weight"] = (0, 128)
  with pytest.raises(UserError, match=r"c_fc\.weight is \(0, 128\)"):
    native_config(shapes, "the file", act="gelu")


@pytest.mark.parametrize(
  "lost, head, match",
  [
    ("visual.layer3", 64, "has no visual.layer3: it is not a whole ResNet"),
    ("transformer.resblocks", 64, "has no transformer.resblocks"),
    ("none", 48, "128 channels are no heads of 48"),
    ("token_embedding.weight", 64, "has no token_embedding.weight"),
  ],
)
def test_tensors_that_are_no_whole_model(lost, head, match):
  shapes = {k: tuple(v.shape) for k, v in cases.resnet().items()}
  shapes = {k: v for k, v in shapes.items() if not k.startswith(lost)}
  with pytest.raises(UserError, match=match):
    native_config(shapes, "the file", act="gelu", vision_head=head)


def test_a_width_of_no_whole_heads():
  shapes = {k: tuple(v.shape) for k, v in cases.vit().items()}
  for i in (0, 1):
    shapes[f"visual.transformer.resblocks.{i}.attn.in_proj_weight"] = (288, 128)
  with pytest.raises(UserError, match=r"128 channels of visual\.transformer are no"):
    native_config(shapes, "the file", act="gelu", vision_head=48)
