"""A run's folder: its config, processor files and Orbax checkpoints."""

from gcl_jax.checkpoints.folder import (
  RunDescription,
  is_run,
  read_description,
  read_results,
  run_folder,
  write_description,
  write_result,
)
from gcl_jax.checkpoints.manager import Checkpoints, read_run
from gcl_jax.checkpoints.whole import saved_steps

__all__ = [
  "Checkpoints",
  "RunDescription",
  "is_run",
  "read_description",
  "read_results",
  "read_run",
  "run_folder",
  "saved_steps",
  "write_description",
  "write_result",
]
