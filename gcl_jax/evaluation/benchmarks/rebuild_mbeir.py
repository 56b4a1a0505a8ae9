"""Makes M-BEIR's CIRR and FashionIQ test sets from the public annotations:

    python -m gcl_jax.evaluation.benchmarks.rebuild_mbeir --output=data/M-BEIR \\
      --cirr=data/CIRR --fashioniq=data/fashion-iq --instructions=query_instructions.tsv

The pictures stay where they are: link them to <output>/mbeir_images/cirr_images and
<output>/mbeir_images/fashioniq_images.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from gcl_jax import command_line
from gcl_jax.errors import UserError

_FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_string("output", "", "the folder to write, laid out as M-BEIR's")
  flags.DEFINE_string("cirr", "", "CIRR's folder: captions and image_splits")
  flags.DEFINE_string("fashioniq", "", "FashionIQ's folder: captions and image_splits")
  flags.DEFINE_string("fashioniq_suffix", ".jpg", "of FashionIQ's pictures")
  flags.DEFINE_string("instructions", "", "M-BEIR's query_instructions.tsv, to copy")


def main() -> None:
  """Flags in, files out, and what was made."""
  from gcl_jax.evaluation.benchmarks.mbeir_build import (
    build_cirr,
    build_fashioniq,
    copy_instructions,
  )

  if not _FLAGS.output:
    raise UserError("name the folder to write: --output=<folder>")
  if not (_FLAGS.cirr or _FLAGS.fashioniq):
    raise UserError("name what to make it from: --cirr=<folder>, --fashioniq=<folder>")
  output = Path(_FLAGS.output).expanduser()
  if _FLAGS.instructions:
    copy_instructions(_FLAGS.instructions, output)
  if _FLAGS.cirr:
    print(build_cirr(_FLAGS.cirr, output))
  if _FLAGS.fashioniq:
    print(build_fashioniq(_FLAGS.fashioniq, output, _FLAGS.fashioniq_suffix))


if __name__ == "__main__":
  _define_flags()
  command_line.run(main)
