"""What a compiled program moves, read off its HLO: collectives, and traffic of memory.

Bodies of loops count as often as they run, which the compilers' own figures leave out.
"""

from __future__ import annotations

import collections
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
# These move nothing, or what they call is walked instead.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "iota"}
_FREE |= {"while", "conditional", "call", "after-all", "partition-id"}
_FREE |= {"copy-start", "async-start", "async-done", "async-update"}

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")


class Moved(NamedTuple):
  """Of one device in one run of a program.

  memory: bytes that its operations read and write beyond the chip's own scratch memory;
    an estimate from above, since neighbours may share a read.
  collectives: bytes that come to the device, by kind of collective.
  counts: how often each kind runs.
  """

  memory: int
  collectives: dict[str, int]
  counts: dict[str, int]


def moved(text: str) -> Moved:
  """Reads the HLO text of a compiled, partitioned program."""
  computations, entry = _computations(text)
  memory, received, counts = 0, collections.Counter(), collections.Counter()
  waiting = [(entry, 1)]
  while waiting:
    name, times = waiting.pop()
    sizes: dict[str, int] = {}
    for line in computations.get(name, ()):
      found = _INSTRUCTION.match(line)
      if not found:
        continue
      label, shape, operation, rest = found.groups()
      sizes[label] = _size(shape)
      kind = operation.removesuffix("-start")
      if operation == "while":
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest)
        body = re.search(r"body=%?([\w.\-]+)", rest)[1]
        waiting.append((body, times * int(trips[1] if trips else 1)))
      elif operation in ("conditional", "call"):
        waiting += [(called, times) for called in _called(rest)]
      elif kind in _COLLECTIVES:
        received[kind] += times * _received(kind, shape, operation)
        counts[kind] += times
      if operation in _FREE or operation.endswith("-done"):
        continue
      operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
      memory += times * (sizes[label] + sum(sizes.get(o, 0) for o in operands))
  return Moved(memory, dict(received), dict(counts))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  found: dict[str, list[str]] = {}
  entry, lines = "", []
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      lines = found.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif line.startswith("  "):
      lines.append(line)
  return found, entry


def _called(rest: str) -> list[str]:
  """The computation of a call; of a conditional the last branch, as one of them runs."""
  named = re.search(r"branch_computations=\{([^}]*)\}", rest)
  if named:
    return [named[1].split(",")[-1].strip().lstrip("%")]
  name = re.search(r"(?:to_apply|false_computation)=%?([\w.\-]+)", rest)
  return [name[1]] if name else []


def _size(shape: str, *, everywhere: bool = False) -> int:
  """Bytes of a shape or a tuple of shapes, without what lies in scratch memory."""
  total = 0
  for kind, dimensions, layout in _ARRAY.findall(shape):
    if kind not in _BYTES or ("S(1)" in layout and not everywhere):
      continue
    count = 1
    for dimension in filter(None, dimensions.split(",")):
      count *= int(dimension)
    total += count * _BYTES[kind]
  return total


def _received(kind: str, shape: str, operation: str) -> int:
  size = _size(shape, everywhere=True)
  if operation.endswith("-start") and kind != "all-reduce":
    # (operand, result, ...): the larger is what arrives of a gather, the smaller of a
    # scatter.
    parts = [_size(part[0], everywhere=True) for part in re.finditer(_ARRAY, shape)]
    size = min(parts) if kind == "reduce-scatter" else max(parts)
  # A ring reduces and then gathers: what is reduced comes twice.
  return 2 * size if kind == "all-reduce" else size
