"""What TPU slices that are not there would hold: models, pairs a chip, what they move.

    pip install libtpu
    python -m benchmarks.slices --output=slices.json

For each model and slice the real step is compiled ahead of time at 256 pairs a chip, and
again at the power of two that should just fit. A row is the largest that does: one chip's
memory, operations and collectives of one step. Nothing runs, so there is no time in it
but the bound of the chip's data sheet. `--loss` compiles the loss alone, at 1,024 pairs a
chip. A compilation takes a minute or two.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh

from gcl_jax import command_line
from gcl_jax.errors import UserError
from gcl_jax.fusion import Mix
from gcl_jax.losses import gcl_loss
from gcl_jax.sharding import BATCH_AXES, batch_sharding, make_mesh
from gcl_jax.training import ahead
from gcl_jax.training.paper import paper_recipe

_FLAGS = flags.FLAGS
_LARGEST = 8192  # pairs a chip
_WHOLE = ("all-gather", "collective-permute")  # the others end in a sum


@dataclasses.dataclass(frozen=True)
class Row:
  """One model on one slice; bytes, operations and pairs are of one chip and step."""

  model: str
  topology: str
  chips: int
  fsdp: int
  pairs: int
  state_and_batch: int
  temporaries: int
  memory: float
  flops: int
  model_flops: int
  memory_traffic: int
  collectives: dict[str, int]
  counts: dict[str, int]
  bound: str
  seconds: float


def _define_flags() -> None:
  flags.DEFINE_list(
    "models",
    ["TinyCLIP-ViT-8M-16-Text-3M", "ViT-B/32", "ViT-B/16", "ViT-L/14"],
    "names",
  )
  flags.DEFINE_list("topologies", ["v5e:4x4", "v5e:16x16", "v6e:4x4"], "TPU slices")
  flags.DEFINE_integer("pairs", 256, "a chip, to begin with")
  flags.DEFINE_integer("fsdp", 1, "chips that share one copy of the parameters")
  flags.DEFINE_integer("most", _LARGEST, "pairs a chip, at most")
  flags.DEFINE_bool("loss", False, "the loss alone")
  flags.DEFINE_string("output", "", "the JSON file of rows")


def main() -> None:
  """Prints a row as soon as it is there."""
  if _FLAGS.loss:
    for topology in _FLAGS.topologies:
      mesh = make_mesh(devices=ahead.slice_devices(topology))
      for form in ("streaming", "ring"):
        memory = compiled_loss(mesh, 1024 * mesh.size, 512, form).memory_analysis()
        held = memory.temp_size_in_bytes / 1e9
        print(f"{topology}: loss, {form}: {held:.2f} GB of temporaries", flush=True)
    return
  rows: list[Row] = []
  for model in _FLAGS.models:
    for topology in _FLAGS.topologies:
      row = largest(model, topology, _FLAGS.pairs, _FLAGS.most, _FLAGS.fsdp)
      if row is None:
        raise UserError(f"{model} does not fit {topology} with {_FLAGS.pairs} pairs.")
      rows.append(row)
      print(table(rows), flush=True)
      if _FLAGS.output:
        text = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
        Path(_FLAGS.output).write_text(text + "\n")


def largest(
  model: str, topology: str, pairs: int, most: int, fsdp: int = 1
) -> Row | None:
  """The row of the largest power of two of pairs a chip that fits; None if none does."""
  small = _compiled(model, topology, pairs, fsdp)
  if small is None:
    return None
  # What a pair takes is nearly all of what is not the state's.
  of_a_pair = small.temporaries / pairs
  room = small.chip.memory * ahead.USABLE - small.arguments
  likely = 2 ** int(math.log2(max(room / of_a_pair, pairs)))
  for larger in (likely, likely // 2):
    if pairs < larger <= most:
      found = _compiled(model, topology, larger, fsdp)
      if found is not None:
        return _row(model, topology, fsdp, found)
  return _row(model, topology, fsdp, small)


def _compiled(model: str, topology: str, pairs: int, fsdp: int) -> ahead.Report | None:
  config = paper_recipe()
  config.init.pretrained = ""
  config.model.name = model
  config.tokenizer.vocab_size = 49_408  # CLIP's own
  config.model.dtype, config.model.remat = "bfloat16", "full"
  config.mesh.fsdp = fsdp
  config.batch_size = pairs * ahead.chips_of(topology)
  try:
    report = ahead.compile_only(config, topology)
  except UserError as error:
    if "does not fit" not in str(error):
      raise
    return None
  return report if report.fits else None


def _row(model: str, topology: str, fsdp: int, report: ahead.Report) -> Row:
  seconds = report.seconds
  bound = max(seconds, key=seconds.get)
  return Row(
    model=model,
    topology=topology,
    chips=report.chips,
    fsdp=fsdp,
    pairs=report.pairs // report.chips,
    state_and_batch=report.arguments,
    temporaries=report.temporaries,
    memory=report.chip.memory,
    flops=report.flops,
    model_flops=report.model_flops,
    memory_traffic=report.moved.memory,
    collectives=report.moved.collectives,
    counts=report.moved.counts,
    bound=bound,
    seconds=seconds[bound],
  )


def table(rows: list[Row]) -> str:
  """The rows in Markdown."""
  lines = [
    "| model | slice | pairs a chip | memory, GB | TFLOP | gathered or passed on, MB | "
    "reduced, MB | bound | ms |",
    "|---|---|---:|---:|---:|---:|---:|---|---:|",
  ]
  for row in rows:
    gathered = sum(row.collectives.get(kind, 0) for kind in _WHOLE)
    reduced = sum(row.collectives.values()) - gathered
    held = row.state_and_batch + row.temporaries
    lines.append(
      f"| {row.model} | {row.topology} | {row.pairs:,} | {held / 1e9:.1f} of "
      f"{row.memory / 1e9:.0f} | {row.flops / 1e12:.1f} | {gathered / 1e6:,.0f} | "
      f"{reduced / 1e6:,.0f} | {row.bound} | {1e3 * row.seconds:,.0f} |"
    )
  return "\n".join(lines)


def compiled_loss(mesh: Mesh, rows: int, width: int, form: str) -> Any:
  """Value and all gradients of the loss alone, compiled for the mesh."""

  def run(image, text, alpha, beta, ids):
    return gcl_loss(
      image,
      text,
      Mix(alpha, beta),
      logit_scale=100.0,
      pair_ids=ids,
      mesh=mesh,
      batch_axes=BATCH_AXES,
      form=form,
    )[0]

  def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=batch_sharding(mesh))

  bank, weight = array("float32", rows, width), array("float32", rows)
  step = jax.jit(jax.value_and_grad(run, argnums=range(4)))
  arguments = (bank, bank, weight, weight, array("int32", rows, 2))
  return step.lower(*arguments).compile()


if __name__ == "__main__":
  _define_flags()
  command_line.run(main)
