"""Procedural scenes: the embedded data set. No file, no download.

A random-access source of items; each item is one scene of the grammar, drawn in many
views and told in many wordings, made when they are asked for. Deterministic from
(seed, split, index, view or wording).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any, Generic, Literal, TypeVar

from PIL import Image

from gcl_jax.data.scenes_drawing import draw_scene
from gcl_jax.data.scenes_grammar import FRAMES, Scene, anagrams, tell
from gcl_jax.errors import UserError

SIZES = {"train": 10_000, "eval": 1_000}
VIEWS = {"train": 16, "eval": 4}
WORDINGS = {"train": 8, "eval": 4}

T = TypeVar("T")


class Lazy(Sequence, Generic[T]):
  """A sequence whose k-th entry is made by `make(k)` each time it is asked for."""

  def __init__(self, make: Callable[[int], T], length: int):
    self._make = make
    self._length = length

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, k):
    if isinstance(k, slice):
      return [self._make(j) for j in range(*k.indices(self._length))]
    if not -self._length <= k < self._length:
      raise IndexError(k)
    return self._make(k % self._length)


class Scenes:
  """A source of procedural scenes.

  Splits share no combination of two colours with two shapes (`is_held_out`), whatever
  their seeds. Within a split no scene comes twice. A smaller `size` is a prefix of a
  larger one. The evaluation split is made of whole lists of anagrams, so that a model
  that knows the words but not who has what cannot tell its items apart.

  Args:
    split: "train" or "eval".
    size: number of items; default 10,000 for train, 1,000 for eval.
    image_size: width and height of the pictures in pixels.
    seed: which scenes, views and wordings are drawn, and their order.

  Raises UserError for another split, or a size that the grammar cannot fill.
  """

  def __init__(
    self,
    split: Literal["train", "eval"] = "train",
    *,
    size: int | None = None,
    image_size: int = 64,
    seed: int = 0,
  ):
    if split not in SIZES:
      raise UserError(f'scenes have no split "{split}"; use "train" or "eval"')
    size = SIZES[split] if size is None else size
    self.split, self.image_size, self.seed = split, image_size, seed
    scenes = _ordered(split, seed)
    if not 0 < size <= len(scenes):
      raise UserError(
        f"scenes: size {size} for split {split}; choose 1 to {len(scenes)}"
      )
    self._scenes = scenes[:size]

  def __len__(self) -> int:
    return len(self._scenes)

  def scene(self, index: int) -> Scene:
    """The full specification of item `index`."""
    return self._scenes[index]

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record of item `index`; its pictures and texts are made on access."""
    scene = self._scenes[index]
    index = range(len(self))[index]
    name = f"{self.split}-{index:05d}"
    key = f"scenes/{self.seed}/{name}"
    return {
      "id": name,
      "images": Lazy(partial(_view, scene, key, self.image_size), VIEWS[self.split]),
      "texts": Lazy(partial(_wording, scene, key), WORDINGS[self.split]),
      "group": name,
      "split": self.split,
      "meta": {},
    }


def corpus(seed: int = 0, n: int = 4_000) -> Iterator[str]:
  """`n` wordings of the training split, for training a tokenizer."""
  source = Scenes("train", seed=seed)
  for i in range(n):
    yield source[i % len(source)]["texts"][i % WORDINGS["train"]]


def contact_sheet(
  rows: int = 4, columns: int = 8, *, split: str = "eval", scale: int = 2, seed: int = 0
) -> Image.Image:
  """A picture of `rows` items, each in `columns` views (at most the split's)."""
  source = Scenes(split, seed=seed)
  side = source.image_size * scale
  sheet = Image.new("RGB", (columns * (side + 4) - 4, rows * (side + 4) - 4), "white")
  for i in range(rows):
    for k, image in enumerate(source[i]["images"][:columns]):
      sheet.paste(image.resize((side, side)), (k * (side + 4), i * (side + 4)))
  return sheet


def _ordered(split: str, seed: int) -> list[Scene]:
  rng = Random(f"scenes/{seed}/{split}")
  lists = list(anagrams(held_out=split == "eval"))
  rng.shuffle(lists)
  scenes = [scene for group in lists for scene in group]
  if split == "train":
    rng.shuffle(scenes)
  return scenes


def _view(scene: Scene, key: str, image_size: int, k: int) -> Image.Image:
  return draw_scene(scene, image_size, Random(f"{key}/view/{k}"))


def _wording(scene: Scene, key: str, k: int) -> str:
  # Each item has its own order of the frames, so that its wordings all differ.
  frames = list(range(FRAMES))
  Random(f"{key}/frames").shuffle(frames)
  return tell(scene, frames[k], Random(f"{key}/wording/{k}"))
