"""Small evaluations, as `gcl_jax.evaluate` would write them."""

import json

import numpy as np
from PIL import Image

from gcl_jax.evaluation import build_items, evaluate_nine

STRANGE = '<script>alert("x")</script> & <b>'


def evaluation(gap=0.0, items=30, strange=False, **more):
  """The result of a model whose modalities lie `gap` apart."""
  base = np.random.default_rng(0).normal(size=(items, 16))
  base /= np.linalg.norm(base, axis=1, keepdims=True)

  def embed(images, texts):
    rows = []
    for image, text in zip(images, texts, strict=True):
      m = 1 if image is None else 0 if text is None else 2
      k = int(text.split()[-1]) if image is None else image.getpixel((0, 0))[0]
      rows.append(np.concatenate([base[k], gap * np.eye(3)[m]]))
    rows = np.array(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

  says = STRANGE if strange else "a thing"
  records = [
    {
      "id": f"{says} {k}",
      "images": [Image.new("RGB", (8, 6), (k, 90 * v, 0)) for v in range(2)],
      "texts": [f"{says}, caption {v} of {k}" for v in range(2)],
    }
    for k in range(items)
  ]
  arguments = {"points": 10, "examples": 2, **more}
  result = evaluate_nine(build_items(records), embed, **arguments)
  return {**result, "checkpoint": f"runs/gap{gap}", "split": "eval"}


def write(path, result):
  path.write_text(json.dumps(result))
  return str(path)


def write_run(folder, losses):
  """A run's folder, as far as a report reads it."""
  folder.mkdir(parents=True, exist_ok=True)
  lines = [{"step": 0, "eval/plain.local.same.R@1": 1.0}]
  lines += [{"step": step, "loss": loss} for step, loss in losses]
  text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9'
  (folder / "metrics.jsonl").write_text(text)
  return str(folder)
