"""Packs pairs for fast reading: python -m gcl_jax.data.pack --data=... --output=...

Any source becomes shards of pictures that are reduced to the size of training once,
instead of at every epoch. Run it again after any kill: it goes on with the first shard
missing. Several machines may share the work: --shard_range=0:50, 50:100, ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from gcl_jax import command_line
from gcl_jax.errors import UserError

_FLAGS = flags.FLAGS


def _define_flags() -> None:
  from ml_collections import config_flags

  config_flags.DEFINE_config_file(
    "config", None, "a recipe: its config.data is packed, at its image size"
  )
  flags.DEFINE_string("data", "", "the pairs: over config.data.path and source")
  flags.DEFINE_multi_string(
    "data_option", [], "a field of config.data, as in caption_column=blip_caption"
  )
  flags.DEFINE_string("split", "all", "what to pack; splits stay told apart")
  flags.DEFINE_string("output", "", "a new folder, here or gs://; or one to go on with")
  flags.DEFINE_integer("size", 0, "pixels a side that the model takes; 0: the recipe's")
  flags.DEFINE_float(
    "margin",
    0.0,
    "the shorter side kept is so many times the size; 0: 1, or where training crops "
    "at random what leaves the smallest square crop as large as the size",
  )
  flags.DEFINE_integer("quality", 92, "of the JPEGs written")
  flags.DEFINE_bool("lossless", False, "PNG instead: three to six times as large")
  flags.DEFINE_integer("shard_records", 8192, "records a shard")
  flags.DEFINE_string("shard_range", "", "first:end of the shards to write here")
  flags.DEFINE_integer("threads", 0, "that decode and encode; 0: one for each core")


def main() -> None:
  """Flags in, shards out, and how to train from them."""
  from gcl_jax.data import DataSettings, open_source
  from gcl_jax.data.pack_records import Packing, shorter_side
  from gcl_jax.data.packing import pack

  if not _FLAGS.output:
    raise UserError("name the folder to write: --output=<a new folder>")
  config = _config()
  settings = DataSettings.from_config(config.data)
  if settings.source == "packed":
    raise UserError(f"{settings.path} is packed already; pack what it was made from")
  packing = Packing(
    shorter_side(_FLAGS.size or _size(config), _FLAGS.margin, settings),
    quality=_FLAGS.quality,
    lossless=_FLAGS.lossless,
    shard_records=_FLAGS.shard_records,
  )
  manifest = pack(
    open_source(settings, split=_FLAGS.split),
    _FLAGS.output,
    packing,
    settings,
    split=_FLAGS.split,
    shard_range=_range(_FLAGS.shard_range),
    threads=_FLAGS.threads,
    progress=_progress(),
  )
  print(_summary(manifest, _FLAGS.output))


def _config() -> ConfigDict:
  from gcl_jax.data import change_data
  from gcl_jax.training.config import default_config

  config = default_config() if _FLAGS.config is None else _FLAGS.config
  change_data(config.data, _FLAGS.data, _FLAGS.data_option)
  return config


def _size(config: ConfigDict) -> int:
  """The recipe's image size; 0 where only its pretrained model knows."""
  vision = config.model.hf.get("vision_config") or {}
  return config.model.image_size or vision.get("image_size") or 0


def _range(said: str) -> tuple[int, int] | None:
  if not said:
    return None
  first, colon, end = said.partition(":")
  if not (colon and first.isdigit() and end.isdigit()):
    raise UserError(f"--shard_range={said}: write first:end, such as 0:50")
  return int(first), int(end)


def _progress() -> Callable[[Any], None]:
  """Prints how far it is: on a terminal in place, else a line every half minute."""
  last = [time.monotonic()]

  def say(done) -> None:
    terminal = sys.stderr.isatty()
    finished = done.records == done.total
    if not (terminal or finished or time.monotonic() - last[0] > 30):
      return
    last[0] = time.monotonic()
    rate = done.records / max(done.seconds, 1e-9)
    left = (done.total - done.records) / max(rate, 1e-9)
    text = (
      f"packed {done.records:,} of {done.total:,} records, {rate:,.0f}/s, "
      f"{int(left // 60)}:{int(left % 60):02d} left, {done.bad:,} bad"
    )
    end = "\n" if finished or not terminal else ""
    print(f"\r\x1b[K{text}" if terminal else text, end=end, file=sys.stderr, flush=True)

  return say


def _summary(manifest: Mapping[str, Any], output: str) -> str:
  if not manifest["complete"]:
    return (
      f"These shards of {output} are written; others are missing. The data can be read "
      "when all are there."
    )
  records, shards = manifest["records"], manifest["shards"]
  kilobytes = manifest["bytes"] / max(records, 1) / 1e3
  lines = [
    f"{records:,} records in {shards:,} shards, {manifest['bytes'] / 1e6:,.1f} MB "
    f"({kilobytes:.1f} kB a record): {output}"
  ]
  if manifest["bad"]:
    lines.append(
      f"{manifest['bad_records']:,} records were left out; packed.json lists what could "
      f"not be read, first: {manifest['bad'][0]}"
    )
  lines.append(
    f"Train from it: --config.data.source=packed --config.data.path={output}"
  )
  return "\n".join(lines)


if __name__ == "__main__":
  _define_flags()
  command_line.run(main, resumable=True)
