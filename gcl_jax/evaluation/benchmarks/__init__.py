"""Public retrieval benchmarks: official files in, official numbers out."""

from __future__ import annotations

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks.cirr import open_cirr
from gcl_jax.evaluation.benchmarks.composed import open_composed
from gcl_jax.evaluation.benchmarks.covr import open_covr
from gcl_jax.evaluation.benchmarks.evaluate import evaluate_benchmark
from gcl_jax.evaluation.benchmarks.fashioniq import open_fashioniq
from gcl_jax.evaluation.benchmarks.flickr8k_expert import open_flickr8k_expert
from gcl_jax.evaluation.benchmarks.karpathy import open_coco, open_flickr30k
from gcl_jax.evaluation.benchmarks.mbeir import open_mbeir
from gcl_jax.evaluation.benchmarks.mmeb import open_mmeb
from gcl_jax.evaluation.benchmarks.result import table_of
from gcl_jax.evaluation.benchmarks.task import Benchmark, Options

BENCHMARKS = {
  "mbeir": open_mbeir,
  "mmeb": open_mmeb,
  "covr": open_covr,
  "cirr": open_cirr,
  "fashioniq": open_fashioniq,
  "coco": open_coco,
  "flickr30k": open_flickr30k,
  "flickr8k_expert": open_flickr8k_expert,
  "composed": open_composed,
}
# Which choices a benchmark has; the others are refused where they would do nothing.
_CHOICES = {"mbeir": {"pool", "instructions"}, "mmeb": {"instructions", "mode"}}
_CHOICES |= {"covr": {"targets"}}


def open_benchmark(name: str, root: str, options: Options) -> Benchmark:
  """Reads and checks a benchmark's folder; embeds nothing.

  Raises:
    UserError: no such benchmark or choice, or its folder is not as it should be.
  """
  if name not in BENCHMARKS:
    raise UserError(f"--benchmark={name}: there are {', '.join(BENCHMARKS)}.")
  for choice in ("pool", "instructions", "mode", "targets"):
    if getattr(options, choice) and choice not in _CHOICES.get(name, ()):
      raise UserError(f"--{choice} does nothing for --benchmark={name}: leave it out.")
  return BENCHMARKS[name](root, options)


__all__ = [
  "BENCHMARKS",
  "Benchmark",
  "Options",
  "evaluate_benchmark",
  "open_benchmark",
  "table_of",
]
