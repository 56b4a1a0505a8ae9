"""From the command to the first step: a whole run of `gcl_jax.train`, timed outside.

Twice, in new processes and new folders: with an empty compilation cache
(JAX_COMPILATION_CACHE_DIR), and with what the first left there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

_LIMIT = 900.0  # seconds
_POLL = 0.02
_COMPILED = re.compile(r"step compiled in ([\d.]+) s")
# What a run needs of the benchmark's config, beside the length of a run that ends soon.
_FIELDS = (
  "model.name",
  "model.dtype",
  "batch_size",
  "tokenizer.path",
  "data.source",
  "data.path",
)
_SHORT = (
  "--config.init.pretrained=",
  "--config.steps=1",
  "--config.log.every=1",
  "--config.eval.before=false",
  "--config.eval.max_items=8",
)


def measure(config: ConfigDict) -> list[dict[str, Any]]:
  """The JSON rows of one model: `cache` is cold, then warm.

  Raises:
    RuntimeError: the run ended before its first step; says what it printed.
  """
  with tempfile.TemporaryDirectory(prefix="gcl_jax_startup") as folder:
    return [
      {
        "model": config.model.name,
        "batch": config.batch_size,
        "dtype": config.model.dtype,
        "cache": cache,
        **_run(config, Path(folder), cache),
        "load": os.getloadavg()[0],
      }
      for cache in ("cold", "warm")
    ]


def _run(config: ConfigDict, folder: Path, cache: str) -> dict[str, float]:
  workdir, said = folder / cache, folder / f"{cache}.txt"
  given = config.to_dict()
  fields = []
  for name in _FIELDS:
    value = given
    for part in name.split("."):
      value = value[part]
    fields.append(f"--config.{name}={value}")
  with said.open("w") as stream:
    began = time.monotonic()
    process = subprocess.Popen(
      [
        *(sys.executable, "-m", "gcl_jax.train", "--config=configs/tinyclip.py"),
        *(*fields, *_SHORT, f"--workdir={workdir}"),
      ],
      env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")},
      stdout=stream,
      stderr=stream,
    )
    try:
      seconds = _wait(process, workdir / "metrics.jsonl", began)
    finally:
      process.kill()
      process.wait()
  compiled = _COMPILED.search(said.read_text())
  if seconds is None or not compiled:
    raise RuntimeError(f"no first step:\n{said.read_text()}")
  return {"compile_s": float(compiled[1]), "first_step_s": seconds}


def _wait(process: subprocess.Popen, metrics: Path, began: float) -> float | None:
  """Seconds until the first step's numbers are written; None where they never are."""
  while process.poll() is None and time.monotonic() - began < _LIMIT:
    if metrics.is_file() and metrics.stat().st_size:
      return time.monotonic() - began
    time.sleep(_POLL)
  return None


def table(rows: Sequence[dict[str, Any]]) -> str:
  """The rows in Markdown."""
  lines = [
    "| model | batch | compilation cache | step compiled in | to the first step |",
    "|---|---:|---|---:|---:|",
  ]
  for row in rows:
    lines.append(
      f"| {row['model']} | {row['batch']} | {row['cache']} | {row['compile_s']:.0f} s | "
      f"{row['first_step_s']:.0f} s |"
    )
  return "\n".join(lines)
