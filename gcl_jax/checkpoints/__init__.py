"""A run's folder: its config, processor files and Orbax checkpoints."""

from gcl_jax.checkpoints.folder import (
  RunDescription,
  is_run,
  read_description,
  read_results,
  write_description,
  write_result,
)
from gcl_jax.checkpoints.manager import Checkpoints, read_run, saved_steps

__all__ = [
  "Checkpoints",
  "RunDescription",
  "is_run",
  "read_description",
  "read_results",
  "read_run",
  "saved_steps",
  "write_description",
  "write_result",
]
