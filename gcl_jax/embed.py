"""Embeds a corpus: python -m gcl_jax.embed --checkpoint=... --data=... --output=...

Any source of records becomes an index: vectors, what they stand for, and a manifest. Run
it again after any kill: it goes on with the first shard missing. Several processes share
the work by shards. `python -m gcl_jax.search --index=...` searches it.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

from gcl_jax import command_line
from gcl_jax._version import __version__
from gcl_jax.errors import UserError
from gcl_jax.open_model import Opened, open_model
from gcl_jax.paths import is_remote

if TYPE_CHECKING:
  from gcl_jax.data import DataSettings, Source
  from gcl_jax.retrieval.corpus import Progress, Stage
  from gcl_jax.retrieval.store_writer import IndexWriter

_FLAGS = flags.FLAGS
# The fields of config.data that decide which records there are and what is in them.
_FIELDS = (
  "source", "path", "table", "image_column", "caption_column", "group_column",
  "id_column", "image_root", "tfds_name", "tfds_data_dir", "scenes_train_size",
  "scenes_image_size", "scenes_seed", "eval_fraction", "max_bad_fraction",
)  # fmt: skip
_HELD_OUT = "eval"


def _define_flags() -> None:
  flags.DEFINE_string(
    "checkpoint", "", "a run's folder, a Hugging Face folder, a hub id"
  )
  flags.DEFINE_string("step", "latest", "of a run's folder: latest, best, or a number")
  flags.DEFINE_string(
    "data", "", "the corpus, of any source with files; by default the run's own pairs"
  )
  flags.DEFINE_multi_string(
    "data_option", [], "a field of config.data, as in caption_column=title"
  )
  flags.DEFINE_string(
    "split", "", "of the corpus; by default all of --data, or what the run held out"
  )
  flags.DEFINE_string("output", "", "a new folder, or one to go on with")
  flags.DEFINE_string(
    "modality",
    "both",
    "what a record becomes: both (one document, fused where it has a picture and a "
    "text), image, text, or each (image, text and fused, three documents). The first "
    "picture and the first text count.",
  )
  flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "of the vectors")
  flags.DEFINE_integer("batch_size", 64, "documents at a time, over all devices")
  flags.DEFINE_integer("shard_size", 8192, "records a shard")
  flags.DEFINE_string(
    "faiss", "", "also an approximate index, by a FAISS factory string, as HNSW32"
  )
  flags.DEFINE_string(
    "faiss_search", "", "its search parameters, as nprobe=16 or efSearch=64"
  )
  flags.DEFINE_bool(
    "distributed", False, "join the other processes of this job (TPU pods, SLURM, ...)"
  )
  flags.DEFINE_string("coordinator", "", "host:port of process 0, without a cluster")
  flags.DEFINE_integer("processes", 0, "how many there are, without a cluster")
  flags.DEFINE_integer("process_id", -1, "which of them this is, from 0")


def main() -> None:
  """Flags in, one index out, and what each stage did."""
  from gcl_jax.retrieval.corpus import check_mode

  if not _FLAGS.output:
    raise UserError("name the folder to write: --output=<a new folder>")
  check_mode(_FLAGS.modality)
  if _FLAGS.batch_size < 1:
    raise UserError(f"--batch_size={_FLAGS.batch_size}: at least one document.")
  if _FLAGS.shard_size < 1:
    raise UserError(f"--shard_size={_FLAGS.shard_size}: at least one record a shard.")
  _join()
  from gcl_jax.processes import barrier, is_first

  model = open_model(_FLAGS.checkpoint, _FLAGS.step, batch_size=_FLAGS.batch_size)
  _check_faiss(model.embedder.model.config.projection_dim)
  writer, stages = _write_shards(model)
  barrier("embedded")
  if is_first():
    _finish(writer, stages, model.embedder.processor.tokenizer.texts_cut)
  barrier("written")


def _join() -> None:
  from gcl_jax.processes import join

  explicit = (_FLAGS.coordinator, _FLAGS.processes, _FLAGS.process_id)
  if _FLAGS.distributed or explicit != ("", 0, -1):
    join(*explicit)


def _write_shards(model: Opened) -> tuple[IndexWriter, Mapping[str, Stage]]:
  """Writes the missing shards of this process; what its stages did."""
  import jax

  from gcl_jax.data import DataSettings, change_data, open_source
  from gcl_jax.processes import barrier, is_first
  from gcl_jax.retrieval.corpus import embed_corpus
  from gcl_jax.retrieval.store_writer import IndexWriter

  if not (model.is_run or _FLAGS.data):
    raise UserError("name the corpus: --data=<folder with captions.jsonl>")
  change_data(model.data, _FLAGS.data, _FLAGS.data_option)
  data = DataSettings.from_config(model.data)
  if data.path and not is_remote(data.path):
    # The index shows pictures wherever it is searched from.
    data = dataclasses.replace(
      data, path=os.path.abspath(os.path.expanduser(data.path))
    )
  split = _FLAGS.split or ("all" if _FLAGS.data else _HELD_OUT)
  source = open_source(data, split=split)
  settings, about = _settings(model, data, split, source)
  count = -(-len(source) // _FLAGS.shard_size)
  if not is_first():
    barrier("started")  # the first one starts the folder
  writer = IndexWriter(_FLAGS.output, settings, count, about=about)
  if is_first():
    barrier("started")
  me, processes = jax.process_index(), jax.process_count()
  mine = [k for k in writer.missing() if k % processes == me]
  stages = embed_corpus(
    source,
    model.embedder,
    writer,
    mine,
    shard_size=_FLAGS.shard_size,
    mode=_FLAGS.modality,
    progress=_progress(),
  )
  return writer, stages


def _settings(
  model: Opened, data: DataSettings, split: str, source: Source
) -> tuple[dict[str, Any], dict[str, Any]]:
  """What two calls must agree on to write one index, and what is only noted."""
  from gcl_jax.data.packing import probe
  from gcl_jax.retrieval.identity import identity

  model_is = identity(model.embedder)
  settings = {
    "model": model_is,
    "dimension": model_is["dimension"],
    "dtype": _FLAGS.dtype,
    "modality": _FLAGS.modality,
    "data": {name: getattr(data, name) for name in _FIELDS},
    "split": split,
    "records": len(source),
    "content": probe(source),
    "shard_size": _FLAGS.shard_size,
    "batch_size": _FLAGS.batch_size,  # rows differ by about 1e-6 between batch sizes
    "code": __version__,
  }
  return settings, {"checkpoint": _FLAGS.checkpoint, "step": model.step}


def _finish(writer: IndexWriter, stages: Mapping[str, Stage], cut: int) -> None:
  """The manifest, the approximate index where one is asked for, and a summary."""
  from gcl_jax.retrieval.store import read_index

  if writer.missing():
    raise UserError(f"{writer.folder} still lacks shards: run the same command again.")
  fresh = any(stage.items for stage in stages.values())
  if fresh or not writer.complete:
    writer.finish()
  index = read_index(writer.folder, verify=False)
  print(_summary(index.manifest, writer.folder, stages if fresh else {}, cut))
  if _FLAGS.faiss:
    _build_faiss(index)


def _check_faiss(dimension: int) -> None:
  """Raises UserError where the approximate index could not be made, hours later."""
  if _FLAGS.faiss:
    from gcl_jax.retrieval.approximate import empty

    empty(dimension, _FLAGS.faiss, _FLAGS.faiss_search)
  elif _FLAGS.faiss_search:
    raise UserError(
      f"--faiss_search={_FLAGS.faiss_search} is of an approximate index: name one with "
      "--faiss."
    )


def _build_faiss(index: Any) -> None:
  from gcl_jax.retrieval.approximate import build

  about = build(index, _FLAGS.faiss, search=_FLAGS.faiss_search)
  recall = ", ".join(f"{v:.1%} of the top {k}" for k, v in about["recall"].items())
  print(
    f"{about['factory']}{' ' * bool(about['search'])}{about['search']}: "
    f"{about['bytes'] / 1e6:,.1f} MB in {about['seconds']:.1f} s; it finds {recall} that "
    f"exact search finds ({about['recall_queries']} documents as queries)"
  )


def _summary(
  manifest: Mapping[str, Any], folder: Any, stages: Mapping, cut: int
) -> str:
  from gcl_jax.retrieval.store_format import MODALITIES

  counts = manifest["modalities"]
  said = ", ".join(f"{counts[name]:,} {name}" for name in MODALITIES if counts[name])
  lines = [
    f"written: {folder} ({manifest['rows']:,} documents: {said}; {manifest['dimension']} "
    f"x {manifest['dtype']})"
  ]
  if manifest["bad_count"]:
    first = manifest["bad"][0]
    lines.append(
      f"{manifest['bad_count']:,} bad records, listed in its manifest; the first: "
      f"{first['id']}: {first['reason']}"
    )
  if cut:
    lines.append(
      f"{cut:,} times, in this process, a text was longer than the model takes and was "
      "cut (alone and beside an image counts twice)"
    )
  done = {name: stage for name, stage in stages.items() if stage.items}
  if done:
    slowest = min(done, key=lambda name: done[name].rate)
    lines.append("items/s, each stage by itself (* the slowest):")
    lines += [
      f"  {name:9}{stage.rate:>12,.0f}{' *' * (name == slowest)}"
      for name, stage in done.items()
    ]
  return "\n".join(lines)


def _progress() -> Callable[[Progress], None]:
  """Prints how far it is: on a terminal in place, else a line every half minute."""
  last = [time.monotonic()]

  def say(done: Progress) -> None:
    terminal = sys.stderr.isatty()
    finished = done.records == done.total
    if not done.total or not (terminal or finished or time.monotonic() - last[0] > 30):
      return
    last[0] = time.monotonic()
    rate = done.records / max(done.seconds, 1e-9)
    left = (done.total - done.records) / max(rate, 1e-9)
    text = (
      f"embedded {done.records:,} of {done.total:,} records, {rate:,.0f}/s, "
      f"{int(left // 60)}:{int(left % 60):02d} left, {done.bad:,} bad"
    )
    end = "\n" if finished or not terminal else ""
    print(f"\r\x1b[K{text}" if terminal else text, end=end, file=sys.stderr, flush=True)

  return say


if __name__ == "__main__":
  _define_flags()
  command_line.run(main, resumable=True)
