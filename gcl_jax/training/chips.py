"""What an accelerator can do at best, by the name that JAX gives it.

From the vendors' data sheets: dense bfloat16 arithmetic, memory, and for TPUs the links
between chips. They bound a step, they do not predict it.
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
  """flops: bfloat16 operations a second. memory_rate, link_rate: bytes a second."""

  flops: float
  memory: float  # bytes
  memory_rate: float
  link_rate: float  # all of a chip's links together, one way; 0: not known


_T, _G = 1e12, 1e9
# First name that the device kind contains; more exact names stand first.
CHIPS: tuple[tuple[str, Chip], ...] = (
  ("TPU v6 lite", Chip(918 * _T, 32 * _G, 1640 * _G, 448 * _G / 2)),
  ("TPU v6e", Chip(918 * _T, 32 * _G, 1640 * _G, 448 * _G / 2)),
  ("TPU v5 lite", Chip(197 * _T, 16 * _G, 819 * _G, 200 * _G / 2)),
  ("TPU v5e", Chip(197 * _T, 16 * _G, 819 * _G, 200 * _G / 2)),
  ("TPU v5p", Chip(459 * _T, 95 * _G, 2765 * _G, 600 * _G / 2)),
  ("TPU v5", Chip(459 * _T, 95 * _G, 2765 * _G, 600 * _G / 2)),
  ("TPU v4", Chip(275 * _T, 32 * _G, 1228 * _G, 300 * _G / 2)),
  ("H200", Chip(989 * _T, 141 * _G, 4800 * _G, 450 * _G)),
  ("H100", Chip(989 * _T, 80 * _G, 3350 * _G, 450 * _G)),
  ("A100", Chip(312 * _T, 80 * _G, 2039 * _G, 300 * _G)),
  ("L40S", Chip(362 * _T, 48 * _G, 864 * _G, 0)),
  ("L4", Chip(121 * _T, 24 * _G, 300 * _G, 0)),
)


def chip_of(kind: str) -> Chip | None:
  """The chip of a `device_kind`; None for one that is not in the table (a CPU)."""
  return next((chip for name, chip in CHIPS if name in kind), None)
