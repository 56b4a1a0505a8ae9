"""`gcl_jax.train` that writes down which records it consumed, and its process number.

    python recording_train.py <folder> [flags of train]

Each batch is a line of <folder>/<process>-<pid>.jsonl: the global position after it, and
the records' places in the source. With TERM_AT=<process>:<position> in the environment
that process gets SIGTERM there, with FAIL_AT it raises an error.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

from gcl_jax.data import Pipeline

FOLDER = Path(sys.argv.pop(1))
handed_out = Pipeline.__next__


def recording_next(self):
  import jax

  batch = handed_out(self)
  path = FOLDER / f"{jax.process_index()}-{os.getpid()}.jsonl"
  width = batch["tokens"].shape[1]
  line = {"position": self.position, "index": batch["index"].tolist(), "width": width}
  with path.open("a") as file:
    file.write(json.dumps(line) + "\n")
  here = f"{jax.process_index()}:{self.position}"
  if os.environ.get("TERM_AT") == here:
    os.kill(os.getpid(), signal.SIGTERM)
  if os.environ.get("FAIL_AT") == here:
    raise RuntimeError("a disk of this machine is gone")
  return batch


Pipeline.__next__ = recording_next
sys.argv[0] = "gcl_jax.train"
runpy.run_module("gcl_jax.train", run_name="__main__", alter_sys=True)
