"""The scenes' grammar: which scenes there are, which are held out, how they are told.

A scene is two shapes, side by side in the upper or lower half of the picture or one
above the other in its left or right half, and one to three white dots in the other
half. The two shapes differ in colour, in shape and in size. Scenes that share their
colours, shapes, place and dots (**anagrams**) are told in the same words: only which
shape has which colour and which size, and which comes first, tells them apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

COLOURS = ("red", "yellow", "green", "blue", "pink")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
SIZES = ("small", "large")
PLACES = ("top", "bottom", "left", "right")  # the half of the picture with the shapes
DOTS = (1, 2, 3)
COLOUR_PAIRS = tuple(itertools.combinations(COLOURS, 2))
SHAPE_PAIRS = tuple(itertools.combinations(SHAPES, 2))

# One combination of a colour pair and a shape pair in HELD_OUT_EVERY is never trained
# on. The rule is a Latin square, so every pair of colours and every pair of shapes is
# seen in training, with other partners.
HELD_OUT_EVERY = 5


class Thing(NamedTuple):
  """A coloured shape."""

  size: str
  colour: str
  shape: str


class Scene(NamedTuple):
  """A full specification. `first` is the thing on the left, or the upper one.

  `place` is the half of the picture that holds both things: in "top" and "bottom"
  they stand side by side, in "left" and "right" one above the other. The `dots` are
  anywhere in the other half.
  """

  first: Thing
  second: Thing
  place: str
  dots: int

  @property
  def side_by_side(self) -> bool:
    return self.place in ("top", "bottom")


def is_held_out(colours: tuple[str, str], shapes: tuple[str, str]) -> bool:
  """Whether scenes of these two colours and two shapes, in any order, are evaluated on.

  The rule knows neither seed nor size: no training split ever holds such a scene.
  """
  number = COLOUR_PAIRS.index(tuple(sorted(colours, key=COLOURS.index)))
  number += SHAPE_PAIRS.index(tuple(sorted(shapes, key=SHAPES.index)))
  return number % HELD_OUT_EVERY == 0


def anagrams(held_out: bool) -> Iterator[list[Scene]]:
  """Every scene of one side of the split, in lists of 8 that share their words.

  The scenes of a list have the same colours, shapes, sizes, place and dots, bound to
  one another in every possible way.
  """
  for colours, shapes in itertools.product(COLOUR_PAIRS, SHAPE_PAIRS):
    if is_held_out(colours, shapes) != held_out:
      continue
    for place, dots in itertools.product(PLACES, DOTS):
      yield [
        Scene(Thing(s, c, h), Thing(t, d, k), place, dots)
        for s, t in itertools.permutations(SIZES)
        for c, d in itertools.permutations(colours)
        for h, k in itertools.permutations(shapes)
      ]


# --- Wordings. Every list holds synonyms: whichever is drawn, the meaning is the same.

_SIZE = {"small": ("small", "little"), "large": ("large", "big")}
_SHAPE = {
  "circle": ("circle", "disc"),
  "square": ("square", "box"),
  "triangle": ("triangle",),
  "cross": ("cross",),
  "ring": ("ring", "hoop"),
  "star": ("star",),
}
_DOTS = {
  1: ("one dot", "a dot"),
  2: ("two dots", "twin dots"),
  3: ("three dots",),
}
_PLACE = {
  "top": ("at the top", "along the top"),
  "bottom": ("at the bottom", "along the bottom"),
  "left": ("on the left", "along the left"),
  "right": ("on the right", "along the right"),
}
# Keyed by (side by side, the thing told about is the first one).
_RELATION = {
  (True, True): ("left of",),
  (True, False): ("right of",),
  (False, True): ("above", "over"),
  (False, False): ("below", "under"),
}
_ORDER = {
  (True, True): ("rightwards",),
  (True, False): ("leftwards",),
  (False, True): ("downwards",),
  (False, False): ("upwards",),
}
# {relation} and {order} are those of {a}. Without the mark, {a} is the first
# thing. Two frames in eight tell the second thing first: were it half of them, the
# order of the words would say nothing by itself, and a few minutes' training could not
# begin to learn who stands where.
_SWAPPED = "~"
_FRAMES = (
  "{place}, {a} {relation} {b}, and {dots}",
  "{a} {relation} {b} {place}, with {dots}",
  "{dots}, and {place} {a} {relation} {b}",
  "{dots}; {a} {relation} {b}, {place}",
  "{order} {place}: {a}, then {b}; {dots}",
  "{dots}, and {order} {place}, {a} and {b}",
  "~{place}, {a} {relation} {b}, and {dots}",
  "~{order} {place}: {a}, then {b}; {dots}",
)
FRAMES = len(_FRAMES)  # no two frames give the same text


def tell(scene: Scene, frame: int, rng: Random) -> str:
  """One sentence that says all of `scene`, in 14 to 16 words.

  `frame` (0 ... FRAMES - 1) fixes how the sentence is built; `rng` draws the synonyms.
  Different frames never give the same text.
  """
  sentence = _FRAMES[frame].removeprefix(_SWAPPED)
  swap = sentence != _FRAMES[frame]
  things = (scene.first, scene.second)
  of_a = (scene.side_by_side, not swap)

  def draw(synonyms):
    return synonyms[int(rng.random() * len(synonyms))]

  def phrase(thing: Thing) -> str:
    return f"a {draw(_SIZE[thing.size])} {thing.colour} {draw(_SHAPE[thing.shape])}"

  return sentence.format(
    a=phrase(things[swap]),
    b=phrase(things[1 - swap]),
    dots=draw(_DOTS[scene.dots]),
    place=draw(_PLACE[scene.place]),
    relation=draw(_RELATION[of_a]),
    order=draw(_ORDER[of_a]),
  )
