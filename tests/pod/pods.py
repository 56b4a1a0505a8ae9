"""Runs of the real entry point on one machine: one process, or a pod of them."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
RECIPE = Path(__file__).with_name("pod_recipe.py")


class Pod:
  """Processes of `gcl_jax.train` in one run's folder.

  Attributes:
    workdir: the run's folder. records: what every process consumed, a file each.
  """

  def __init__(self, folder: Path, *flags: str):
    self.workdir, self.records = folder / "run", folder / "records"
    self._bin, self._flags = folder / "bin", flags
    for made in (self.records, self._bin):
      made.mkdir(parents=True, exist_ok=True)
    python = self._bin / "python"  # what the launcher calls
    script = Path(__file__).with_name("recording_train.py")
    python.write_text(
      "#!/bin/sh\n"
      f'if [ "$1 $2" = "-m gcl_jax.train" ]; then shift 2; exec {sys.executable} '
      f'{script} {self.records} "$@"; fi\n'
      f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)

  def start(self, processes: int, devices: int, *flags: str, **environment: str):
    """The launcher, started; its output is piped."""
    given = os.environ.get("XLA_FLAGS", "").split()
    flags_here = [flag for flag in given if "device_count" not in flag]
    return subprocess.Popen(
      [
        ROOT / "launch" / "local_pod.sh",
        str(processes),
        str(RECIPE),
        f"--workdir={self.workdir}",
        *self._flags,
        *flags,
      ],
      cwd=ROOT,
      env={
        **os.environ,
        "PATH": f"{self._bin}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DEVICES_PER_PROCESS": str(devices),
        "XLA_FLAGS": " ".join(flags_here),  # but for the number of devices
        **environment,
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def run(
    self, processes: int, devices: int, *flags: str, code: int = 0, **environment: str
  ) -> str:
    """Runs to the end, which must have this exit code; returns the output."""
    launcher = self.start(processes, devices, *flags, **environment)
    output, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == code, output
    return output

  def losses(self) -> dict[int, float]:
    """Loss by step."""
    lines = (self.workdir / "metrics.jsonl").read_text().splitlines()
    found = [line for line in map(json.loads, lines) if "loss" in line]
    return {line["step"]: line["loss"] for line in found}

  def consumed(self) -> dict[int, list[int]]:
    """Records of the global batch that ends at a position, as last consumed.

    A set of processes that was stopped may have drawn a batch that the next one draws
    again, and those who share a row of the mesh draw the same.
    """
    lines = [json.loads(x) for p in self.records.iterdir() for x in p.open()]
    began: dict[str, float] = {}
    for line in lines:
      name = line["coordinator"]
      began[name] = min(began.get(name, line["began"]), line["began"])
    drawn: dict[int, dict[int, int]] = {}
    last: dict[int, str] = {}
    for line in sorted(lines, key=lambda line: began[line["coordinator"]]):
      position, name = line["position"], line["coordinator"]
      if last.get(position) != name:
        last[position], drawn[position] = name, {}
      drawn[position].update(zip(line["rows"], line["index"], strict=True))
    return {k: [rows[row] for row in sorted(rows)] for k, rows in drawn.items()}

  def widths(self) -> list[dict[int, int]]:
    """Token width by position, of every process's file."""
    files = [
      [json.loads(line) for line in path.read_text().splitlines()]
      for path in self.records.iterdir()
    ]
    return [{line["position"]: line["width"] for line in lines} for lines in files]

  def parameters(self):
    """The newest checkpoint's."""
    from gcl_jax.checkpoints import read_run

    return read_run(self.workdir)[1]


def assert_near(losses: dict[int, float], wanted: dict[int, float], limit: float):
  """Every step of both, within the limit."""
  assert losses.keys() == wanted.keys()
  steps = sorted(losses)
  difference = [abs(losses[step] - wanted[step]) for step in steps]
  np.testing.assert_array_less(difference, limit)


def leaves(pod: Pod) -> list[np.ndarray]:
  """Every array of the newest parameters."""
  import jax

  return jax.tree.leaves(pod.parameters())


def blow(process: int, number: int) -> None:
  """Sends a signal; the process may be gone already."""
  with contextlib.suppress(ProcessLookupError):
    os.kill(process, number)
