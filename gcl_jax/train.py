"""Trains a retriever: python -m gcl_jax.train --config=configs/demo.py

Run it again after any kill: it goes on where it was.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from gcl_jax import command_line
from gcl_jax.errors import UserError
from gcl_jax.paths import AnyPath, is_remote

_FLAGS = flags.FLAGS


def _define_flags() -> None:
  from ml_collections import config_flags

  config_flags.DEFINE_config_file("config", None, "a recipe, such as configs/demo.py")
  flags.DEFINE_string(
    "workdir", "", "the run's folder, gs:// too; by default runs/<config.name>"
  )
  flags.DEFINE_bool(
    "distributed", False, "join the other processes of this job (TPU pods, SLURM, ...)"
  )
  flags.DEFINE_string("coordinator", "", "host:port of process 0, without a cluster")
  flags.DEFINE_integer("processes", 0, "how many there are, without a cluster")
  flags.DEFINE_integer("process_id", -1, "which of them this is, from 0")
  flags.DEFINE_string(
    "compile_only", "", "compile the step for this TPU slice (v5e:16x16), run nothing"
  )


def main() -> None:
  """Flags in, one run, and the tables of what it changed."""
  config = _FLAGS.config
  if config is None:
    raise UserError("name a recipe, such as --config=configs/demo.py")
  if _FLAGS.compile_only:
    _compile_only(config)
    return

  from gcl_jax.processes import is_first, join

  explicit = (_FLAGS.coordinator, _FLAGS.processes, _FLAGS.process_id)
  if _FLAGS.distributed or explicit != ("", 0, -1):
    join(*explicit)

  from gcl_jax.checkpoints import run_folder
  from gcl_jax.evaluation import render
  from gcl_jax.training.check import describe_loss

  workdir = run_folder(_FLAGS.workdir or f"runs/{config.name}")
  trained, rows = train_and_evaluate(config, workdir)
  if not is_first():
    return
  print(render(rows, notes=[describe_loss(config)]))
  if not trained:
    print(
      f"This run is finished. To start anew: another --workdir, or remove {workdir}. To "
      "go on: a larger config.steps."
    )
  print(_next_commands(workdir))


def _compile_only(config: ConfigDict) -> None:
  from gcl_jax.training.ahead import compile_only, render
  from gcl_jax.training.check import check_loss, check_numbers

  check_loss(config)
  check_numbers(config)
  report = compile_only(config, _FLAGS.compile_only)
  print(render(report))
  if not report.fits:
    raise UserError(
      f"a chip of {_FLAGS.compile_only} does not hold this step: a smaller "
      "config.batch_size, more config.microbatches, config.model.remat, or "
      "config.mesh.fsdp would help."
    )


def train_and_evaluate(
  config: ConfigDict, workdir: AnyPath
) -> tuple[bool, dict[str, Mapping[str, Any]]]:
  """Runs a config, evaluated in nine directions on the held-out part of its data.

  Args:
    config: of `gcl_jax.training.config.default_config`, with a recipe's changes.
    workdir: the run's folder.

  Returns:
    Whether it trained (False: it was finished already), and the results `before` (where
    the config asks for it) and `after`.

  Raises:
    UserError: see `gcl_jax.training.run.train`.
  """
  from gcl_jax.data import open_source
  from gcl_jax.evaluation import (
    best_metric,
    build_items,
    check_metric,
    evaluate_nine,
    scalars,
  )
  from gcl_jax.retrieval import Embedder
  from gcl_jax.training.run import train

  check_metric(config.eval.best)
  held_out = open_source(config.data, split=config.data.eval_split)

  @functools.cache
  def items():
    return build_items(held_out, limit=config.eval.max_items or None)

  embedders: list[Embedder] = []

  def evaluate(model, params, processor, mesh, go_on):
    if not embedders:  # one, so that its functions compile once
      size = config.eval.batch_size
      embedders.append(Embedder(model, params, processor, mesh=mesh, batch_size=size))
    embed = embedders[0].with_params(params).embed
    return evaluate_nine(items(), embed, progress=go_on)

  def score(result):
    return best_metric(result, config.eval.best)

  outcome = train(config, workdir, evaluate=evaluate, score=score, summarize=scalars)
  rows = {"before": outcome.results[0]} if 0 in outcome.results else {}
  return outcome.trained, {**rows, "after": outcome.results[outcome.steps]}


def _next_commands(workdir: AnyPath) -> str:
  python = Path(sys.executable).name
  here = workdir.name if is_remote(workdir) else workdir  # an export is a local folder
  return (
    "Next:\n"
    f"  {python} -m gcl_jax.evaluate --checkpoint={workdir} "
    f"--output={workdir}/evaluation.json\n"
    f"  {python} -m gcl_jax.export --checkpoint={workdir} --output={here}-export\n"
    f"  {python} -m gcl_jax.train --config=configs/tinyclip.py "
    "--config.data.path=<your folder with captions.jsonl>"
  )


if __name__ == "__main__":
  _define_flags()
  command_line.run(main, resumable=True)
