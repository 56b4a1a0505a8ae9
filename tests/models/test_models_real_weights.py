"""Published files against published numbers: `pytest -m real_weights`.

$GCL_JAX_WEIGHTS names a folder with some of: `ViT-B-32.pt` (OpenAI's archive),
`000000039769.jpg` (of COCO val2017), TinyCLIP's release files `TinyCLIP-*.pt`, and CLIP's
tokenizer files (or $GCL_JAX_DATA has them). What is not there is skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.real_weights

# Vision and text parameters of the release's models, in millions, the token table left out
# of the text's as in their names. Of the pruned ones only what the names say is known.
_TINYCLIP = {
  "ViT-8M-16-Text-3M": (8.28, 2.52),
  "ViT-39M-16-Text-19M": (38.59, 19.21),
  "ViT-40M-32-Text-19M": (39.69, 19.21),
  "ViT-61M-32-Text-29M": (61.41, 28.67),
  "ResNet-19M-Text-19M": (19, 19),
  "ResNet-30M-Text-29M": (30, 29),
  "auto-ViT-63M-32-Text-31M": (63, 31),
  "auto-ViT-45M-32-Text-18M": (45, 18),
  "auto-ViT-22M-32-Text-10M": (22, 10),
}


@pytest.fixture
def folder():
  named = os.environ.get("GCL_JAX_WEIGHTS")
  if not named:
    pytest.skip("$GCL_JAX_WEIGHTS names no folder")
  return Path(named)


def _there(path: Path) -> Path:
  if not path.is_file():
    pytest.skip(f"{path} is not there")
  return path


def _tokenizer(folder: Path, real_data: Path) -> str:
  own = (folder / "vocab.json").is_file() or (folder / "tokenizer.json").is_file()
  return str(folder if own else real_data / "clip_tokenizer")


def test_openais_b32_gives_the_published_logits(folder, real_data):
  import gcl_jax

  file = _there(folder / "ViT-B-32.pt")
  image = _there(folder / "000000039769.jpg")
  embedder = gcl_jax.load(file, tokenizer=_tokenizer(folder, real_data))
  rows = embedder.embed([image], [None])
  texts = embedder.embed(None, ["a photo of a cat", "a photo of a dog"])
  logits = np.exp(embedder.params["logit_scale"]) * rows @ texts.T
  # Of transformers' own test of these weights, at its tolerance.
  np.testing.assert_allclose(logits, [[24.5701, 19.3049]], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", list(_TINYCLIP))
def test_tinyclips_files_hold_what_their_names_say(folder, real_data, name):
  import jax

  from gcl_jax.models import read_model

  files = sorted(folder.glob(f"TinyCLIP-{name}*.pt"))
  if not files:
    pytest.skip(f"no TinyCLIP-{name}*.pt in {folder}")
  for file in files:
    read = read_model(file, _tokenizer(folder, real_data))

    def millions(tree):
      return sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(tree)) / 1e6

    vision = millions(read.params["vision"]) + millions(read.params["image_projection"])
    text = millions(read.params["text"]) + millions(read.params["text_projection"])
    text -= read.params["text"]["token_embedding"]["embedding"].size / 1e6
    assert (vision, text) == pytest.approx(_TINYCLIP[name], abs=1.0)
    assert read.config.plain == name.startswith("ViT")
