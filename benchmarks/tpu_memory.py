"""What a TPU chip must hold: the loss, and a whole training step, compiled without one.

    pip install libtpu
    python -m benchmarks.tpu_memory --config=configs/clip.py:B32 --topology=v5e:16x16

Compiles ahead of time for a slice that is not there and prints what the compiler says
of one chip: arguments (parameters, moments, batch) and temporaries. Nothing runs.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from gcl_jax import command_line
from gcl_jax.errors import UserError
from gcl_jax.fusion import Mix
from gcl_jax.losses import gcl_loss
from gcl_jax.models import CLIPConfig, build, named_config
from gcl_jax.processing import ImageProcessor
from gcl_jax.sharding import BATCH_AXES, batch_sharding, make_mesh, replicated
from gcl_jax.training.objective import make_objective
from gcl_jax.training.optimizer import frozen_mask, make_optimizer
from gcl_jax.training.state import make_step

_FLAGS = flags.FLAGS


def _define_flags() -> None:
  config_flags.DEFINE_config_file("config", None, "a recipe whose model has a name")
  flags.DEFINE_string("model", "ViT-B/32", "a named shape")
  flags.DEFINE_string("topology", "v5e:16x16", "a TPU slice")
  flags.DEFINE_integer("pairs", 1024, "pairs per chip")


def main() -> None:
  """Prints a line for each form of the loss, and one for the step."""
  if _FLAGS.config is None:
    raise UserError("name a recipe, such as --config=configs/clip.py:B32")
  if (
    importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ
  ):
    raise UserError("compiling for TPUs needs their compiler: pip install libtpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  topology = topologies.get_topology_desc(platform="tpu", topology_name=_FLAGS.topology)
  mesh = make_mesh(devices=topology.devices)
  rows = _FLAGS.pairs * mesh.size
  model = build(
    CLIPConfig.from_hf(named_config(_FLAGS.model).to_hf()),
    dtype=_FLAGS.config.model.dtype,
    remat=_FLAGS.config.model.remat,
  )
  print(f"{mesh.size} x {topology.devices[0].device_kind}, {rows:,} pairs", flush=True)
  for form in ("streaming", "ring"):
    _print(f"loss, {form}", _loss(mesh, rows, model.config.projection_dim, form))
  _print(f"step, {_FLAGS.model}", _step(_FLAGS.config, mesh, rows, model))


def _print(what: str, compiled: Any) -> None:
  memory = compiled.memory_analysis()
  print(
    f"{what}: temporaries {memory.temp_size_in_bytes / 1e9:.2f} GB, arguments "
    f"{memory.argument_size_in_bytes / 1e9:.2f} GB a chip",
    flush=True,
  )


def _rows(mesh: Mesh, dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=batch_sharding(mesh))


def _loss(mesh: Mesh, rows: int, width: int, form: str):
  """Value and all gradients of the loss alone, compiled."""

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

  bank, weight = _rows(mesh, "float32", rows, width), _rows(mesh, "float32", rows)
  step = jax.jit(jax.value_and_grad(run, argnums=range(4)))
  arguments = (bank, bank, weight, weight, _rows(mesh, "int32", rows, 2))
  return step.lower(*arguments).compile()


def _step(config: ConfigDict, mesh: Mesh, rows: int, model):
  """The recipe's whole step, compiled."""
  shapes, shape = model.abstract(), model.config
  optimizer = make_optimizer(config.optimizer, config.temperature, shapes, 10_000)
  size = shape.vision.image_size
  images = ImageProcessor.from_dict(
    {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
  )
  step = make_step(
    make_objective(model, images, config, mesh),
    optimizer,
    frozen_mask(config.optimizer, config.temperature, shapes),
    config.temperature,
  )
  counter = jax.ShapeDtypeStruct((), jnp.int32)
  state = {
    "params": shapes,
    "optimizer": jax.eval_shape(optimizer.init, shapes),
    **dict.fromkeys(("step", "bad_records", "failed_step"), counter),
  }
  everywhere = replicated(mesh)
  state = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
    state,
  )
  batch = {
    "pixels": _rows(mesh, "uint8", rows, size, size, 3),
    "tokens": _rows(mesh, "int32", rows, shape.text.context),
    "has_image": _rows(mesh, "bool", rows),
    "has_text": _rows(mesh, "bool", rows),
    "pair_ids": _rows(mesh, "int32", rows, 2),
  }
  return step.lower(state, batch, {}).compile()


if __name__ == "__main__":
  _define_flags()
  command_line.run(main)
