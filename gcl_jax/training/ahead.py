"""The real step, compiled for a TPU slice that is not there: does it fit, what bounds it.

Nothing runs and no data is read: shapes are enough.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gcl_jax.errors import UserError
from gcl_jax.models import Model
from gcl_jax.processing import ImageProcessor
from gcl_jax.sharding import (
  PARAMETER_RULES,
  batch_devices,
  batch_sharding,
  make_mesh,
  shardings,
)
from gcl_jax.training.adapters import adapted_shapes
from gcl_jax.training.average import trained
from gcl_jax.training.check import check_kernel
from gcl_jax.training.chips import Chip, chip_of
from gcl_jax.training.distill import teacher_model
from gcl_jax.training.flops import flops_options, multiply_adds, pair_flops
from gcl_jax.training.objective import make_objective
from gcl_jax.training.optimizer import frozen_mask, make_optimizer
from gcl_jax.training.program import Moved, moved
from gcl_jax.training.separation_features import needs_initial_tower, read_features
from gcl_jax.training.start import model_from_config
from gcl_jax.training.state import make_step, places_of_state

# Of a chip's memory; the rest the runtime keeps for itself.
USABLE = 0.96


class Report(NamedTuple):
  """One chip's part of one step.

  chips, kind: of the slice. pairs: of the global batch. arguments, temporaries: bytes
  that the compiler plans: state and batch, and all else. flops: operations of the
  products, those that are computed again included. model_flops: without these. moved:
  memory and collectives. chip: its limits.
  """

  chips: int
  kind: str
  pairs: int
  arguments: int
  temporaries: int
  flops: int
  model_flops: int
  moved: Moved
  chip: Chip

  @property
  def fits(self) -> bool:
    """Whether a chip's memory holds it."""
    return self.arguments + self.temporaries <= self.chip.memory * USABLE

  @property
  def seconds(self) -> dict[str, float]:
    """The least time for arithmetic, memory and links, each alone."""
    bound = {
      "arithmetic": self.flops / self.chip.flops,
      "memory": self.moved.memory / self.chip.memory_rate,
    }
    if self.chip.link_rate:
      received = sum(self.moved.collectives.values())
      bound["links"] = received / self.chip.link_rate
    return bound


def compile_only(config: ConfigDict, topology: str) -> Report:
  """Compiles a config's step for a slice such as v5e:16x16.

  Raises:
    UserError: no TPU compiler here, an unknown slice, or a config that cannot run on it.
  """
  mesh = make_mesh(**config.mesh, devices=slice_devices(topology))
  kind = mesh.devices.flat[0].device_kind
  chip = chip_of(kind)
  if chip is None:
    raise UserError(f"--compile_only={topology}: {kind} is not in the table of chips.")
  parts = batch_devices(mesh)
  pieces = parts * config.microbatches * config.accumulate_steps
  if config.batch_size % pieces:
    raise UserError(
      f"config.batch_size is {config.batch_size}, which is no multiple of {pieces} "
      f"({parts} chips that share a batch x config.microbatches {config.microbatches} x "
      f"config.accumulate_steps {config.accumulate_steps})."
    )
  model = model_from_config(config)
  check_kernel(config, model.config.projection_dim)
  teacher = teacher_model(config)
  step, arguments = step_and_shapes(config, model, mesh, teacher)
  try:
    compiled = step.lower(*arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise UserError(f"it does not fit {topology}: {_reason(error)}") from error
  memory = compiled.memory_analysis()
  of_a_pair = pair_flops(
    model,
    arguments[1]["tokens"].shape[-1],
    **flops_options(config, teacher),
  )
  return Report(
    chips=mesh.size,
    kind=kind,
    pairs=config.batch_size,
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes
    + max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
    flops=2 * multiply_adds(step, *arguments) // mesh.size,
    model_flops=of_a_pair * config.batch_size // mesh.size,
    moved=moved(compiled.as_text()),
    chip=chip,
  )


def step_and_shapes(
  config: ConfigDict, model: Model, mesh: Mesh, teacher: Model | None = None
) -> tuple[Any, tuple]:
  """The jitted step of a config, and the shapes that it takes."""
  shapes, shape = adapted_shapes(config, model.abstract()), model.config
  optimizer = make_optimizer(config.optimizer, config.temperature, shapes, 10**6)
  size = shape.vision.image_size
  images = ImageProcessor.from_dict(
    {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
  )
  frozen = frozen_mask(config.optimizer, config.temperature, shapes)
  places = places_of_state(shapes, optimizer, mesh)
  counter = jax.ShapeDtypeStruct((), jnp.int32)
  state = {
    "params": shapes,
    "optimizer": jax.eval_shape(optimizer.init, shapes),
    **dict.fromkeys(("step", "bad_records", "failed_step"), counter),
  }
  if config.ema_decay:
    state, places = (
      {**tree, "ema": trained(tree["params"], frozen)} for tree in (state, places)
    )
  step = make_step(
    make_objective(model, images, config, mesh, (teacher, images) if teacher else None),
    optimizer,
    frozen,
    config.temperature,
    places,
    ema_decay=config.ema_decay,
    accumulate_steps=config.accumulate_steps,
  )
  state = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    state,
    places,
  )
  parts = config.accumulate_steps
  sharding = batch_sharding(mesh)
  if parts > 1:
    sharding = NamedSharding(mesh, PartitionSpec(None, *sharding.spec))

  def rows(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    cut = (parts, config.batch_size // parts) if parts > 1 else (config.batch_size,)
    return jax.ShapeDtypeStruct((*cut, *shape), jnp.dtype(dtype), sharding=sharding)

  batch = {
    "pixels": rows("uint8", size, size, 3),
    "tokens": rows("int32", min(max(config.data.text_buckets), shape.text.context)),
    "has_image": rows("bool"),
    "has_text": rows("bool"),
    "pair_ids": rows("int32", 2),
  }
  if config.model.patch_dropout:
    batch["place"] = rows("int32")
  features = read_features(config)
  if features is not None:
    batch["separation_features"] = rows("float32", features.shape[1])
  constants = {}
  if needs_initial_tower(config):
    constants["initial_params"] = {
      name: tree for name, tree in state["params"].items() if name != "lora"
    }
  if teacher:
    its = teacher.abstract()
    constants["teacher_params"] = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
      its,
      shardings(mesh, its, PARAMETER_RULES),
    )
  return step, (state, batch, constants)


def render(report: Report) -> str:
  """The report as lines of text, per chip."""
  giga = 1e9
  held = report.arguments + report.temporaries
  verdict = "fits" if report.fits else "does NOT fit"
  seconds = report.seconds
  bound = max(seconds, key=seconds.get)
  best = report.pairs / seconds[bound]
  collectives = ", ".join(
    f"{kind} {report.moved.collectives[kind] / 1e6:,.1f} MB in "
    f"{report.moved.counts[kind]:,}"
    for kind in sorted(report.moved.collectives)
  )
  each = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
  return (
    f"{report.chips} x {report.kind}, {report.pairs:,} pairs a step "
    f"({report.pairs // report.chips:,} a chip)\n"
    f"memory: state and batch {report.arguments / giga:.2f} GB + temporaries "
    f"{report.temporaries / giga:.2f} GB = {held / giga:.2f} of "
    f"{report.chip.memory / giga:.0f} GB: {verdict}\n"
    f"products: {report.flops / 1e12:.2f} TFLOP a step, of which the model's own "
    f"{report.model_flops / 1e12:.2f}\n"
    f"memory traffic: {report.moved.memory / giga:.1f} GB a step\n"
    f"collectives: {collectives or 'none'}\n"
    f"at best: {each}; {bound} bounds it: {best:,.0f} pairs/s, "
    f"{best / report.chips:,.0f} a chip, MFU "
    f"{report.model_flops / report.chip.flops / seconds[bound]:.0%}"
  )


def chips_of(topology: str) -> int:
  """How many chips a slice has."""
  return len(slice_devices(topology))


def slice_devices(topology: str) -> list[jax.Device]:
  """The devices of a slice, to compile for.

  Raises:
    UserError: no TPU compiler here, or no such slice.
  """
  if (
    importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ
  ):
    raise UserError("--compile_only needs the TPUs' compiler: pip install libtpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  except Exception as error:  # the plugin raises what it likes
    if "lockfile" in str(error):
      raise UserError(
        "another process has the TPUs' compiler: wait for it, or set "
        "ALLOW_MULTIPLE_LIBTPU_LOAD=1."
      ) from error
    reason = str(error).partition("\n")[0]
    raise UserError(
      f"--compile_only={topology}: no such slice ({reason}); such as v5e:4x4, "
      "v5e:16x16, v6e:8x8, v5p:4x4x4."
    ) from error
  return found.devices


def _reason(error: Exception) -> str:
  """The line of an out-of-memory error that says how much is asked for."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  used = [line for line in lines if "Used" in line or "exceed" in line.lower()]
  return (used or lines)[0][:300]
