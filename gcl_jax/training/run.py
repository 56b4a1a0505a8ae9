"""A whole run, put together: sources, start, step, checkpoints, loop."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gcl_jax.checkpoints import (
  Checkpoints,
  RunDescription,
  is_run,
  read_description,
  read_result,
  read_results,
  write_description,
  write_result,
)
from gcl_jax.checkpoints.folder import check_free
from gcl_jax.data import Pipeline, Source, open_source
from gcl_jax.errors import UserError
from gcl_jax.models import Model
from gcl_jax.processing import Processor
from gcl_jax.sharding import batch_devices, make_mesh, put_batch
from gcl_jax.training.loop import run_loop
from gcl_jax.training.objective import Objective, check_loss, make_objective
from gcl_jax.training.optimizer import (
  cap_logit_scale,
  frozen_mask,
  learning_rate_schedule,
  make_optimizer,
)
from gcl_jax.training.resume import changed_fields, check_resumable
from gcl_jax.training.start import make_start
from gcl_jax.training.state import (
  count_parameters,
  init_state,
  make_step,
  place_parameters,
)
from gcl_jax.training.writers import MetricWriter

# model, parameters, processor, mesh -> a result of JSON values
Evaluate = Callable[[Model, Any, Processor, Mesh], Mapping[str, Any]]
# a result -> the number that keep-best watches, and what the boards show
Score = Callable[[Mapping[str, Any]], float]
Summarize = Callable[[Mapping[str, Any]], Mapping[str, float]]


def train(
  config: ConfigDict,
  workdir: str | os.PathLike,
  *,
  evaluate: Evaluate,
  score: Score,
  summarize: Summarize,
) -> bool:
  """Runs a config in a folder, from wherever that folder's run was left.

  Args:
    config: of `default_config`, with a recipe's changes.
    workdir: the run's folder; made where there is none.
    evaluate: called at the start and at evaluated steps; what it returns is kept in
      the folder.
    score: picks from a result the number of which the best checkpoint is kept.
    summarize: picks from a result the numbers that are logged.

  Returns:
    True when it trained, False when the run there was already finished.

  Raises:
    UserError: anything in the config, the data or the folder that the user can mend;
      before anything compiles, save for a loss that stops being finite.
  """
  workdir = Path(workdir)
  check_free(workdir)
  check_loss(config)
  mesh = make_mesh(**config.mesh)
  source = open_source(config.data, split=config.data.train_split)
  total_steps = _length(config, source)
  _check_batch(config, mesh, source)
  learning_rate_schedule(config.optimizer, total_steps)  # raises on a bad one
  stored = read_description(workdir) if is_run(workdir) else None
  if stored:
    check_resumable(stored, config, len(source), str(workdir))
  if read_result(workdir, total_steps) is not None:
    return False

  parts = _assemble(config, source, stored, mesh, total_steps)
  batches = _pipeline(config, source, parts.processor)
  _describe(config, parts, total_steps, source, mesh, workdir)
  checkpoints = Checkpoints(
    workdir,
    keep_last=config.checkpoint.keep_last,
    keep_best=config.checkpoint.keep_best,
    scores=lambda: {step: score(r) for step, r in read_results(workdir).items()},
  )
  latest = checkpoints.latest()
  writer = MetricWriter(workdir, config, latest or 0)
  try:
    state = init_state(parts.params, parts.optimizer, mesh)
    if latest is not None:
      state, batches.position = checkpoints.restore(latest, state)
      print(f"going on from step {latest}", file=sys.stderr, flush=True)

    def evaluate_and_keep(state: Any, step: int) -> None:
      result = evaluate(parts.model, state["params"], parts.processor, mesh)
      write_result(workdir, step, result)
      numbers = summarize(result).items()
      writer.write(step, {f"eval/{name}": value for name, value in numbers})
      line = f"\nstep {step}: {config.eval.best} {score(result):.2f}"
      print(line, file=sys.stderr, flush=True)

    if _evaluation_is_owed(latest or 0, config, total_steps, workdir):
      evaluate_and_keep(state, latest or 0)
    run_loop(
      state,
      config=config,
      total_steps=total_steps,
      step_function=make_step(
        parts.objective, parts.optimizer, parts.frozen, config.temperature
      ),
      batches=batches,
      place=lambda batch: put_batch(mesh, _rows(batch, parts.features)),
      constants=_constants(config, parts.params, mesh),
      checkpoints=checkpoints,
      evaluate=evaluate_and_keep,
      writer=writer,
      workdir=workdir,
      records=len(source),
    )
  finally:
    batches.close()
    writer.close()
    checkpoints.close()
  return True


class _Parts(NamedTuple):
  """What is built from a config before the first step."""

  model: Model
  params: Any
  processor: Processor
  optimizer: optax.GradientTransformation
  frozen: Any
  objective: Objective
  features: np.ndarray | None


def _assemble(
  config: ConfigDict,
  source: Source,
  stored: RunDescription | None,
  mesh: Mesh,
  total_steps: int,
) -> _Parts:
  model, params, processor = make_start(config, source, stored)
  shapes = model.abstract()
  return _Parts(
    model=model,
    params=cap_logit_scale(params, config.temperature),
    processor=processor,
    optimizer=make_optimizer(config.optimizer, config.temperature, shapes, total_steps),
    frozen=frozen_mask(config.optimizer, config.temperature, shapes),
    objective=make_objective(model, processor.image, config, mesh),
    features=_separation_features(config, len(source)),
  )


def _pipeline(config: ConfigDict, source: Source, processor: Processor) -> Pipeline:
  return Pipeline(
    source,
    processor,
    batch_size=config.batch_size,
    seed=config.seed,
    augment=config.data.augment,
    crop_scale=tuple(config.data.crop_scale),
    buckets=tuple(config.data.text_buckets),
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    threads=config.data.threads,
    prefetch=config.data.prefetch,
  )


def _rows(batch: Mapping[str, np.ndarray], features: np.ndarray | None) -> dict:
  rows = {name: batch[name] for name in _STEP_KEYS}
  if features is not None:
    rows["separation_features"] = np.asarray(features[batch["index"]], np.float32)
  return rows


def _constants(config: ConfigDict, params: Any, mesh: Mesh) -> dict[str, Any]:
  asked = config.loss.separation_features == "initial_text_tower"
  if not config.loss.intra_modal_separation or not asked:
    return {}
  return {"initial_params": place_parameters(params, mesh)}


_STEP_KEYS = ("pixels", "tokens", "has_image", "has_text", "pair_ids")


def _length(config: ConfigDict, source: Source) -> int:
  steps = config.steps or math.ceil(config.epochs * len(source) / config.batch_size)
  if steps < 1:
    raise UserError("config.steps and config.epochs are both 0: how long is the run?")
  return steps


def _check_batch(config: ConfigDict, mesh: Mesh, source: Source) -> None:
  parts = batch_devices(mesh)
  if config.batch_size < 1 or config.batch_size % parts:
    near = max(config.batch_size // parts, 1) * parts
    raise UserError(
      f"config.batch_size is {config.batch_size}, which {parts} devices cannot share "
      f"evenly: {near} or {near + parts} would do."
    )
  if config.batch_size > len(source):
    raise UserError(
      f"config.batch_size is {config.batch_size}, but there are only {len(source)} "
      f"records to train on: at most {len(source) // parts * parts} would do."
    )


def _evaluation_is_owed(
  step: int, config: ConfigDict, total_steps: int, workdir: Path
) -> bool:
  """Whether the start, or a step that a kill cut off from its evaluation, has none."""
  every = config.eval.every
  if step:
    due = step == total_steps or bool(every and step % every == 0)
  else:
    due = config.eval.before
  return due and read_result(workdir, step) is None


def _separation_features(config: ConfigDict, records: int) -> np.ndarray | None:
  name = config.loss.separation_features
  if not config.loss.intra_modal_separation or not name.endswith(".npy"):
    return None
  try:
    features = np.load(name, mmap_mode="r", allow_pickle=False)
  except (OSError, ValueError) as error:
    raise UserError(f"config.loss.separation_features={name}: {error}.") from None
  if features.ndim != 2 or len(features) != records:
    raise UserError(
      f"config.loss.separation_features={name} has shape {features.shape}: it needs one "
      f"row for each of the {records} training records, in their order."
    )
  return features


def _describe(
  config: ConfigDict,
  parts: _Parts,
  total_steps: int,
  source: Source,
  mesh: Mesh,
  workdir: Path,
) -> None:
  """Writes what the run is into its folder and onto the screen."""
  description = RunDescription(
    config=config,
    model=parts.model.config,
    fusion=parts.model.fusion,
    processor=parts.processor,
    steps=total_steps,
    records=len(source),
  )
  write_description(workdir, description)
  counts = count_parameters(parts.params)
  sizes = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count > 1)
  fields = "\n".join(
    f"  config.{name} = {value!r}" for name, value in changed_fields(config).items()
  )
  print(
    f"config, where it differs from the defaults (all of it: {workdir}/run.json):\n"
    f"{fields}\n{len(source):,} training records, {total_steps} steps of "
    f"{config.batch_size} pairs\n{sum(counts.values()):,} parameters ({sizes})\n"
    f"{mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {dict(mesh.shape)}\n"
    f"run folder: {workdir}",
    file=sys.stderr,
    flush=True,
  )
