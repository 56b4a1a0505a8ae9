"""What an exported folder says of itself: its model card, and how PyTorch loads it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gcl_jax._version import __version__
from gcl_jax.fusion import FusionSettings
from gcl_jax.models import PTH, VISTA_SHAPES, Config, VistaConfig


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


# The text encoders that FlagEmbedding's Visualized_BGE knows, by our names of the shapes.
_ENCODERS = {"VISTA-base": "bge-base-en-v1.5", "VISTA-m3": "bge-m3"}


def visualized_bge(config: VistaConfig) -> str:
  """The `model_name_bge` by which FlagEmbedding loads the shape; "" of any other."""
  shape = dataclasses.replace(config, logit_scale_init=VistaConfig.logit_scale_init)
  names = [name for name, known in VISTA_SHAPES.items() if known == shape]
  return _ENCODERS[names[0]] if names else ""


def vista_card(name: str, config: VistaConfig, table: str) -> str:
  """The README.md of an exported VISTA."""
  encoder = visualized_bge(config)
  pytorch = f"""
No class of PyTorch's holds this shape: `{PTH}` has its tensors by the names of
FlagEmbedding's `Visualized_BGE`, which knows the two published shapes alone.
"""
  if encoder:
    pytorch = f"""
In PyTorch, with FlagEmbedding's `visual_bge` (from inside this folder):

```python
from visual_bge.modeling import Visualized_BGE

model = Visualized_BGE(model_name_bge="{encoder}", from_pretrained=".",
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
    if not visualized_bge(config):
      return f"no class holds this shape; its tensors are in {folder / PTH}"
    return f"FlagEmbedding's Visualized_BGE with model_weight={str(folder / PTH)!r}"
  if config.plain:
    return f"CLIPModel.from_pretrained({str(folder)!r})"
  return f"load from {folder / 'pytorch_clip.py'}"
