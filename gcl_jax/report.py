"""Puts evaluations beside each other on one page: python -m gcl_jax.report a.json ...

The page is one file that needs no network. A file's model can be named: NAME=a.json.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from gcl_jax import command_line
from gcl_jax.paths import as_path

_FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_string("output", "report.html", "the page to write")


def main(files: Sequence[str]) -> None:
  """Evaluations in, one page out."""
  from gcl_jax.pages import check_page, read_results, report_page, write_page

  results = read_results(files)
  output = as_path(_FLAGS.output)
  check_page(output, "--output")
  write_page(output, report_page(results), "--output")
  print(f"written: {output}")


if __name__ == "__main__":
  _define_flags()
  command_line.run(main, takes_files=True)
