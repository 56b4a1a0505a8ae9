"""Orbax checkpoints of a run: asynchronous, atomic, the last and the best kept."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict

from gcl_jax.checkpoints.folder import Folder, read_description, run_folder
from gcl_jax.checkpoints.room import check_room, no_room_for
from gcl_jax.checkpoints.weights import weights_in_use
from gcl_jax.checkpoints.whole import STEPS, damaged_steps, saved_steps
from gcl_jax.errors import UserError
from gcl_jax.models import Model, build
from gcl_jax.paths import RemotePath
from gcl_jax.processing import Processor


class _Best(ocp.checkpoint_managers.PreservationPolicy):
  """Keeps the n steps of highest score.

  Orbax's own policy wants the score when a step is saved; here the step is saved
  first and evaluated after, so that a kill during the evaluation loses no training.
  """

  def __init__(self, scores: Callable[[], Mapping[int, float]], n: int):
    self._scores, self._n = scores, n

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    scores = self._scores()
    here = [info.step for info in checkpoints if info.step in scores]
    best = set(sorted(here, key=lambda step: (scores[step], step))[-self._n :])
    return (
      [info.step in best for info in checkpoints]
      if self._n
      else [False] * len(checkpoints)
    )


class _Manager(ocp.CheckpointManager):
  """Orbax's, which saves when it is told to and asks nobody else.

  Its own would ask JAX's preemption service at every save, by the step; the service
  forgets what `processes.Stop` asked by its own count, and a stop would go unheard.
  """

  def reached_preemption(self, step: int) -> bool:
    """Never: the loop asks."""
    del step
    return False


class Checkpoints:
  """The checkpoints of one run: save, restore, list.

  A checkpoint is the whole training state and the data position. Saving copies to the
  host before it returns and writes in the background; a step that was cut off while
  it was written does not exist. A step that lacks files is put aside as
  `<step>.damaged`, and the one before it is the newest.
  """

  def __init__(
    self,
    workdir: Folder,
    *,
    keep_last: int = 2,
    keep_best: int = 1,
    scores: Callable[[], Mapping[int, float]] = dict,
    beside: Callable[[], None] = lambda: None,
  ):
    """Args:
    workdir: the run's folder.
    keep_last, keep_best: how many of each are kept.
    scores: step -> score of the steps evaluated so far; higher is better.
    beside: called before a step is begun, to keep what belongs to it.

    Raises:
      UserError: a store that does not let Orbax in.
    """
    policies = [ocp.checkpoint_managers.LatestN(max(keep_last, 1))]
    if keep_best:
      policies.append(_Best(scores, keep_best))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
      cleanup_tmp_directories=True,
    )
    if jax.process_index() == 0:
      _put_damaged_aside(workdir)  # Orbax makes all processes wait before it looks
    self._folder, self._beside = _for_orbax(workdir) / STEPS, beside
    self._begun: tuple[int, int] | None = None  # the last step and its bytes
    self._failed = False
    with _told_if_refused(self._folder):
      self._manager = _Manager(self._folder, options=options)
    logging.getLogger("absl").addFilter(_told_twice)

  def latest(self) -> int | None:
    """The newest whole step, or None."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """All whole steps, ascending."""
    return sorted(self._manager.all_steps())

  def check_room(self, state: Any) -> None:
    """Refuses to begin where the disk does not hold two checkpoints, of a local run.

    Raises:
      UserError: with what is free and what is needed.
    """
    check_room(self._folder, _bytes(state), len(self.steps()))

  def save(self, step: int, state: Any, position: int) -> None:
    """Begins to write a step; `position` is the data pipeline's, in records.

    Raises:
      UserError: there is no room for it, or there was none for the step begun before.
    """
    self._beside()
    self.wait()
    self._begun = step, _bytes(state)
    with self._writing():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(state),
          data=ocp.args.JsonSave({"position": int(position)}),
        ),
      )

  def restore(self, step: int, like: Any) -> tuple[Any, int]:
    """The state of a step, placed and typed as `like`, and the data position.

    Raises:
      UserError: the checkpoint holds another tree or other shapes than `like`.
    """
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeRestore(abstract, restore_args=arguments),
          data=ocp.args.JsonRestore(),
        ),
      )
    except (ValueError, KeyError) as error:
      reason = str(error).splitlines()[0]
      raise UserError(
        f"the checkpoint {self._folder / str(step)} does not fit this run's model and "
        f"optimizer ({reason}): resume with the config it was written with, or name a "
        "new --workdir."
      ) from error
    return restored["state"], int(restored["data"]["position"])

  def wait(self) -> None:
    """Returns when everything begun is on disk.

    Raises:
      UserError: there is no room for it.
    """
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then releases the folder. UserError as `wait`, if it was not told yet."""
    try:
      if not self._failed:
        self.wait()
    finally:
      with suppress(Exception):  # all that could fail was waited for
        self._manager.close()
      logging.getLogger("absl").removeFilter(_told_twice)

  @contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      self._failed = True
      if self._begun is None:
        raise
      step, size = self._begun
      said = no_room_for(
        step, size, self._folder, saved_steps(self._folder.parent), error
      )
      if said is None:
        raise
      raise UserError(said) from error


def _told_twice(record: logging.LogRecord) -> bool:
  """A filter: whether a log record is not of an error that Orbax also raises.

  It logs each from every thread that it passes, with a traceback.
  """
  return not (record.exc_info and "orbax" in record.pathname)


def _bytes(state: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _for_orbax(workdir: Folder) -> epath.Path:
  """Etils' path, which Orbax takes."""
  folder = run_folder(workdir)
  if isinstance(folder, RemotePath):
    # Where TensorFlow is installed etils would go through it; here gcsfs is used for all.
    os.environ.setdefault("EPATH_USE_TF", "false")
    return epath.Path(str(folder))
  return epath.Path(folder.absolute())


@contextmanager
def _told_if_refused(folder: epath.Path) -> Iterator[None]:
  """Asks of a bucket, first of all, what Orbax will ask when it saves.

  Orbax asks by Google's own library, which comes with gcsfs but finds credentials and
  a project by itself. There is no public name for the question.
  """
  if not str(folder).startswith("gs://"):
    yield
    return
  from orbax.checkpoint._src.path import gcs_utils

  try:
    gcs_utils.is_hierarchical_namespace_enabled(folder)
    yield
  except Exception as error:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise UserError(
      f"{folder} cannot be opened for checkpoints ({reason}): check the bucket, the "
      "credentials of this machine (gcloud auth application-default login) and "
      "GOOGLE_CLOUD_PROJECT."
    ) from error


def _put_damaged_aside(workdir: Folder) -> None:
  for step in damaged_steps(workdir):
    aside = step.with_name(f"{step.name}.damaged")
    while aside.exists():
      aside = aside.with_name(f"{aside.name}.damaged")
    step.rename(aside)
    print(
      f"note: the checkpoint {step} lacks files and was put aside as {aside.name}",
      file=sys.stderr,
      flush=True,
    )


def read_run(
  workdir: Folder, step: int | None = None
) -> tuple[Model, Any, Processor, ConfigDict]:
  """A trained model from a run's folder, for use rather than for training.

  Args:
    workdir: the run's folder.
    step: which checkpoint; None is the newest.

  Returns:
    The model, its parameters (nested dict of float32 NumPy arrays; their averages where
    the run keeps some, and LoRA's factors merged), the processor and the run's config.

  Raises:
    UserError: no run, no checkpoint yet, or no such step.
  """
  run = read_description(workdir)
  steps = saved_steps(workdir)
  if not steps:
    raise UserError(
      f"{workdir} has no checkpoint yet: let the run reach its first one."
    )
  if step is not None and step not in steps:
    raise UserError(f"{workdir} has no checkpoint of step {step}: it has {steps}.")
  model = build(
    run.model,
    fusion=run.fusion,
    dtype=run.config.model.dtype,
    remat=run.config.model.remat,
  )
  folder = _for_orbax(workdir) / STEPS / str(step or steps[-1]) / "state"
  extra = _extra_shapes(folder)
  wanted = {**extra, "params": {**model.abstract(), **extra["params"]}}
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
  with ocp.PyTreeCheckpointer() as reader:
    restored = reader.restore(
      folder,
      args=ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True),
    )
  alpha = run.config.get("lora", {}).get("alpha", 1.0)  # older runs have no LoRA
  params = jax.tree.map(np.asarray, weights_in_use(restored, alpha))
  return model, params, run.processor, run.config


def _extra_shapes(folder: epath.Path) -> dict[str, Any]:
  """Shapes of what a state may hold beside the model's parameters, as its files say.

  That is `ema`, the averages of what was trained, and `params/lora`.
  """
  handler = ocp.PyTreeCheckpointHandler()
  tree = handler.metadata(folder).tree
  handler.close()
  extra = {name: tree[name] for name in ("ema",) if name in tree}
  extra["params"] = {
    name: tree["params"][name] for name in ("lora",) if name in tree["params"]
  }
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), extra)
