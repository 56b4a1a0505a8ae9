"""The scenes' grammar: which scenes there are, which are held out, how they are told.

A scene is two groups of equal shapes, side by side in the upper or lower half of the
picture or one above the other in its left or right half. The two groups differ in
colour, in shape and in size, and each counts one or two shapes. The groups of scenes
that share their colours, shapes, counts and place (**anagrams**) are told in the same
words: only who has what, and who stands where, tells them apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

COLOURS = ("red", "yellow", "green", "cyan", "blue", "pink")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
SIZES = ("small", "large")
PLACES = ("top", "bottom", "left", "right")  # the half of the picture that is used
COUNTS = ((1, 1), (1, 2), (2, 1), (2, 2))
COLOUR_PAIRS = tuple(itertools.combinations(COLOURS, 2))
SHAPE_PAIRS = tuple(itertools.combinations(SHAPES, 2))

# One combination of a colour pair and a shape pair in HELD_OUT_EVERY is never trained
# on. The rule is a Latin square, so every pair of colours and every pair of shapes is
# seen in training, with other partners.
HELD_OUT_EVERY = 5
FRAMES = 16  # ways to build a sentence; no two of them give the same text


class Group(NamedTuple):
  """One or two equal shapes that stand together."""

  count: int
  size: str
  colour: str
  shape: str


class Scene(NamedTuple):
  """A full specification. `first` is the left group, or the upper one.

  `place` is the half of the picture that holds both groups: in "top" and "bottom"
  they stand side by side, in "left" and "right" one above the other.
  """

  first: Group
  second: Group
  place: str

  @property
  def side_by_side(self) -> bool:
    return self.place in ("top", "bottom")


def is_held_out(scene: Scene) -> bool:
  """Whether the scene's {colours} × {shapes} combination belongs to evaluation.

  The rule knows neither seed nor size: no training split ever holds such a scene.
  """
  colours, shapes = _pairs(scene)
  return (colours + shapes) % HELD_OUT_EVERY == 0


def anagrams(held_out: bool) -> Iterator[list[Scene]]:
  """Every scene of one side of the split, in lists of 8 or 16 that share their words.

  The scenes of a list have the same colours, shapes, counts and place, bound to one
  another in every possible way.
  """
  combinations = itertools.product(enumerate(COLOUR_PAIRS), enumerate(SHAPE_PAIRS))
  for (i, colours), (j, shapes) in combinations:
    if ((i + j) % HELD_OUT_EVERY == 0) != held_out:
      continue
    for place in PLACES:
      for counts in (COUNTS[:1], COUNTS[1:3], COUNTS[3:]):
        yield [
          Scene(Group(m, s, c, h), Group(n, t, d, k), place)
          for m, n in counts
          for s, t in itertools.permutations(SIZES)
          for c, d in itertools.permutations(colours)
          for h, k in itertools.permutations(shapes)
        ]


def _pairs(scene: Scene) -> tuple[int, int]:
  first, second = scene.first, scene.second
  colours = tuple(sorted((first.colour, second.colour), key=COLOURS.index))
  shapes = tuple(sorted((first.shape, second.shape), key=SHAPES.index))
  return COLOUR_PAIRS.index(colours), SHAPE_PAIRS.index(shapes)


# --- Wordings. Every list holds synonyms: whichever is drawn, the meaning is the same.

_COUNT = {1: ("a", "one"), 2: ("two", "a pair of")}
_SIZE = {"small": ("small", "little"), "large": ("large", "big")}
_SHAPE = {
  "circle": (("circle", "circles"), ("disc", "discs")),
  "square": (("square", "squares"), ("box", "boxes")),
  "triangle": (("triangle", "triangles"),),
  "cross": (("cross", "crosses"), ("plus", "pluses")),
  "ring": (("ring", "rings"), ("hoop", "hoops")),
  "star": (("star", "stars"),),
}
_PLACE = {
  "top": ("at the top", "in the upper half"),
  "bottom": ("at the bottom", "in the lower half"),
  "left": ("on the left", "in the left half"),
  "right": ("on the right", "in the right half"),
}
# Keyed by (side by side, the group told about is the first one).
_RELATION = {
  (True, True): ("left of", "to the left of"),
  (True, False): ("right of", "to the right of"),
  (False, True): ("above", "over"),
  (False, False): ("below", "under"),
}
_SIDE = {
  (True, True): ("to the left",),
  (True, False): ("to the right",),
  (False, True): ("higher up", "further up"),
  (False, False): ("lower down", "further down"),
}
_ORDER = {
  (True, True): ("from left to right",),
  (True, False): ("from right to left",),
  (False, True): ("from top to bottom", "downwards"),
  (False, False): ("from bottom to top", "upwards"),
}
# {a} is told first; {relation}, {side_a} and {order} are those of {a}.
_SENTENCES = (
  "{place}, {a} {relation} {b}",
  "{a} {relation} {b}, {place}",
  "{place} there {is_a} {a} {relation} {b}",
  "{a} {relation} {b}, both {place}",
  "{a} with {b} {side_b}, {place}",
  "{place}, {a} {side_a} and {b} {side_b}",
  "{order} {place}: {a}, then {b}",
  "{relation} {b} {is_a} {a}, {place}",
)
assert len(_SENTENCES) * 2 == FRAMES


def tell(scene: Scene, frame: int, rng: Random) -> str:
  """One sentence that says all of `scene`: at most 20 words.

  `frame` (0 ... FRAMES - 1) fixes how the sentence is built and which group it tells
  first; `rng` draws the synonyms. Different frames never give the same text.
  """
  sentence, swap = divmod(frame, 2)
  groups = (scene.first, scene.second)
  a, b = groups[swap], groups[1 - swap]
  of_a, of_b = (scene.side_by_side, not swap), (scene.side_by_side, bool(swap))

  def draw(synonyms):
    return synonyms[int(rng.random() * len(synonyms))]

  def phrase(group: Group) -> str:
    name = draw(_SHAPE[group.shape])[group.count - 1]
    size = draw(_SIZE[group.size])
    return f"{draw(_COUNT[group.count])} {size} {group.colour} {name}"

  return _SENTENCES[sentence].format(
    a=phrase(a),
    b=phrase(b),
    is_a="is" if a.count == 1 else "are",
    place=draw(_PLACE[scene.place]),
    relation=draw(_RELATION[of_a]),
    side_a=draw(_SIDE[of_a]),
    side_b=draw(_SIDE[of_b]),
    order=draw(_ORDER[of_a]),
  )
