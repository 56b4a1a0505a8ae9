"""From a run to a folder that PyTorch users load, with a card that says how."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from pathlib import Path

from gcl_jax._version import __version__
from gcl_jax.checkpoints.folder import Folder
from gcl_jax.checkpoints.manager import read_run
from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings
from gcl_jax.models import (
  PTH,
  VISTA_SHAPES,
  Config,
  VistaConfig,
  write_pretrained,
  write_vista,
)

_CARD = "README.md"
# Lies in a folder for as long as we may throw it away, and is the last to go.
_MARK = ".gcl_jax_export"
_FILES = {
  _CARD,
  PTH,
  "config.json",
  "gcl_jax.json",
  "merges.txt",
  "model.safetensors",
  "preprocessor_config.json",
  "pytorch_clip.py",
  "sentencepiece.bpe.model",
  "special_tokens_map.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "vocab.json",
  "vocab.txt",
}


def export_run(
  workdir: Folder,
  output: str | os.PathLike,
  *,
  step: int | None = None,
  table: str = "",
) -> Path:
  """Writes weights, config, processor files and a model card.

  All of it is written to `<output>.part` and renamed at the end: an export that was
  interrupted leaves the output as it was, and the next one starts over.

  Args:
    workdir: a run's folder.
    output: a new or empty folder, or an earlier export.
    step: which checkpoint; None is the newest.
    table: Markdown for the card: what the evaluation found.

  Returns:
    The folder, which `CLIPModel.from_pretrained` and `CLIPProcessor` load; where
    `CLIPModel` has no such shape, the `pytorch_clip.py` inside loads it; of a VISTA a
    `.pth` for FlagEmbedding's `Visualized_BGE`. Weights are bit-identical to the run's.

  Raises:
    UserError: no such checkpoint, the output (or a folder beside it that the export
      needs) holds something else, or it cannot be written.
  """
  output = Path(output)
  check_output(output)
  model, params, processor, config = read_run(workdir, step)
  fusion = _settings(model.fusion, params)
  place = output.resolve()  # renaming would replace a link, not the folder behind it
  part = _beside(place, "part")
  try:
    _discard(part)
    part.mkdir(parents=True)
    (part / _MARK).touch()
    processor.save(part)
    if isinstance(model.config, VistaConfig):
      write_vista(part, model.config, params, pth=True)
      card = vista_card(config.name, model.config, table)
    else:
      write_pretrained(part, model.config, params, fusion)
      card = model_card(config.name, fusion, table, model.config.plain)
    (part / _CARD).write_text(card)
    _put_in_place(part, place)
  except OSError as error:
    raise UserError(
      f"--output={output} cannot be written ({error.strerror or error}): is there room, "
      f"and may you write to {place.parent}?"
    ) from error
  return output


def check_output(output: Path) -> None:
  """Refuses a folder that holds something other than an earlier export.

  Also refuses where `<output>.part` or `<output>.old`, which an export writes and
  deletes, holds something that no export of ours left there.

  Raises:
    UserError: it does, or it is a file, or an address.
  """
  if re.match(r"\w+:/", str(output)):  # a Path has lost the second slash
    raise UserError(
      f"--output={output}: an export is a folder of this machine; copy it from there."
    )
  if output.exists() and not output.is_dir():
    raise UserError(f"--output={output} is a file: name a folder.")
  others = _others(output)
  if others:
    raise UserError(
      f"--output={output} holds something else ({', '.join(others[:3])}): name a "
      "new or empty folder."
    )
  for word in ("part", "old"):
    beside = _beside(output.resolve(), word)
    if _is_ours(beside):
      continue
    raise UserError(
      f"{beside} is in the way: an export writes there first, and it holds something "
      "else. Move it, or name another --output."
    )


def _beside(output: Path, word: str) -> Path:
  return output.with_name(f"{output.name}.{word}")


def _others(folder: Path) -> list[str]:
  """What keeps a folder from being an earlier export (or empty, or absent)."""
  names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
  if {"config.json", "gcl_jax.json"} <= names:
    names -= _FILES
  return sorted(names - {_MARK})


def _is_ours(folder: Path) -> bool:
  if not folder.exists() or (folder.is_dir() and (folder / _MARK).exists()):
    return True
  return folder.is_dir() and not _others(folder)


def _discard(folder: Path) -> None:
  """Deletes a folder of ours, the mark last: stopped halfway, it is still ours."""
  if not folder.exists():
    return
  for path in folder.iterdir():
    if path.is_dir():
      shutil.rmtree(path)
    elif path.name != _MARK:
      path.unlink()
  (folder / _MARK).unlink(missing_ok=True)
  folder.rmdir()


def _put_in_place(part: Path, output: Path) -> None:
  """Renames `part` to `output`; an earlier export there is gone only afterwards."""
  old = _beside(output, "old")
  _discard(old)
  (part / _MARK).unlink()
  if output.exists():
    (output / _MARK).touch()
    output.rename(old)
  part.rename(output)
  _discard(old)


def _settings(fusion: FusionSettings, params: dict) -> FusionSettings:
  """The fusion as numbers, learned or not: that is what a user of the folder needs."""
  if not fusion.learned:
    return fusion
  weights = params["fusion"]
  return FusionSettings(
    of=fusion.of,
    image_weight=float(weights["image_weight"]),
    text_weight=float(weights["text_weight"]),
  )


def model_card(
  name: str, fusion: FusionSettings, table: str, plain: bool = True
) -> str:
  """The README.md of an exported folder; its Python is tested as printed.

  `plain`: whether transformers' `CLIPModel` loads the folder.
  """
  results = f"\n## Results\n\n{table}\n" if table else ""
  return f"""---
library_name: {"transformers" if plain else "pytorch"}
tags: [clip, multimodal-retrieval, gcl-2509.25638]
---
# {name}

One embedding space for images, texts and documents with both: a CLIP trained with
Generalized Contrastive Learning (arXiv 2509.25638) by gcl_jax {__version__}. Compare
embeddings by their dot product. Fused embeddings of documents with both, in PyTorch
(from inside this folder; elsewhere write its path for the dot):

```python
{_with_transformers(fusion) if plain else _WITH_OUR_FILE}```

An image alone is `normalize(image, dim=-1)`, a text alone `normalize(text, dim=-1)`.
In JAX: `gcl_jax.load(folder).embed(images=[...], texts=[...])`, with `None` where a
document lacks one of the two.
{results}"""


def _with_transformers(fusion: FusionSettings) -> str:
  unit = fusion.of == "unit"
  image = "normalize(image, dim=-1)" if unit else "image"
  text = "normalize(text, dim=-1)" if unit else "text"
  return f"""from PIL import Image
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained(".").requires_grad_(False)
processor = CLIPProcessor.from_pretrained(".")
inputs = processor(text=["a caption"], images=[Image.open("picture.jpg")],
                   return_tensors="pt", padding=True, truncation=True)
image = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)
text = model.text_projection(model.text_model(inputs["input_ids"]).pooler_output)
fused = normalize({fusion.image_weight} * {image} + {fusion.text_weight} * {text}, dim=-1)
"""


# A pruned tower or a ResNet: the model is in a file of the folder, which needs torch and
# safetensors; the processor is transformers', and could be any that makes the same inputs.
_WITH_OUR_FILE = """from PIL import Image
from torch.nn.functional import normalize
from transformers import CLIPProcessor

from pytorch_clip import load

model = load(".").requires_grad_(False)
processor = CLIPProcessor.from_pretrained(".")
inputs = processor(text=["a caption"], images=[Image.open("picture.jpg")],
                   return_tensors="pt", padding=True, truncation=True)
image = model.encode_image(inputs["pixel_values"])
text = model.encode_text(inputs["input_ids"])
fused = model.fuse(image, text)
"""


_PUBLISHED = {config: name for name, config in VISTA_SHAPES.items()}
_ORIGINALS = {"VISTA-base": "bge-base-en-v1.5", "VISTA-m3": "bge-m3"}


def vista_card(name: str, config: VistaConfig, table: str) -> str:
  """The README.md of an exported VISTA."""
  shape = dataclasses.replace(config, logit_scale_init=VistaConfig.logit_scale_init)
  original = _ORIGINALS.get(_PUBLISHED.get(shape, ""))
  pytorch = ""
  if original:
    pytorch = f"""
In PyTorch, with FlagEmbedding's `visual_bge` (from inside this folder):

```python
from visual_bge.modeling import Visualized_BGE

model = Visualized_BGE(model_name_bge="{original}", from_pretrained=".",
                       model_weight="{PTH}").eval()
fused = model.encode(image="picture.jpg", text="a caption")
```
"""
  results = f"\n## Results\n\n{table}\n" if table else ""
  return f"""---
tags: [visualized-bge, multimodal-retrieval, gcl-2509.25638]
---
# {name}

One embedding space for images, texts and documents with both: a VISTA trained with
Generalized Contrastive Learning (arXiv 2509.25638) by gcl_jax {__version__}. Compare
embeddings by their dot product.
{pytorch}
In JAX: `gcl_jax.load(folder).embed(images=[...], texts=[...])`, with `None` where a
document lacks one of the two.
{results}"""


def in_pytorch(config: Config, folder: Path) -> str:
  """How PyTorch loads an exported folder, in a few words."""
  if isinstance(config, VistaConfig):
    return f"FlagEmbedding's Visualized_BGE with model_weight={str(folder / PTH)!r}"
  if config.plain:
    return f"CLIPModel.from_pretrained({str(folder)!r})"
  return f"load from {folder / 'pytorch_clip.py'}"
