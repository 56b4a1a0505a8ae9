"""What a compiled program moves, read off its HLO: collectives, and traffic of memory.

Bodies of loops count as often as they run, which the compilers' own figures leave out.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator
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
        body = re.search(r"body=%?([\w.\-]+)", rest)[1]
        waiting.append((body, times * _rounds(rest, computations)))
      elif operation in ("conditional", "call"):
        waiting += [(called, times) for called in _called(rest)]
      elif kind in _COLLECTIVES:
        received[kind] += times * _received(kind, shape, operation)
        counts[kind] += times
      elif operation == "fusion":  # TPUs fuse collectives with what they wait for
        called = re.search(r"calls=%?([\w.\-]+)", rest)
        for kind, size in _fused(computations.get(called[1], ())) if called else ():
          received[kind] += times * size
          counts[kind] += times
      if operation in _FREE or operation.endswith("-done"):
        continue
      operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
      read = [sizes.get(operand, 0) for operand in operands]
      written = sizes[label]
      called = re.search(r"calls=%?([\w.\-]+)", rest)
      if called:
        read, written = _touched(called[1], computations, read, written)
      elif operation == "dynamic-slice":
        read = [written]
      elif operation == "dynamic-update-slice":
        read, written = [read[1]], read[1]
      memory += times * (written + sum(read))
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


def _touched(
  name: str, computations: dict[str, list[str]], read: list[int], written: int
) -> tuple[list[int], int]:
  """What a fusion reads of its operands and writes, where that is but a slice of them.

  A loop over layers takes one layer of what is stacked, and puts one layer into it; TPUs
  have fusions within fusions.
  """
  sizes: dict[str, int] = {}
  numbers: dict[str, int] = {}  # of the operand that a name stands for
  sliced: dict[int, int] = {}
  whole: set[int] = set()
  for line in computations.get(name, ()):
    found = _INSTRUCTION.match(line)
    if not found:
      continue
    label, shape, operation, rest = found.groups()
    sizes[label] = _size(shape, everywhere=True)
    operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
    if operation == "parameter":
      numbers[label] = int(rest.split(")")[0])
    elif operation == "bitcast" and operands[0] in numbers:
      numbers[label] = numbers[operands[0]]
    elif operation in ("dynamic-slice", "dynamic-update-slice"):
      updated = operation == "dynamic-update-slice"
      part = sizes.get(operands[1], 0) if updated else sizes[label]
      if operands[0] in numbers:
        number = numbers[operands[0]]
        sliced[number] = sliced.get(number, 0) + (0 if updated else part)
        if updated:  # in its place
          written -= max(sizes[label] - part, 0)
      whole |= {numbers[name] for name in operands[1:] if name in numbers}
    elif operation == "fusion" and any(name in numbers for name in operands):
      inner = re.search(r"calls=%?([\w.\-]+)", rest)[1]
      given = [sizes.get(operand, 0) for operand in operands]
      parts, _ = _touched(inner, computations, given, sizes[label])
      for operand, size, part in zip(operands, given, parts, strict=True):
        if operand not in numbers:
          continue
        if part < size:
          number = numbers[operand]
          sliced[number] = sliced.get(number, 0) + part
        else:
          whole.add(numbers[operand])
    else:
      whole |= {numbers[name] for name in operands if name in numbers}
  read = [
    min(size, sliced[k]) if k in sliced and k not in whole else size
    for k, size in enumerate(read)
  ]
  return read, max(written, 0)


def _rounds(rest: str, computations: dict[str, list[str]]) -> int:
  """How often a loop runs: as the compiler says, or the constant that it counts to.

  Raises:
    ValueError: neither is there.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest)
  if known:
    return int(known[1])
  condition = re.search(r"condition=%?([\w.\-]+)", rest)[1]
  text = "\n".join(computations[condition])
  constants = dict(re.findall(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", text))
  compared = re.search(r"compare\([^,]*, ?%?([\w.\-]+)\), direction=LT", text)
  bounds = [constants.get(compared[1])] if compared else list(constants.values())
  if len(bounds) != 1 or bounds[0] is None:
    raise ValueError(f"how often does the loop with the condition {condition} run?")
  return int(bounds[0])


def _fused(lines: list[str]) -> Iterator[tuple[str, int]]:
  """Kind and bytes of the collectives in a fusion."""
  for line in lines:
    found = _INSTRUCTION.match(line)
    kind = found[3].removesuffix("-start") if found else ""
    if kind in _COLLECTIVES:
      yield kind, _received(kind, found[2], found[3])


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


def _outer(shape: str) -> list[str]:
  """The members of a tuple's shape, at its own level."""
  members, depth, member = [], 0, ""
  for letter in shape.strip()[1:-1]:
    depth += letter in "([{"
    depth -= letter in ")]}"
    if letter == "," and not depth:
      members.append(member)
      member = ""
    else:
      member += letter
  return [*members, member]


def _received(kind: str, shape: str, operation: str) -> int:
  size = _size(shape, everywhere=True)
  if operation.endswith("-start") and kind != "all-reduce":
    # (operands, results, contexts): what arrives is the second of them.
    parts = _outer(shape)
    size = _size(parts[1] if len(parts) > 1 else shape, everywhere=True)
  # A ring reduces and then gathers: what is reduced comes twice.
  return 2 * size if kind == "all-reduce" else size
