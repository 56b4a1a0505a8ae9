"""Documents embedded a second: `gcl_jax.embed` beside plain PyTorch, and by stage.

    python -m benchmarks.embed --output=embed.json

Both sides embed the same documents of a photograph and a caption, from files to unit
vectors, with the same random weights. Ours writes an index as the command does. The other
is `transformers` as its users call it: pictures opened and put through `CLIPProcessor` a
batch at a time, `CLIPModel` without gradients, features added and normalised. That their
vectors agree is checked. They are timed in turn in one process with as many threads;
`ratio` is the median over the turns of PyTorch's time divided by the side's own. The
stages of ours are also timed one by one, each alone on the machine.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from benchmarks.input import cores
from benchmarks.step import recipe
from gcl_jax import command_line
from gcl_jax.errors import UserError

_FLAGS = flags.FLAGS
_APART = 2e-3  # of unit vectors: the two resize pictures to within a grey level


def _define_flags() -> None:
  flags.DEFINE_bool("quick", False, "fewer documents, one turn")
  flags.DEFINE_string("model", "TinyCLIP-ViT-8M-16-Text-3M", "a named shape")
  flags.DEFINE_string(
    "data", os.environ.get("GCL_JAX_DATA", "../shared/data"), "holds flickr8k"
  )
  flags.DEFINE_integer("documents", 512, "embedded by each side in a turn")
  flags.DEFINE_integer("batch_size", 64, "documents at a time")
  flags.DEFINE_integer("turns", 3, "that every side has")
  flags.DEFINE_string("output", "", "the JSON file of rows")


def main() -> None:
  """Measures, prints the table and writes the rows."""
  documents, turns = _FLAGS.documents, _FLAGS.turns
  if _FLAGS.quick:
    documents, turns = min(documents, 128), 1
  config = recipe(_FLAGS.model, Path(_FLAGS.data), _FLAGS.batch_size)
  rows = measure(config, documents=documents, turns=turns)
  print(table(rows), flush=True)
  if _FLAGS.output:
    Path(_FLAGS.output).write_text(json.dumps(rows, indent=1) + "\n")


class Some:
  """The first records of a source."""

  def __init__(self, source: Any, count: int):
    self._source, self._count = source, min(count, len(source))

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, k: int) -> Any:
    return self._source[k]


def measure(config: Any, *, documents: int, turns: int) -> list[dict[str, Any]]:
  """The JSON rows.

  Raises UserError where PyTorch is not installed.
  """
  if find_spec("torch") is None:
    raise UserError("the other side of this benchmark needs PyTorch: pip install torch")
  import jax
  import torch

  from gcl_jax.data import open_source
  from gcl_jax.retrieval import Embedder
  from gcl_jax.training.start import make_start

  torch.set_num_threads(cores())
  source = Some(open_source(config.data, split=config.data.train_split), documents)
  start = make_start(config, source, None, False)
  embedder = Embedder(
    start.model,
    start.params(),
    start.processor,
    batch_size=config.batch_size,
    threads=cores(),
  )
  sides: dict[str, Callable[[Any], np.ndarray]] = {
    "pytorch": PyTorch(embedder, config.batch_size),
    "gcl_jax": lambda records: ours(records, embedder),
  }
  vectors = {side: call(source) for side, call in sides.items()}  # and warms up
  apart = float(np.abs(vectors["pytorch"] - vectors["gcl_jax"]).max())
  if apart > _APART:
    raise AssertionError(f"the two sides do not compute the same: {apart}")
  seconds: dict[str, list[float]] = {side: [] for side in sides}
  for _ in range(turns):
    for side, call in sides.items():
      began = time.perf_counter()
      call(source)
      seconds[side].append(time.perf_counter() - began)
  shared = {
    "model": config.model.name,
    "documents": len(source),
    "batch": config.batch_size,
    "data": (config.data.path and Path(config.data.path).name) or "made up",
    "device": jax.devices()[0].device_kind,
    "threads": cores(),
    "turns": turns,
    "load": os.getloadavg()[0],
    "apart": apart,
  }
  rows = [
    shared
    | {
      "what": side,
      "items_per_s": len(source) / statistics.median(seconds[side]),
      "ratio": statistics.median(
        other / own
        for other, own in zip(seconds["pytorch"], seconds[side], strict=True)
      ),
    }
    for side in sides
  ]
  return rows + [
    shared | {"what": f"stage {name}", "items_per_s": rate, "ratio": None}
    for name, rate in stages(source, embedder).items()
  ]


def ours(records: Any, embedder: Any) -> np.ndarray:
  """Writes an index as the command does; its vectors."""
  from gcl_jax.retrieval import read_index
  from gcl_jax.retrieval.corpus import embed_corpus
  from gcl_jax.retrieval.store_writer import IndexWriter

  dimension = embedder.model.config.projection_dim
  settings = {
    "model": {},
    "dimension": dimension,
    "dtype": "float32",
    "data": {},
    "split": "",
  }
  with tempfile.TemporaryDirectory(prefix="gcl_jax_embed_") as folder:
    writer = IndexWriter(folder, settings, 1)
    embed_corpus(records, embedder, writer, [0], shard_size=len(records))
    writer.finish()
    return np.array(read_index(folder).vectors[:])


class PyTorch:
  """`transformers.CLIPModel` with our weights, called as its documentation does."""

  def __init__(self, embedder: Any, batch_size: int):
    import torch
    import transformers

    from gcl_jax.models.convert import to_hf

    config = embedder.model.config
    self._torch, self._batch_size = torch, batch_size
    self._model = transformers.CLIPModel(
      transformers.CLIPConfig.from_dict(config.to_hf())
    ).eval()
    params = _to_numpy(embedder.params)
    tensors = {k: torch.tensor(v) for k, v in to_hf(params, config).items()}
    self._model.load_state_dict(tensors)
    with tempfile.TemporaryDirectory(prefix="gcl_jax_embed_") as folder:
      embedder.processor.save(folder)
      self._processor = transformers.CLIPProcessor.from_pretrained(folder)

  def __call__(self, records: Any) -> np.ndarray:
    """(N, D) float32 unit rows."""
    torch, out = self._torch, []
    for first in range(0, len(records), self._batch_size):
      batch = [
        records[k] for k in range(first, min(first + self._batch_size, len(records)))
      ]
      inputs = self._processor(
        images=[_opened(record["images"][0]) for record in batch],
        text=[record["texts"][0] for record in batch],
        return_tensors="pt",
        padding=True,
        truncation=True,
      )
      with torch.no_grad():
        image = self._model.visual_projection(
          self._model.vision_model(inputs["pixel_values"]).pooler_output
        )
        text = self._model.text_projection(
          self._model.text_model(
            inputs["input_ids"], attention_mask=inputs["attention_mask"]
          ).pooler_output
        )
        out.append(torch.nn.functional.normalize(image + text).numpy())
    return np.concatenate(out)


def _opened(image: Any) -> Image.Image:
  opened = image if isinstance(image, Image.Image) else Image.open(image)
  return opened.convert("RGB")


def _to_numpy(tree: Any) -> Any:
  import jax

  return jax.tree.map(np.asarray, tree)


def stages(records: Any, embedder: Any) -> dict[str, float]:
  """Items a second of each stage with the machine to itself."""
  rates = {}

  def timed(name: str, call: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    found = call()
    rates[name] = len(records) / (time.perf_counter() - began)
    return found

  def read(k: int) -> tuple[Any, str]:
    record = records[k]
    image = record["images"][0]
    if isinstance(image, (str, os.PathLike)):
      image = Path(image).read_bytes()
    return image, record["texts"][0]

  with ThreadPoolExecutor(embedder.threads) as pool:

    def spread(call: Callable, items: Sequence[Any]) -> list[Any]:
      return list(pool.map(call, items))

    raw = timed("read", lambda: spread(read, range(len(records))))
    images, texts = zip(*raw, strict=True)
    pixels = timed("decode", lambda: spread(embedder.processor.image.pixels, images))
    tokens = timed("tokenise", lambda: spread(embedder.tokens, texts))
  width = max(map(len, tokens))
  size = embedder.most_rows(width)
  pad = embedder.processor.tokenizer.pad_id
  rows = np.stack(
    [np.pad(ids, (0, width - len(ids)), constant_values=pad) for ids in tokens]
  )
  stacked = np.stack(pixels)

  def model() -> None:
    for first in range(0, len(records), size):
      last = first + size
      np.asarray(embedder.start(stacked[first:last], rows[first:last]))

  model()  # compiles
  timed("model", model)
  return rates


def table(rows: Sequence[dict[str, Any]]) -> str:
  """The rows in Markdown."""
  lines = [
    "| model | what | documents | items/s | times as fast as pytorch |",
    "|---|---|---:|---:|---:|",
  ]
  for row in rows:
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    lines.append(
      f"| {row['model']} | {row['what']} | {row['documents']} | "
      f"{row['items_per_s']:,.1f} | {ratio} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  _define_flags()
  command_line.run(main)
