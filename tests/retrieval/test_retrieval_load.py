"""The embedder and `load` with a random CLIP, from a folder and from a run."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image

import gcl_jax
from gcl_jax import sharding
from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings, fuse
from gcl_jax.models import CLIPConfig, build, write_pretrained
from gcl_jax.processing import Tokenizer, default_clip_processor
from gcl_jax.retrieval import Embedder, load

TEXTS = ["a red circle", "", "zebra 7", "three green triangles " * 4, "word " * 60]
SETTINGS = FusionSettings(of="unit", image_weight=0.7, text_weight=1.3)


@pytest.fixture(scope="module")
def processor():
  tokenizer = Tokenizer.train(TEXTS, vocab_size=560, max_length=40)
  return default_clip_processor(16, tokenizer)


@pytest.fixture(scope="module")
def config(processor):
  tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
  tower |= {"intermediate_size": 32, "hidden_act": "gelu"}
  ids = {"eos_token_id": processor.tokenizer.eos_id}
  ids |= {"bos_token_id": processor.tokenizer.bos_id}
  ids |= {"pad_token_id": processor.tokenizer.pad_id}
  size = {"vocab_size": processor.tokenizer.vocab_size, "max_position_embeddings": 40}
  return CLIPConfig.from_hf(
    {
      "projection_dim": 12,
      "text_config": tower | ids | size,
      "vision_config": tower | {"image_size": 16, "patch_size": 8},
    }
  )


@pytest.fixture(scope="module")
def model(config):
  return build(config, fusion=SETTINGS)


@pytest.fixture(scope="module")
def params(model):
  rng = np.random.default_rng(0)  # init would cost seconds to compile
  return jax.tree.map(
    lambda leaf: np.float32(0.3) * rng.standard_normal(leaf.shape, np.float32),
    model.abstract(),
  )


@pytest.fixture(scope="module")
def documents():
  rng = np.random.default_rng(0)
  pictures = [
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)) for _ in range(9)
  ]
  texts = [TEXTS[k % 5] for k in range(9)]
  images = [None if k % 3 == 0 else picture for k, picture in enumerate(pictures)]
  texts = [None if k % 3 == 1 else text for k, text in enumerate(texts)]
  return images, texts


def test_rows_are_the_models_own(model, params, processor, documents):
  images, texts = documents
  got = Embedder(model, params, processor, batch_size=8).embed(images, texts)
  assert got.shape == (9, 12)
  np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
  pixels = np.stack(
    [processor.image.pixels(i or Image.new("RGB", (1, 1))) for i in images]
  )
  raw = functools.partial(_raw, model, processor.image)
  image, text, fused = jax.jit(raw)(
    params, pixels, processor.tokenizer([text or "" for text in texts])
  )
  assert not np.allclose(fused, image, atol=0.1)
  for k in range(9):
    want = (text, image, fused)[k % 3][k]
    np.testing.assert_allclose(got[k], want / np.linalg.norm(want), atol=2e-6)


def _raw(model, image_processor, params, pixels, tokens):
  """Both towers' outputs and the fused bank, at full length."""
  clip = model.bind(params)
  pixels = image_processor.normalize(pixels)
  fused = fuse(*clip.embed_pair(pixels, tokens))
  return clip.embed_image(pixels), clip.embed_text(tokens), fused


def test_rows_do_not_depend_on_batch_size_or_devices(
  model, params, processor, documents
):
  one = sharding.make_mesh(devices=jax.devices()[:1])
  want = Embedder(model, params, processor, batch_size=1, mesh=one).embed(*documents)
  for mesh, size in ((None, 64), (one, 2)):
    embedder = Embedder(model, params, processor, batch_size=size, mesh=mesh)
    np.testing.assert_allclose(embedder.embed(*documents), want, atol=1e-6)


def test_a_folder_written_and_loaded(
  config, model, params, processor, documents, tmp_path
):
  processor.save(tmp_path)
  write_pretrained(tmp_path, config, params, SETTINGS)
  embedder = gcl_jax.load(tmp_path)
  assert embedder.model.fusion == SETTINGS
  assert embedder.config == config
  assert embedder.processor.image == processor.image
  want = Embedder(model, params, processor).embed(*documents)
  np.testing.assert_array_equal(embedder.embed(*documents), want)
  with pytest.raises(UserError, match="has no step 3"):
    load(tmp_path, step=3)
  (tmp_path / "preprocessor_config.json").unlink()
  with pytest.raises(UserError, match="preprocessor_config"):
    load(tmp_path)


def test_pytorch_gives_the_same_rows(config, params, processor, documents, tmp_path):
  import torch
  from transformers import CLIPModel, CLIPProcessor

  processor.save(tmp_path)
  write_pretrained(tmp_path, config, params, SETTINGS)
  clip, theirs = (
    CLIPModel.from_pretrained(tmp_path),
    CLIPProcessor.from_pretrained(tmp_path),
  )
  images = [image for image in documents[0] if image is not None]
  inputs = theirs(
    text=TEXTS, images=images, return_tensors="pt", padding=True, truncation=True
  )
  with torch.no_grad():
    out = clip(**inputs)
  embedder = load(tmp_path)
  got = embedder.embed(texts=TEXTS), embedder.embed(images)
  np.testing.assert_allclose(got[0], out.text_embeds, atol=2e-5)
  np.testing.assert_allclose(got[1], out.image_embeds, atol=2e-5)


def test_a_run_is_read_by_its_room(model, params, processor, tmp_path, monkeypatch):
  asked = []

  def read_run(folder, step):
    asked.append((folder, step))
    return model, params, processor, {"seed": 1}

  (tmp_path / "run.json").write_text('{"gcl_jax_run": 1}')
  monkeypatch.setattr("gcl_jax.checkpoints.read_run", read_run)
  embedder = load(tmp_path, step=4, batch_size=8)
  assert asked == [(tmp_path, 4)]
  assert embedder.config == {"seed": 1}
  assert embedder.embed(texts=["a red circle"]).shape == (1, 12)


def test_nothing_to_load_is_a_user_error(tmp_path):
  with pytest.raises(UserError):
    load(tmp_path / "nowhere")
  with pytest.raises(UserError):
    load(tmp_path)


def test_a_runs_vocabulary_is_its_own(tiny_run, tmp_path):
  Tokenizer.train(["other words"], 520, 32).save(tmp_path)
  with pytest.raises(UserError, match="holds another vocabulary"):
    load(tiny_run, tokenizer=str(tmp_path))
