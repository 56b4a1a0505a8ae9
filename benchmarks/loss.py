"""Time and memory of the loss, value and all gradients, form against form.

    python -m benchmarks.loss --quick --output=loss.json

Forms are timed in turn (A B A B ...), since machines are noisy, and medians are shown;
`ratio` is the time of `ratio_to` at the same size divided by the form's own. `dense` is
the loss as a competent user writes it: one (3N, 3N) product, mask, logsumexp. `limit` is
the time that the products and the exponentials alone would take, at the rates of a
jitted 2048 x 2048 x 2048 product and of jnp.exp measured between the forms.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax import Array

from gcl_jax import command_line
from gcl_jax.errors import UserError
from gcl_jax.fusion import Mix, fuse
from gcl_jax.losses import gcl_loss
from gcl_jax.losses.engine import KERNEL_BLOCK, default_block
from gcl_jax.sharding import make_mesh, put_batch

_FLAGS = flags.FLAGS
_DENSE_UP_TO = 8192  # pairs: above it a (3N, 3N) float32 array takes more than 2 GiB
_SCALE = 50.0


def _define_flags() -> None:
  flags.DEFINE_bool("quick", False, "4,096 pairs only")
  flags.DEFINE_list(
    "sizes", ["1024", "2048", "4096", "8192", "16384", "32768"], "pairs"
  )
  flags.DEFINE_integer("width", 512, "of an embedding")
  flags.DEFINE_integer("block_size", 0, "rows and columns of a tile; 0: the loss's own")
  flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the embeddings")
  flags.DEFINE_list("forms", [], f"of {', '.join(FORMS)}; all that fit by default")
  flags.DEFINE_integer("repeats", 5, "measurements of each form")
  flags.DEFINE_string("output", "", "the JSON file of rows")


def main() -> None:
  """Measures, prints the table and writes the rows."""
  sizes = [4096] if _FLAGS.quick else [int(size) for size in _FLAGS.sizes]
  unknown = sorted(set(_FLAGS.forms) - set(FORMS))
  if unknown:
    raise UserError(f"--forms: {', '.join(unknown)}: choose from {', '.join(FORMS)}")
  rows = []
  for size in sizes:
    rows += measure(
      size,
      _FLAGS.width,
      _FLAGS.forms or FORMS,
      dtype=_FLAGS.dtype,
      repeats=_FLAGS.repeats,
      block_size=_FLAGS.block_size or None,
    )
    print(table(rows), flush=True)
    if _FLAGS.output:
      Path(_FLAGS.output).write_text(json.dumps(rows, indent=1) + "\n")


def dense(image: Array, text: Array, fused: Array, scale: Array) -> Array:
  """`self_masked` over whole pairs, as written without this package."""
  banks = jnp.stack([image, text, fused])
  banks = banks.astype(jnp.promote_types(banks.dtype, jnp.float32))
  rows = banks.reshape(-1, banks.shape[-1])
  logits = jnp.matmul(scale * rows, rows.T, precision="highest")
  logits = jnp.where(jnp.eye(len(rows), dtype=bool), -jnp.inf, logits)
  lse = jax.nn.logsumexp(logits, axis=1).reshape(3, -1)
  same = scale * jnp.einsum("and,bnd->abn", banks, banks)
  losses = [lse[a] - same[a, b] for a in range(3) for b in range(3) if a != b]
  return jnp.mean(jnp.stack(losses))


def _dense(image, text, mix, scale, **_) -> Array:
  return dense(image, text, fuse(image, text, mix), scale)


def _ours(form: str, bank: bool, image, text, mix, scale, **options) -> Array:
  fused = fuse(image, text, mix) if bank else mix
  return gcl_loss(image, text, fused, logit_scale=scale, form=form, **options)[0]


FORMS: dict[str, Callable[..., Array]] = {
  "dense": _dense,
  "streaming": functools.partial(_ours, "streaming", False),
  "streaming_banks": functools.partial(_ours, "streaming", True),
  "ring": functools.partial(_ours, "ring", False),
  "kernel": functools.partial(_ours, "streaming", False, kernel="pallas"),
}


def _runs_here(form: str, pairs: int) -> bool:
  if form == "kernel":
    return jax.default_backend() == "gpu"  # elsewhere it is interpreted
  if form == "ring":
    return jax.device_count() > 1
  return form != "dense" or pairs <= _DENSE_UP_TO


def work(
  form: str, pairs: int, width: int, block: int, devices: int
) -> tuple[int, int]:
  """Multiply-adds and exponentials of a form, over all devices."""
  if form == "dense":
    return 27 * pairs**2 * width, 18 * pairs**2
  products = 9 if form == "streaming_banks" else 4
  if devices > 1:
    return 3 * products * pairs**2 * width, 18 * pairs**2
  blocks = -(-pairs // block)
  above, diagonal = blocks * (blocks - 1) // 2, blocks
  # A tile on the diagonal: forward, once more, and the rows' gradient; one above it the
  # columns' too.
  tiles = products * (4 * above + 3 * diagonal)
  return tiles * block**2 * width, (27 * above + 18 * diagonal) * block**2


def measure(
  pairs: int,
  width: int,
  forms,
  *,
  dtype: str = "float32",
  repeats: int = 5,
  block_size: int | None = None,
) -> list[dict[str, Any]]:
  """One JSON row for each form at one size."""
  devices = jax.device_count()
  mesh = make_mesh() if devices > 1 else None
  arguments = _arguments(pairs, width, dtype, mesh)
  compiled = {}
  for form in forms:
    if not _runs_here(form, pairs):
      continue
    run = functools.partial(FORMS[form], mesh=mesh, block_size=block_size)
    step = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2, 3)))
    compiled[form] = step.lower(*arguments).compile()
  if not compiled:
    raise UserError(f"--forms: none of {', '.join(forms)} can run {pairs} pairs here")
  product, exponential = _references(dtype)
  seconds: dict[str, list[float]] = {form: [] for form in compiled}
  rates: list[tuple[float, float]] = []
  for repeat in range(repeats + 1):
    for form, program in compiled.items():
      took = _seconds(program, arguments)
      rate = product(), exponential()
      if repeat:  # the first of each warms up
        seconds[form].append(took)
        rates.append(rate)
  madds, exps = (statistics.median(column) for column in zip(*rates, strict=True))
  baseline = next(iter(compiled))
  # Virtual CPU devices share the cores at whose rates the references ran.
  cores = 1 if jax.default_backend() == "cpu" else devices
  rows = []
  for form, program in compiled.items():
    took = statistics.median(seconds[form])
    most = block_size or (KERNEL_BLOCK if form == "kernel" else default_block(mesh))
    block = -(-pairs // -(-pairs // most))
    products, exponentials = work(form, pairs, width, block, devices)
    rows.append(
      {
        "n": pairs,
        "d": width,
        "devices": devices,
        "device": jax.devices()[0].device_kind,
        "form": form,
        "dtype": dtype,
        "ms": 1e3 * took,
        "temp_bytes": program.memory_analysis().temp_size_in_bytes,
        "ratio": statistics.median(seconds[baseline]) / took,
        "ratio_to": baseline,
        "limit_share": (products / madds + exponentials / exps) / cores / took,
        "madds_per_s": madds,
        "exps_per_s": exps,
      }
    )
  return rows


def table(rows: list[dict[str, Any]]) -> str:
  """The rows in Markdown."""
  lines = [
    "| N | D | devices | form | ms | temporary MB | times as fast as | of the limit |",
    "|---:|---:|---:|---|---:|---:|---|---:|",
  ]
  for row in rows:
    lines.append(
      f"| {row['n']:,} | {row['d']} | {row['devices']} | {row['form']} | "
      f"{row['ms']:,.0f} | {row['temp_bytes'] / 1e6:,.1f} | "
      f"{row['ratio']:.2f} x {row['ratio_to']} | {100 * row['limit_share']:.0f} % |"
    )
  return "\n".join(lines)


def _arguments(pairs: int, width: int, dtype: str, mesh):
  keys = jax.random.split(jax.random.key(0), 4)
  image = jax.random.normal(keys[0], (pairs, width))
  text = image + jax.random.normal(keys[1], (pairs, width))
  image, text = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
  alpha, beta = (
    jax.random.uniform(key, (pairs,), minval=0.4, maxval=0.7) for key in keys[2:]
  )
  arrays = {
    "image": image.astype(dtype),
    "text": text.astype(dtype),
    "a": alpha,
    "b": beta,
  }
  if mesh is not None:
    arrays = put_batch(mesh, arrays)
  mix = Mix(arrays["a"], arrays["b"])
  return arrays["image"], arrays["text"], mix, jnp.float32(_SCALE)


def _references(dtype: str) -> tuple[Callable[[], float], Callable[[], float]]:
  """Multiply-adds a second of a large product, and exponentials a second."""
  x = jax.random.normal(jax.random.key(1), (2048, 2048))
  factor = x.astype(dtype)
  product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
  product = product.lower(factor).compile()
  # Summed where it is made: writing 16 MB would be measured instead.
  exponential = jax.jit(lambda x: jnp.sum(jnp.exp(x), axis=1)).lower(x).compile()
  return (
    lambda: 2048**3 / _seconds(product, (factor,)),
    lambda: x.size / _seconds(exponential, (x,)),
  )


def _seconds(program, arguments) -> float:
  start = time.perf_counter()
  jax.block_until_ready(program(*arguments))
  return time.perf_counter() - start


if __name__ == "__main__":
  _define_flags()
  command_line.run(main)
