"""`gcl_jax.train` that writes down which records it consumed, and its process number.

    python recording_train.py <folder> [flags of train]

Each batch is a line of <folder>/<process>-<pid>.jsonl: the global position after it, its
rows of the global batch, their records' places in the source, and which set of processes
this one is of. With TERM_AT=<process>:<position> in the environment
that process gets SIGTERM there, with FAIL_AT it raises an error.
"""

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

from gcl_jax.data import Pipeline

FOLDER = Path(sys.argv.pop(1))
SET = {
  "coordinator": next((flag for flag in sys.argv if "--coordinator" in flag), ""),
  "began": time.time(),
}
handed_out = Pipeline.__next__


def recording_next(self):
  import jax

  batch = handed_out(self)
  path = FOLDER / f"{jax.process_index()}-{os.getpid()}.jsonl"
  width = batch["tokens"].shape[1]
  line = {"position": self.position, "width": width, **SET}
  line |= {"rows": self.rows_of_batch.tolist(), "index": batch["index"].tolist()}
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
