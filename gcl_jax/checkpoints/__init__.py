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
from gcl_jax.checkpoints.shared import Contents, read_contents, wait_for_run
from gcl_jax.checkpoints.whole import saved_steps

__all__ = [
  "Checkpoints",
  "Contents",
  "RunDescription",
  "is_run",
  "read_contents",
  "read_description",
  "read_results",
  "read_run",
  "run_folder",
  "saved_steps",
  "wait_for_run",
  "write_description",
  "write_result",
]
