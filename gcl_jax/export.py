"""Hands a trained model to PyTorch: python -m gcl_jax.export --checkpoint=... --output=..."""

from __future__ import annotations

from pathlib import Path

from absl import flags

from gcl_jax import command_line
from gcl_jax.errors import UserError

_FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_string("checkpoint", "", "a run's folder")
  flags.DEFINE_string("step", "latest", "latest, best, or a number")
  flags.DEFINE_string("output", "", "the folder to write")


def main() -> None:
  """Flags in, one folder out."""
  if not _FLAGS.checkpoint or not _FLAGS.output:
    raise UserError("name both: --checkpoint=<a run's folder> --output=<a new folder>")
  from gcl_jax.checkpoints import read_description, read_results
  from gcl_jax.checkpoints.card import in_pytorch
  from gcl_jax.checkpoints.export import check_output, export_run
  from gcl_jax.evaluation import choose_step, to_markdown
  from gcl_jax.training.check import describe_loss

  check_output(Path(_FLAGS.output))
  run = read_description(_FLAGS.checkpoint)
  step = choose_step(_FLAGS.checkpoint, _FLAGS.step, run.config.eval.best)
  results = read_results(_FLAGS.checkpoint)
  rows = {
    name: results[at] for name, at in (("before", 0), ("after", step)) if at in results
  }
  notes = [describe_loss(run.config)]
  table = to_markdown(rows, notes=notes) if rows else notes[0]
  folder = export_run(_FLAGS.checkpoint, _FLAGS.output, step=step, table=table)
  print(
    f"written: {folder} (step {step})\n"
    f"In PyTorch: {in_pytorch(run.model, folder)}; see {folder}/README.md"
  )


if __name__ == "__main__":
  _define_flags()
  command_line.run(main)
