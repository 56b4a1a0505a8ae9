"""Pairs a second that the input gives: stage by stage, and beside other loaders.

    python -m benchmarks.input --quick --output=input.json

Stages run on one thread and are shown as pairs a second of processor time. Loaders do
the same work (Pillow's decoding, bicubic to the model's size, centre crop, tokens, a
batch of uint8) with as many threads, or processes for the others, as there are cores.
Each runs in a process of its own, one after the other in turns (A B C A B C ...), since
machines are noisy; medians are shown. The pictures are made up, 500 x 375 JPEGs of about
70 kB, unless --data names some. `resized` is the same pictures as `gcl_jax.data.pack`
leaves them, in each loader's own format.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from gcl_jax import command_line
from gcl_jax.data import DataSettings, Pipeline, Source, open_source, pair_ids
from gcl_jax.data.augment import make_augment
from gcl_jax.data.options import change_data
from gcl_jax.data.pack_records import Packing
from gcl_jax.data.packing import pack
from gcl_jax.errors import UserError
from gcl_jax.processing import (
  Processor,
  Tokenizer,
  decode_image,
  default_clip_processor,
)

_FLAGS = flags.FLAGS
_WARM = 2  # batches before the clock starts
_STAGES = ("read", "decode", "resize", "crop_flip and resize", "tokenise", "batch")


def _define_flags() -> None:
  flags.DEFINE_bool("quick", False, "fewer pairs and turns, under two minutes")
  flags.DEFINE_string("data", "", "pairs to measure with; by default made up")
  flags.DEFINE_multi_string("data_option", [], "a field of config.data, as in evaluate")
  flags.DEFINE_integer("pairs", 2048, "of them that are used")
  flags.DEFINE_integer("size", 224, "pixels a side that the model takes")
  flags.DEFINE_integer("batch_size", 64, "pairs")
  flags.DEFINE_integer("batches", 64, "timed a turn")
  flags.DEFINE_integer("workers", 0, "threads or processes of a loader; 0: the cores")
  flags.DEFINE_integer("repeats", 5, "turns")
  flags.DEFINE_string("output", "", "the JSON file of rows")


def main() -> None:
  """Measures, prints the tables and writes the rows."""
  pairs, batches, repeats = _FLAGS.pairs, _FLAGS.batches, _FLAGS.repeats
  if _FLAGS.quick:
    pairs, batches, repeats = 256, 6, 3
  source = made_up(pairs)
  if _FLAGS.data:
    from gcl_jax.training.config import default_config

    data = default_config().data
    change_data(data, _FLAGS.data, _FLAGS.data_option)
    source = open_source(data, split="all")
  with tempfile.TemporaryDirectory(prefix="gcl_jax_input") as folder:
    setting = prepare(
      source, Path(folder), pairs=pairs, size=_FLAGS.size, batch_size=_FLAGS.batch_size
    )
    rows = measure_stages(setting, repeats=repeats)
    print(stage_table(rows), flush=True)
    rows += measure_loaders(
      setting, workers=_FLAGS.workers or cores(), batches=batches, repeats=repeats
    )
  print(loader_table(rows), flush=True)
  if _FLAGS.output:
    Path(_FLAGS.output).write_text(json.dumps(rows, indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class Setting:
  """The same pairs in every layout, and what to make of them."""

  folder: Path
  size: int
  batch_size: int

  def source(self, layout: str, pictures: str) -> Source:
    """One of the layouts files, tar, packed; of the pictures raw or resized."""
    path = self.folder / pictures / layout
    kind = {"files": "table", "tar": "webdataset", "packed": "packed"}[layout]
    cache = str(self.folder / "cache")
    fields = {"source": kind, "path": str(path), "cache_dir": cache}
    return open_source(fields, split="all")

  @functools.cached_property
  def processor(self) -> Processor:
    tokenizer = Tokenizer.from_folder(self.folder / "tokenizer")
    return default_clip_processor(self.size, tokenizer)


def cores() -> int:
  """Those that this process may use."""
  return (
    len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else (os.cpu_count() or 1)
  )


def made_up(count: int, size: tuple[int, int] = (500, 375)) -> Source:
  """Pairs whose pictures cost what photographs do: soft shapes and a camera's noise."""
  texts = open_source({"source": "scenes"}, split="train")
  shapes = [
    np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8) for i in range(9)
  ]
  grain = [np.random.default_rng(i).normal(0, 12, (*size[::-1], 3)) for i in range(3)]

  @functools.cache
  def picture(kind: int) -> bytes:
    soft = Image.fromarray(shapes[kind % 9]).resize(size, Image.Resampling.BICUBIC)
    values = np.clip(np.asarray(soft) + grain[kind // 9], 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "JPEG", quality=88)
    return file.getvalue()

  return [
    {"id": str(i), "images": [picture(i % 27)], "texts": [texts[i % 999]["texts"][0]]}
    for i in range(count)
  ]


def prepare(
  source: Source, folder: Path, *, pairs: int, size: int, batch_size: int
) -> Setting:
  """Writes the first pairs of a source in every layout, as they are and resized.

  Raises:
    UserError: fewer than a batch of pairs with a picture and a text.
  """
  kept = list(itertools.islice(_pairs(source), pairs))
  if len(kept) < batch_size:
    raise UserError(f"{len(kept)} pairs with a picture and a text: less than a batch")
  setting = Setting(folder, size, batch_size)
  _write(folder / "raw", kept)
  settings = DataSettings.from_config(
    {"source": "webdataset", "path": str(folder / "raw/tar")}
    | {"cache_dir": str(folder / "cache")}
  )
  pack(
    open_source(settings, split="all"),
    folder / "resized/packed",
    Packing(size),
    settings,
  )
  resized = setting.source("packed", "resized")
  _write(folder / "resized", [(r["images"][0], r["texts"][0]) for r in resized])
  Tokenizer.train([text for _, text in kept], 1024, 77).save(folder / "tokenizer")
  return setting


def _pairs(source: Source) -> Iterator[tuple[bytes, str]]:
  for i in range(len(source)):
    with contextlib.suppress(ValueError, OSError):
      record = source[i]
      if len(record["images"]) and len(record["texts"]):
        picture = record["images"][0]
        raw = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
        decode_image(raw)
        yield raw, record["texts"][0]


def _write(folder: Path, pairs: Sequence[tuple[bytes, str]]) -> None:
  (folder / "files").mkdir(parents=True)
  (folder / "tar").mkdir()
  lines = []
  with tarfile.open(folder / "tar/0.tar", "w") as tar:
    for i, (picture, text) in enumerate(pairs):
      name = f"{i:06d}.jpg"
      (folder / "files" / name).write_bytes(picture)
      lines.append(json.dumps({"image": name, "captions": [text]}))
      for member, content in ((name, picture), (f"{i:06d}.txt", text.encode())):
        info = tarfile.TarInfo(member)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
  (folder / "files/captions.jsonl").write_text("\n".join(lines) + "\n")


def measure_stages(setting: Setting, *, repeats: int) -> list[dict[str, Any]]:
  """Pairs per second of processor time of each stage, on one thread."""
  sources = {
    "files": setting.source("files", "raw"),
    "tar": setting.source("tar", "raw"),
    "packed": setting.source("packed", "resized"),
  }
  seconds: dict[tuple[str, str], list[float]] = {}
  count = min(2 * setting.batch_size, len(sources["tar"]))
  for repeat in range(repeats + 1):
    order = np.random.default_rng(repeat).permutation(len(sources["tar"]))[:count]
    for name, source in sources.items():
      took = _stages(setting, source, [int(i) for i in order])
      if repeat:  # the first of each warms up
        for stage, value in zip(_STAGES, took, strict=True):
          seconds.setdefault((name, stage), []).append(value / count)
  return [
    {
      "kind": "stage",
      "source": name,
      "stage": stage,
      "pairs": count,
      "size": setting.size,
      "pairs_per_cpu_s": 1 / max(statistics.median(values), 1e-9),
      "spread": _spread(values),
    }
    for (name, stage), values in seconds.items()
  ]


def _stages(setting: Setting, source: Source, order: list[int]) -> list[float]:
  """Seconds of processor time of each of `_STAGES` over some pairs."""
  image, tokenizer = setting.processor.image, setting.processor.tokenizer
  augment = make_augment("crop_flip", size=setting.size, scale=(0.5, 1.0))
  clock = [time.process_time()]

  def mark(result):
    clock.append(time.process_time())
    return result

  records = mark([_loaded(source[i]) for i in order])
  pictures = mark([decode_image(raw) for raw, _ in records])
  pixels = mark([image.pixels(picture) for picture in pictures])
  rng = np.random.default_rng(0)
  mark([image.pixels(augment(picture, rng)) for picture in pictures])
  texts = [text for _, text in records]
  mark([tokenizer(part, 77) for part in _batches(texts, setting.batch_size)])
  for part in _batches(list(zip(pixels, texts, strict=True)), setting.batch_size):
    np.stack([array for array, _ in part])
    np.stack([pair_ids(text, text, text) for _, text in part])
  mark(None)
  return list(np.diff(clock))


def _loaded(record) -> tuple[bytes, str]:
  picture = record["images"][0]
  raw = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
  return raw, record["texts"][0]


def _batches(items: list, size: int) -> Iterator[list]:
  for start in range(0, len(items), size):
    yield items[start : start + size]


def _ours(setting: Setting, layout: str, pictures: str, workers: int) -> Iterator[Any]:
  source = setting.source(layout, pictures)
  with Pipeline(
    source,
    setting.processor,
    batch_size=setting.batch_size,
    seed=0,
    threads=workers,
    prefetch=2 * workers,
  ) as pipeline:
    for batch in pipeline:
      yield batch["pixels"], batch["tokens"]


class _Files:
  """A map-style dataset as PyTorch's users write it."""

  def __init__(self, folder: Path, processor: Processor):
    self._folder, self._processor = folder, processor
    self._rows = [json.loads(line) for line in (folder / "captions.jsonl").open()]

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int):
    row = self._rows[index]
    with Image.open(self._folder / row["image"]) as picture:
      return _arrays(picture.convert("RGB"), row["captions"][0], self._processor)


def _arrays(picture: Image.Image, text: str, processor: Processor):
  return processor.image.pixels(picture), processor.tokenizer([text], 77)[0]


def _torch(setting: Setting, layout: str, pictures: str, workers: int) -> Iterator[Any]:
  import torch

  torch.set_num_threads(1)
  data = _Files(setting.folder / pictures / layout, setting.processor)
  drawn = torch.utils.data.RandomSampler(data, num_samples=1 << 24, replacement=True)
  yield from torch.utils.data.DataLoader(
    data, batch_size=setting.batch_size, sampler=drawn, num_workers=workers
  )


def _webdataset(
  setting: Setting, layout: str, pictures: str, workers: int
) -> Iterator[Any]:
  import torch
  import webdataset as wds

  torch.set_num_threads(1)
  url = str(setting.folder / pictures / layout / "0.tar")
  arrays = functools.partial(_pair_arrays, processor=setting.processor)
  data = wds.WebDataset(url, resampled=True, shardshuffle=False).shuffle(500)
  data = data.decode("pilrgb").to_tuple("jpg", "txt").map(arrays)
  data = data.batched(setting.batch_size)
  yield from wds.WebLoader(data, batch_size=None, num_workers=workers)


def _pair_arrays(pair, processor: Processor):
  return _arrays(*pair, processor)


LOADERS: dict[str, Callable[..., Iterator[Any]]] = {
  "gcl_jax": _ours,
  "webdataset": _webdataset,
  "torch": _torch,
}
ROWS = (  # (loader, layout, pictures); the first is what the others are compared with
  ("torch", "files", "raw"),
  ("webdataset", "tar", "raw"),
  ("gcl_jax", "files", "raw"),
  ("gcl_jax", "tar", "raw"),
  ("torch", "files", "resized"),
  ("webdataset", "tar", "resized"),
  ("gcl_jax", "packed", "resized"),
)


def measure_loaders(
  setting: Setting,
  *,
  workers: int,
  batches: int,
  repeats: int,
  rows: Iterable[tuple[str, str, str]] = ROWS,
  isolated: bool = True,
) -> list[dict[str, Any]]:
  """One JSON row for each loader; `missing` where its library is not installed.

  Args:
    setting: of `prepare`.
    workers: threads of ours, processes of the others; 0 reads when asked.
    batches: timed a turn.
    repeats: turns.
    rows: of `ROWS`.
    isolated: each turn in a process of its own.
  """
  rows = list(rows)
  missing = {name for name, _, _ in rows if name != "gcl_jax" and not find_spec(name)}
  if not find_spec("torch"):
    missing |= {name for name, _, _ in rows if name == "webdataset"}
  wall: dict[tuple, list[float]] = {row: [] for row in rows if row[0] not in missing}
  spent: dict[tuple, list[float]] = {row: [] for row in wall}
  turn = _in_a_process if isolated else _turn
  for _ in range(repeats):
    for row in wall:
      took, cpu = turn(setting, row, workers, batches)
      wall[row].append(took)
      spent[row].append(cpu)
  count = batches * setting.batch_size
  first = next(iter(wall))
  results = []
  for loader, layout, pictures in rows:
    row = (loader, layout, pictures)
    result = dict(zip(("loader", "layout", "pictures"), row, strict=True))
    result |= {"kind": "loader", "workers": workers, "batch_size": setting.batch_size}
    if row in wall:
      took = statistics.median(wall[row])
      result |= {
        "size": setting.size,
        "pairs": count,
        "pairs_per_s": count / took,
        "pairs_per_cpu_s": count / max(statistics.median(spent[row]), 1e-9),
        "spread": _spread(wall[row]),
        "ratio": statistics.median(wall[first]) / took,
        "ratio_to": " ".join(first),
      }
    else:
      result["missing"] = "not installed"
    results.append(result)
  return results


def _turn(
  setting: Setting, row: tuple[str, str, str], workers: int, batches: int
) -> tuple[float, float]:
  """Seconds, and seconds of processor time, of so many batches."""
  loader, layout, pictures = row
  with contextlib.closing(
    LOADERS[loader](setting, layout, pictures, workers)
  ) as stream:
    return _timed(stream, setting, batches)


def _timed(
  stream: Iterator[Any], setting: Setting, batches: int
) -> tuple[float, float]:
  shape = (setting.batch_size, setting.size, setting.size, 3)
  for _ in range(_WARM):
    pixels, _ = next(stream)
    if tuple(pixels.shape) != shape:
      raise ValueError(f"batches of {tuple(pixels.shape)} and not {shape}")
  start, cpu = time.perf_counter(), _cpu_seconds()
  for _ in range(batches):
    next(stream)
  return time.perf_counter() - start, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
  """Processor time of this process, its threads and its living children."""
  total = time.process_time()
  for child in multiprocessing.active_children():
    with contextlib.suppress(OSError):  # there is no /proc but on Linux
      fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
      total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
  return total


def _in_a_process(
  setting: Setting, row: tuple[str, str, str], workers: int, batches: int
) -> tuple[float, float]:
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe(duplex=False)
  arguments = (theirs, setting, row, workers, batches)
  process = context.Process(target=_serve, args=arguments)
  process.start()
  theirs.close()
  try:
    return ours.recv()
  except EOFError:
    raise RuntimeError(f"{' '.join(row)} ended without a result") from None
  finally:
    process.join()


def _serve(connection, setting: Setting, row, workers: int, batches: int) -> None:
  loader, layout, pictures = row
  stream = LOADERS[loader](setting, layout, pictures, workers)
  connection.send(_timed(stream, setting, batches))
  # PyTorch's workers, asked to end while they are busy, now and then abort with a
  # message of C++ and a traceback: nobody should take them for a failure of this.
  with open(os.devnull, "w") as nowhere:
    os.dup2(nowhere.fileno(), 2)
  for child in multiprocessing.active_children():
    child.kill()
  stream.close()


def _spread(values: Sequence[float]) -> float:
  """(largest - smallest) / median."""
  return (max(values) - min(values)) / max(statistics.median(values), 1e-9)


def stage_table(rows: list[dict[str, Any]]) -> str:
  """The stages in Markdown: pairs a second of one core."""
  rows = [row for row in rows if row["kind"] == "stage"]
  sources = list(dict.fromkeys(row["source"] for row in rows))
  rates = {(r["stage"], r["source"]): r["pairs_per_cpu_s"] for r in rows}
  lines = [
    f"| pairs a second of one core | {' | '.join(sources)} |",
    f"|---|{'---:|' * len(sources)}",
  ]
  for stage in dict.fromkeys(row["stage"] for row in rows):
    cells = [f"{rates[stage, source]:,.0f}" for source in sources]
    lines.append(f"| {stage} | {' | '.join(cells)} |")
  return "\n".join(lines)


def loader_table(rows: list[dict[str, Any]]) -> str:
  """The loaders in Markdown."""
  rows = [row for row in rows if row["kind"] == "loader"]
  lines = [
    "| loader | reads | pictures | pairs/s | per core | spread | times as fast as |",
    "|---|---|---|---:|---:|---:|---|",
  ]
  for row in rows:
    head = f"| {row['loader']} | {row['layout']} | {row['pictures']} |"
    if "missing" in row:
      lines.append(f"{head} {row['missing']} | | | |")
    else:
      lines.append(
        f"{head} {row['pairs_per_s']:,.0f} | {row['pairs_per_cpu_s']:,.0f} | "
        f"{100 * row['spread']:.0f} % | {row['ratio']:.2f} x {row['ratio_to']} |"
      )
  return "\n".join(lines)


if __name__ == "__main__":
  _define_flags()
  command_line.run(main)
