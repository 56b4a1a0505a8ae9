"""The frozen teacher of a run: another model, whose affinities the run's model learns."""

from __future__ import annotations

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gcl_jax.checkpoints.folder import keeping
from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings
from gcl_jax.models import Config, Model, build, write_pretrained
from gcl_jax.paths import AnyPath, local_copy, local_draft
from gcl_jax.processing import Processor
from gcl_jax.training.weights import read_shape, read_weights

_FOLDER = "teacher"  # in a run's folder: what the teacher was may move


class Teacher(NamedTuple):
  """A model that is not trained; `params` are NumPy arrays."""

  model: Model
  processor: Processor
  params: Any


def read_teacher(
  config: ConfigDict, student: Model, processor: Processor, workdir: AnyPath | None
) -> Teacher | None:
  """The teacher that the config names, or None where it names none.

  Args:
    config: the run's.
    student: its model. processor: its model's.
    workdir: a run's folder that keeps the teacher already; None reads what the config
      names.

  Raises:
    UserError: it cannot be read, or sees other pictures or reads other tokens than the
      student.
  """
  name = config.distill.teacher
  if not name:
    return None
  if workdir is None:
    found = read_weights(name, config.tokenizer.path)
  else:
    with local_copy(workdir / _FOLDER) as here:
      found = read_weights(str(here))
  teacher = Teacher(
    _built(config, found.config, found.fusion), found.processor, found.params
  )
  _check_fit(name, teacher, student, processor)
  return teacher


def teacher_model(config: ConfigDict) -> Model | None:
  """The teacher's shape alone; None where the config names no teacher.

  Raises:
    UserError: it cannot be read.
  """
  name = config.distill.teacher
  return _built(config, *read_shape(name, config.tokenizer.path)) if name else None


def keep_teacher(teacher: Teacher, workdir: AnyPath) -> None:
  """Writes the teacher into the run's folder, where a continuation finds it.

  Raises:
    UserError: no room, no permission.
  """
  with keeping(workdir / _FOLDER), local_draft(workdir / _FOLDER) as here:
    teacher.processor.save(here)
    write_pretrained(here, teacher.model.config, teacher.params, teacher.model.fusion)


def _built(config: ConfigDict, shape: Config, fusion: FusionSettings) -> Model:
  # Nothing of it is differentiated: there is nothing to compute again.
  return build(shape, fusion=fusion, dtype=config.model.dtype)


def _check_fit(
  name: str, teacher: Teacher, student: Model, processor: Processor
) -> None:
  sees, looks = (x.config.vision.image_size for x in (teacher.model, student))
  if sees != looks:
    raise UserError(
      f"config.distill.teacher={name!r} sees {sees} pixels a side and this run's model "
      f"{looks}: they must see the same picture (config.model.image_size, from scratch)."
    )
  if not processor.tokenizer.reads_like(teacher.processor.tokenizer):
    raise UserError(
      f"config.distill.teacher={name!r} has another vocabulary than this run's model: "
      "they must read the same tokens. A model from scratch with an empty "
      "config.tokenizer.path takes its teacher's."
    )
  reads, wanted = (x.config.text.context for x in (teacher.model, student))
  if reads < wanted:
    raise UserError(
      f"config.distill.teacher={name!r} reads {reads} tokens and this run's model "
      f"{wanted}: take a teacher that reads as many."
    )
