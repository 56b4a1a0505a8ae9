"""A whole run, put together: sources, start, step, checkpoints, loop."""

from __future__ import annotations

import contextlib
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
  read_contents,
  run_folder,
  wait_for_run,
  write_description,
  write_result,
)
from gcl_jax.checkpoints.folder import check_free, keeping
from gcl_jax.checkpoints.weights import weights_in_use
from gcl_jax.data import Pipeline, Source, open_source
from gcl_jax.errors import Preempted, UserError
from gcl_jax.models import Model, read_pretrained, write_pretrained
from gcl_jax.paths import AnyPath, local_copy, local_draft
from gcl_jax.processes import Largest, Stop, barrier, is_first
from gcl_jax.processing import Processor
from gcl_jax.sharding import batch_devices, batch_share, make_mesh
from gcl_jax.training.accumulation import put_parts
from gcl_jax.training.adapters import adapted, adapted_shapes
from gcl_jax.training.average import begin_average
from gcl_jax.training.check import check_kernel, check_loss, check_numbers
from gcl_jax.training.compiled import CompiledStep, Meter, report_step
from gcl_jax.training.distill import Teacher, keep_teacher, read_teacher
from gcl_jax.training.flops import flops_options
from gcl_jax.training.loop import run_loop
from gcl_jax.training.objective import Objective, make_objective
from gcl_jax.training.optimizer import (
  cap_logit_scale,
  frozen_mask,
  learning_rate_schedule,
  make_optimizer,
)
from gcl_jax.training.resume import changed_fields, check_resumable
from gcl_jax.training.separation_features import needs_initial_tower, read_features
from gcl_jax.training.spool import Spool
from gcl_jax.training.start import make_start
from gcl_jax.training.state import (
  count_parameters,
  init_state,
  make_step,
  place_parameters,
  places_of_state,
)
from gcl_jax.training.writers import MetricWriter

# model, parameters, processor, mesh, what to call now and then with (items done, items
# to do) -> a result of JSON values
Evaluate = Callable[
  [Model, Any, Processor, Mesh, Callable[[int, int], None]], Mapping[str, Any]
]
# a result -> the number that keep-best watches, and what the boards show
Score = Callable[[Mapping[str, Any]], float]
Summarize = Callable[[Mapping[str, Any]], Mapping[str, float]]


class Outcome(NamedTuple):
  """How a run ended."""

  trained: bool
  steps: int
  results: Mapping[int, Mapping[str, Any]]


def train(
  config: ConfigDict,
  workdir: str | os.PathLike,
  *,
  evaluate: Evaluate,
  score: Score,
  summarize: Summarize,
) -> Outcome:
  """Runs a config in a folder, from wherever that folder's run was left.

  Args:
    config: of `default_config`, with a recipe's changes.
    workdir: the run's folder, of this machine or `gs://`; made where there is none.
    evaluate: called at the start and at evaluated steps; what it returns is kept in
      the folder.
    score: picks from a result the number of which the best checkpoint is kept.
    summarize: picks from a result the numbers that are logged.

  Returns:
    Whether it trained (False: the run there was finished), the length of the run, and
    every evaluation by step.

  Raises:
    UserError: anything in the config, the data or the folder that the user can mend;
      before anything compiles, save for a loss that stops being finite.
  """
  workdir = run_folder(workdir)
  check_free(workdir)
  check_loss(config)
  check_numbers(config)
  mesh = make_mesh(**config.mesh)
  source = open_source(config.data, split=config.data.train_split)
  total_steps = _length(config, source)
  _check_batch(config, mesh, source)
  learning_rate_schedule(config.optimizer, total_steps)  # raises on a bad one
  stored, saved, results = read_contents(workdir)
  if stored:
    check_resumable(stored, config, len(source), str(workdir))
  if saved and saved[-1] > total_steps:
    raise UserError(
      f"{workdir} is at step {saved[-1]} already, beyond the {total_steps} steps that "
      "are asked for: raise config.steps, or start anew with another --workdir."
    )
  barrier("the folder was read")  # before any of us writes to it
  if total_steps in saved and total_steps in results:
    return Outcome(False, total_steps, results)

  parts = _assemble(config, source, stored, mesh, total_steps, bool(saved), workdir)
  batches = _pipeline(config, source, parts.model, parts.processor, mesh)
  _describe(config, parts, total_steps, source, mesh, workdir)
  barrier("the folder is a run's")
  wait_for_run(workdir)
  spool = Spool(workdir, fetch=("metrics.jsonl",))
  checkpoints = Checkpoints(
    workdir,
    beside=spool.sync,
    keep_last=config.checkpoint.keep_last,
    keep_best=config.checkpoint.keep_best,
    scores=lambda: {step: score(result) for step, result in results.items()},
  )
  latest = checkpoints.latest()
  writer = MetricWriter(spool.folder, config, latest or 0, run=_name_of(workdir))
  with contextlib.ExitStack() as closing:
    for part in (checkpoints, spool, writer, batches):  # closed in the other order
      closing.callback(part.close)
    stop = closing.enter_context(Stop())
    state = init_state(parts.params, parts.optimizer, mesh)
    if config.ema_decay:
      state = begin_average(state, parts.frozen)
    checkpoints.check_room(state)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    if latest is not None:
      state, batches.position = checkpoints.restore(latest, state)
      if is_first():
        print(f"going on from step {latest}", file=sys.stderr, flush=True)

    def evaluate_and_keep(state: Any, step: int) -> None:
      def go_on(done: int, total: int) -> None:
        if stop.asked():
          raise Preempted(
            f"told to stop while evaluating ({done} of {total} items): "
            f"{f'step {step} is saved' if step else 'nothing was trained yet'}; the "
            "same command goes on from there"
          )

      weights = weights_in_use(state, config.lora.alpha)
      result = evaluate(parts.model, weights, parts.processor, mesh, go_on)
      checkpoints.wait()
      write_result(workdir, step, result)
      results[step] = result
      numbers = summarize(result).items()
      writer.write(step, {f"eval/{name}": value for name, value in numbers})
      spool.sync()
      if is_first():
        line = f"\nstep {step}: {config.eval.best} {score(result):.2f}"
        print(line, file=sys.stderr, flush=True)

    if _evaluation_is_owed(latest or 0, config, total_steps, results):
      evaluate_and_keep(state, latest or 0)
    meter = Meter(
      parts.model,
      mesh,
      config.batch_size,
      **flops_options(config, parts.teacher.model if parts.teacher else None),
    )
    run_loop(
      state,
      config=config,
      total_steps=total_steps,
      step_function=CompiledStep(
        make_step(
          parts.objective,
          parts.optimizer,
          parts.frozen,
          config.temperature,
          places,
          ema_decay=config.ema_decay,
          accumulate_steps=config.accumulate_steps,
        ),
        report_step(meter, mesh, batches.longest),
      ),
      meter=meter,
      batches=batches,
      place=lambda batch: put_parts(
        mesh,
        _rows(batch, parts.features, config, batches.rows_of_batch),
        config.accumulate_steps,
      ),
      constants=_constants(config, parts, mesh, workdir),
      checkpoints=checkpoints,
      evaluate=evaluate_and_keep,
      writer=writer,
      watch=_weight_watch(config),
      stop=stop,
      workdir=spool.folder,
      records=len(source),
    )
  return Outcome(True, total_steps, results)


class _Parts(NamedTuple):
  """What is built from a config before the first step."""

  model: Model
  params: Any
  processor: Processor
  optimizer: optax.GradientTransformation
  frozen: Any
  objective: Objective
  features: np.ndarray | None
  teacher: Teacher | None


def _assemble(
  config: ConfigDict,
  source: Source,
  stored: RunDescription | None,
  mesh: Mesh,
  total_steps: int,
  trained: bool,
  workdir: AnyPath,
) -> _Parts:
  """Everything that can be refused first, the parameters (which compile) last."""
  features = read_features(config, len(source))
  model, processor, first_params = make_start(config, source, stored, trained)
  check_kernel(config, model.config.projection_dim)
  shapes = adapted_shapes(config, model.abstract())
  optimizer = make_optimizer(config.optimizer, config.temperature, shapes, total_steps)
  frozen = frozen_mask(config.optimizer, config.temperature, shapes)
  teacher = read_teacher(config, model, processor, workdir if trained else None)
  elder = (teacher.model, teacher.processor.image) if teacher else None
  objective = make_objective(model, processor.image, config, mesh, elder)
  _pipeline(
    config, source, model, processor, mesh
  ).close()  # refuses what it cannot read
  places_of_state(shapes, optimizer, mesh)  # and what cannot be split so
  params = cap_logit_scale(first_params(), config.temperature)
  if needs_initial_tower(config) and not trained and is_first():
    with keeping(workdir / _INITIAL), local_draft(workdir / _INITIAL) as here:
      write_pretrained(here, model.config, params)
  if teacher and not trained and is_first():
    keep_teacher(teacher, workdir)
  params = adapted(params, shapes, config.seed)
  return _Parts(
    model, params, processor, optimizer, frozen, objective, features, teacher
  )


def _pipeline(
  config: ConfigDict, source: Source, model: Model, processor: Processor, mesh: Mesh
) -> Pipeline:
  return Pipeline(
    source,
    processor,
    batch_size=config.batch_size,
    seed=config.seed,
    augment=config.data.augment,
    crop_scale=tuple(config.data.crop_scale),
    buckets=tuple(config.data.text_buckets),
    pair_length=model.config.pair_context,
    share=batch_share(mesh),
    cuts=config.accumulate_steps,
    agree=Largest("longest text"),
    threads=config.data.threads,
    # Grain keeps no more threads at work than there are batches ahead.
    prefetch=max(config.data.prefetch, config.data.threads),
  )


def _rows(
  batch: Mapping[str, np.ndarray],
  features: np.ndarray | None,
  config: ConfigDict,
  places: np.ndarray,
) -> dict:
  """What the step takes of a batch; `places` are its rows' in the global one."""
  rows = {name: batch[name] for name in _STEP_KEYS}
  if features is not None:
    rows["separation_features"] = np.asarray(features[batch["index"]], np.float32)
  if config.model.patch_dropout:  # whose draws are by place, as the pipeline deals them
    rows["place"] = places.astype(np.int32)
  return rows


def _constants(
  config: ConfigDict, parts: _Parts, mesh: Mesh, workdir: AnyPath
) -> dict[str, Any]:
  constants = {}
  if parts.teacher:
    constants["teacher_params"] = place_parameters(parts.teacher.params, mesh)
  if needs_initial_tower(config):
    # From the run's folder: what it once started from may have moved.
    with local_copy(workdir / _INITIAL) as here:
      _, _, initial = read_pretrained(here)
    extra = {"fusion": parts.params["fusion"]} if "fusion" in parts.params else {}
    constants["initial_params"] = place_parameters({**initial, **extra}, mesh)
  return constants


def _name_of(workdir: AnyPath) -> str:
  return str(workdir.absolute() if isinstance(workdir, Path) else workdir)


_INITIAL = "initial"
_STEP_KEYS = ("pixels", "tokens", "has_image", "has_text", "pair_ids")


def _length(config: ConfigDict, source: Source) -> int:
  steps = config.steps or math.ceil(config.epochs * len(source) / config.batch_size)
  if steps < 1:
    raise UserError("config.steps and config.epochs are both 0: how long is the run?")
  return steps


def _check_batch(config: ConfigDict, mesh: Mesh, source: Source) -> None:
  devices = parts = batch_devices(mesh)
  if config.batch_size < 1 or config.batch_size % parts:
    near = max(config.batch_size // parts, 1) * parts
    raise UserError(
      f"config.batch_size is {config.batch_size}, which {parts} devices cannot share "
      f"evenly: {near} or {near + parts} would do."
    )
  for field in ("accumulate_steps", "microbatches"):
    here, count = config.batch_size // parts, config[field]
    if here % count:
      near = max(here // count, 1) * count * parts
      cut = "" if parts == devices else f" in {config.accumulate_steps} parts"
      raise UserError(
        f"config.{field} is {count}, which does not divide the {here} pairs of a device "
        f"(config.batch_size {config.batch_size} over {devices} devices{cut}): a batch of "
        f"{near} would do."
      )
    parts *= count
  if config.batch_size > len(source):
    raise UserError(
      f"config.batch_size is {config.batch_size}, but there are only {len(source)} "
      f"records to train on: at most {len(source) // devices * devices} would do."
    )


def _evaluation_is_owed(
  step: int, config: ConfigDict, total_steps: int, results: Mapping[int, Any]
) -> bool:
  """Whether the start, or a step that a kill cut off from its evaluation, has none."""
  every = config.eval.every
  if step:
    due = step == total_steps or bool(every and step % every == 0)
  else:
    due = config.eval.before
  return due and step not in results


# Fusion weights above this cost the four products of a Mix more than 1e-4 of a gradient
# (`python -m benchmarks.loss_accuracy`).
_LARGE_WEIGHT = 10.0


def _weight_watch(config: ConfigDict) -> Callable[[int, Mapping[str, float]], None]:
  """Warns once, when fusion weights have become large."""
  loss = config.loss
  careful = config.fusion.as_bank or loss.form == "dense" or loss.name != "gcl"
  quiet = careful or not is_first()

  def watch(step: int, values: Mapping[str, float]) -> None:
    nonlocal quiet
    largest = values.get("fusion/largest_weight", 0.0)  # no sum, no weights
    if quiet or largest <= _LARGE_WEIGHT:
      return
    quiet = True
    print(
      f"\nnote: at step {step} an image and its text point so far apart that fusion "
      f"weighs them {largest:.0f}-fold, which costs the loss some digits; "
      "--config.fusion.as_bank=True avoids that and is a little slower.",
      file=sys.stderr,
      flush=True,
    )

  return watch


def _describe(
  config: ConfigDict,
  parts: _Parts,
  total_steps: int,
  source: Source,
  mesh: Mesh,
  workdir: AnyPath,
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
  if not is_first():
    return
  print(
    f"config, where it differs from the defaults (all of it: {workdir}/run.json):\n"
    f"{fields}\n{len(source):,} training records, {total_steps} steps of "
    f"{config.batch_size} pairs\n{sum(counts.values()):,} parameters ({sizes})\n"
    f"{mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {dict(mesh.shape)}\n"
    f"run folder: {workdir}",
    file=sys.stderr,
    flush=True,
  )
