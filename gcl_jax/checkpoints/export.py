"""From a run to a folder that PyTorch users load, with a card that says how."""

from __future__ import annotations

import os
from pathlib import Path

from gcl_jax._version import __version__
from gcl_jax.checkpoints.manager import read_run
from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings
from gcl_jax.models import write_pretrained

_CARD = "README.md"


def export_run(
  workdir: str | os.PathLike,
  output: str | os.PathLike,
  *,
  step: int | None = None,
  table: str = "",
) -> Path:
  """Writes weights, config, processor files and a model card.

  Args:
    workdir: a run's folder.
    output: a new or empty folder, or an earlier export.
    step: which checkpoint; None is the newest.
    table: Markdown for the card: what the evaluation found.

  Returns:
    The folder, which `CLIPModel.from_pretrained` and `CLIPProcessor` load. Weights are
    bit-identical to the run's.

  Raises:
    UserError: no such checkpoint, or the output holds something else.
  """
  output = Path(output)
  check_output(output)
  model, params, processor, config = read_run(workdir, step)
  fusion = _settings(model.fusion, params)
  output.mkdir(parents=True, exist_ok=True)
  processor.save(output)
  write_pretrained(output, model.config, params, fusion)
  (output / _CARD).write_text(model_card(config.name, fusion, table))
  return output


def check_output(output: Path) -> None:
  """Refuses a folder that holds something other than an earlier export.

  Raises:
    UserError: it does, or it is a file.
  """
  if output.exists() and not output.is_dir():
    raise UserError(f"--output={output} is a file: name a folder.")
  names = {p.name for p in output.iterdir()} if output.is_dir() else set()
  if names and not {"config.json", "gcl_jax.json"} <= names:
    raise UserError(
      f"--output={output} holds something else ({', '.join(sorted(names)[:3])}): name a "
      "new or empty folder."
    )


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


def model_card(name: str, fusion: FusionSettings, table: str) -> str:
  """The README.md of an exported folder; its Python is tested as printed."""
  unit = fusion.of == "unit"
  image = "normalize(image, dim=-1)" if unit else "image"
  text = "normalize(text, dim=-1)" if unit else "text"
  results = f"\n## Results\n\n{table}\n" if table else ""
  return f"""---
library_name: transformers
tags: [clip, multimodal-retrieval, gcl-2509.25638]
---
# {name}

One embedding space for images, texts and documents with both: a CLIP fine-tuned with
Generalized Contrastive Learning (arXiv 2509.25638) by gcl_jax {__version__}. Compare
embeddings by their dot product. Fused embeddings of documents with both, in PyTorch
(from inside this folder; elsewhere write its path for the dot):

```python
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained(".").eval()
processor = CLIPProcessor.from_pretrained(".")
inputs = processor(text=["a caption"], images=[Image.open("picture.jpg")],
                   return_tensors="pt", padding=True, truncation=True)
with torch.no_grad():
  image = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)
  text = model.text_projection(model.text_model(inputs["input_ids"]).pooler_output)
fused = normalize({fusion.image_weight} * {image} + {fusion.text_weight} * {text}, dim=-1)
```

An image alone is `normalize(image, dim=-1)`, a text alone `normalize(text, dim=-1)`.
In JAX: `gcl_jax.load(folder).embed(images=[...], texts=[...])`, with `None` where a
document lacks one of the two.
{results}"""
