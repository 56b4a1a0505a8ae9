"""The scenes: deterministic, unambiguous, truthful; what a baseline gets on them."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest

from gcl_jax.data import scenes_grammar as grammar
from gcl_jax.data.scenes import Scenes, contact_sheet, corpus
from gcl_jax.data.scenes_drawing import COLOUR_RGB, DOT_RGB
from gcl_jax.data.scenes_grammar import Scene, Thing
from gcl_jax.errors import UserError


@pytest.fixture(scope="module")
def train() -> Scenes:
  return Scenes("train")


@pytest.fixture(scope="module")
def held_out() -> Scenes:
  return Scenes("eval")


# --- An inverse of the grammar, written without it.

SIZE_WORDS = {"small": "small", "little": "small", "large": "large", "big": "large"}
SHAPE_WORDS = {"disc": "circle", "box": "square", "hoop": "ring"}
SHAPE_WORDS |= {shape: shape for shape in grammar.SHAPES}
DOT_WORDS = {"one dot": 1, "a dot": 1, "two dots": 2, "twin dots": 2}
DOT_WORDS |= {"three dots": 3}
THING = re.compile(rf"\ba ({'|'.join(SIZE_WORDS)}) (\w+) ({'|'.join(SHAPE_WORDS)})\b")
PLACE_WORDS = {
  "at the top": "top",
  "along the top": "top",
  "at the bottom": "bottom",
  "along the bottom": "bottom",
  "on the left": "left",
  "along the left": "left",
  "on the right": "right",
  "along the right": "right",
}
# Where the words put what they are said of: +1 is left or above.
RELATION = {
  "left of": 1,
  "right of": -1,
  "above": 1,
  "over": 1,
  "below": -1,
  "under": -1,
}
ORDER = {"rightwards": 1, "leftwards": -1, "downwards": 1, "upwards": -1}
VERTICAL = re.compile(r"\b(above|over|below|under|downwards|upwards)\b")


def parse(text: str) -> Scene:
  """The scene that a wording tells."""
  things = [
    Thing(SIZE_WORDS[size], colour, SHAPE_WORDS[shape])
    for size, colour, shape in THING.findall(text)
  ]
  assert len(things) == 2, text
  rest = THING.sub("#", text)
  dots, rest = _take(DOT_WORDS, rest)
  place, rest = _take(PLACE_WORDS, rest)
  # Upright words for upright scenes only, else right could mean a place and a side.
  assert bool(VERTICAL.search(rest)) == (place in ("left", "right")), text
  rest = re.sub(r"[,;:]|\b(and|with|is|then)\b", " ", rest)
  before, between, after = (" ".join(part.split()) for part in rest.split("#"))
  assert not after and bool(before) != bool(between), text
  sign = ORDER[before] if before else RELATION[between]
  return Scene(*things[::sign], place, dots)


def _take(words: dict, text: str):
  found = [key for key in words if re.search(rf"\b{key}\b", text)]
  assert len(found) == 1, text
  return words[found[0]], re.sub(rf"\b{found[0]}\b", " ", text, count=1)


def test_parser_by_hand():
  red, blue = Thing("large", "red", "cross"), Thing("small", "blue", "circle")
  told = parse("at the top, a big red cross left of a little blue disc, and a dot")
  assert told == Scene(red, blue, "top", 1)
  told = parse(
    "upwards along the left: a little blue disc, then a large red cross; twin dots"
  )
  assert told == Scene(red, blue, "left", 2)
  told = parse("three dots; a small blue disc over a big red cross, on the right")
  assert told == Scene(blue, red, "right", 3)


def test_every_wording_parses_back(train, held_out):
  """So two scenes never share a text."""
  for source, step in ((train, 40), (held_out, 1)):
    for i in range(0, len(source), step):
      for text in source[i]["texts"]:
        assert parse(text) == source.scene(i), text


def test_every_frame_and_synonym_parses_back(held_out):
  used = Counter()
  for i in range(0, 1000, 25):
    scene = held_out.scene(i)
    for frame in range(grammar.FRAMES):
      for draw in range(4):
        text = grammar.tell(scene, frame, Random(draw))
        used.update(re.findall(r"\w+", text))
        assert parse(text) == scene, text
  words = {*SIZE_WORDS, *SHAPE_WORDS, "twin", "along", "under", "upwards"}
  assert words <= set(used)


def test_wordings_of_an_item_differ(train, held_out):
  for source, step in ((train, 40), (held_out, 4)):
    for i in range(0, len(source), step):
      texts = list(source[i]["texts"])
      assert len(set(texts)) == len(texts)
      assert all(14 <= len(text.split()) <= 16 for text in texts)


# --- Splits.


def test_no_scene_twice(train, held_out):
  assert len(train) == 10_000 and len(held_out) == 1_000
  scenes = [train.scene(i) for i in range(len(train))]
  scenes += [held_out.scene(i) for i in range(len(held_out))]
  assert len(set(scenes)) == 11_000


def test_held_out_combinations(train, held_out):
  """No {two colours} × {two shapes} of evaluation is in training, for any seed."""

  def combination(scene):
    a, b = scene.first, scene.second
    return frozenset((a.colour, b.colour)), frozenset((a.shape, b.shape))

  def combinations(source):
    return {combination(source.scene(i)) for i in range(len(source))}

  trained = combinations(train) | combinations(Scenes("train", seed=7, size=11_520))
  evaluated = combinations(held_out) | combinations(Scenes("eval", size=2880))
  assert not trained & evaluated
  assert all(grammar.is_held_out(*map(tuple, pairs)) for pairs in evaluated)
  for part in (0, 1):  # but each pair of colours and each of shapes was seen
    assert {c[part] for c in evaluated} <= {c[part] for c in trained}
  pairs = itertools.product(
    map(frozenset, grammar.COLOUR_PAIRS), map(frozenset, grammar.SHAPE_PAIRS)
  )
  assert trained | evaluated == set(pairs)


def test_evaluation_is_made_of_anagrams(held_out):
  """Every item has seven others that are told in the same words."""

  def words(scene):
    return frozenset((*scene.first, *scene.second, scene.place, scene.dots))

  lists = Counter(words(held_out.scene(i)) for i in range(len(held_out)))
  assert set(lists.values()) == {8}


def test_deterministic_prefix_and_seed():
  small, large = Scenes("train", size=50, seed=3), Scenes("train", size=500, seed=3)
  again, other = Scenes("train", size=50, seed=3), Scenes("train", size=50, seed=4)
  for i in (0, 7, 49):
    a, b, c = small[i], large[i], again[i]
    assert a["id"] == b["id"] == c["id"]
    assert list(a["texts"]) == list(b["texts"]) == list(c["texts"])
    for k in (0, 5):
      assert a["images"][k].tobytes() == b["images"][k].tobytes()
      assert a["images"][k].tobytes() == c["images"][k].tobytes()
      assert a["images"][k].tobytes() != other[i]["images"][k].tobytes()
  assert [small.scene(i) for i in range(50)] != [other.scene(i) for i in range(50)]
  assert list(corpus(3, 20)) == list(corpus(3, 20)) != list(corpus(4, 20))


def test_record_and_lazy_sequences(train):
  record = train[5]
  assert record["group"] == record["id"] != train[6]["id"]
  assert train[-1]["id"] == f"train-{len(train) - 1:05d}"
  images, texts = record["images"], record["texts"]
  assert (len(images), len(texts)) == (16, 8)
  assert texts[-1] == texts[7] and texts[:2] == [texts[0], texts[1]]
  with pytest.raises(IndexError):
    images[16]
  with pytest.raises(IndexError):
    train[len(train)]
  assert images[0].mode == "RGB" and images[0].size == (64, 64)
  assert Scenes("eval", size=1, image_size=112)[0]["images"][0].size == (112, 112)
  assert contact_sheet(1, 2, scale=1).size == (132, 64)


def test_user_errors():
  with pytest.raises(UserError, match="no split"):
    Scenes("test")
  for size in (0, 10**6):
    with pytest.raises(UserError, match="choose 1 to"):
      Scenes("eval", size=size)


def test_short_token_sequences():
  """A byte-level BPE of 512 ids tells every wording in 20 tokens, ends included."""
  from tokenizers import ByteLevelBPETokenizer

  bpe = ByteLevelBPETokenizer()
  bpe.train_from_iterator(corpus(0, 3_000), vocab_size=512, show_progress=False)
  longest = max(len(bpe.encode(text).ids) for text in corpus(1, 2_000))
  assert longest + 2 <= 20


# --- Pictures.

PALETTE = [*(COLOUR_RGB[colour] for colour in grammar.COLOURS), DOT_RGB]


def painted(image) -> np.ndarray:
  """(H, W): for each pixel the index of the palette's colour that it has, or one more."""
  pixels = np.asarray(image).astype(np.int16)
  found = np.full(pixels.shape[:2], len(PALETTE), np.int8)
  for index, colour in enumerate(PALETTE):
    found[(np.abs(pixels - np.array(colour, np.int16)) <= 30).all(-1)] = index
  return found


# How much of a shape's bounding box is painted.
FILL = {
  "circle": (0.7, 0.86),
  "square": (0.71, 1.01),
  "triangle": (0.44, 0.58),
  "cross": (0.43, 0.58),
  "ring": (0.44, 0.6),
  "star": (0.31, 0.44),
}


def test_views_differ_and_tell_the_truth(held_out):
  for i in range(0, len(held_out), 7):
    scene = held_out.scene(i)
    views = [np.asarray(image) for image in held_out[i]["images"]]
    for a, b in itertools.combinations(views, 2):
      assert (a != b).any(-1).mean() > 0.5
    for image in views:
      colours, boxes = painted(image), []
      for thing in (scene.first, scene.second):
        rows, columns = np.nonzero(colours == grammar.COLOURS.index(thing.colour))
        assert len(rows) >= 30, (i, thing)
        box = columns.min(), columns.max(), rows.min(), rows.max()
        boxes.append(box)
        if thing.size == "large":
          left, right, top, bottom = box
          fill = len(rows) / ((right - left + 1) * (bottom - top + 1))
          low, high = FILL[thing.shape]
          assert low < fill < high, (i, thing, fill)
          middle = colours[(top + bottom) // 2, (left + right) // 2]
          hollow = middle != grammar.COLOURS.index(thing.colour)
          assert hollow == (thing.shape == "ring")
      (left, right, top, bottom), (left_2, right_2, top_2, bottom_2) = boxes
      if scene.side_by_side:
        assert right < 32 <= left_2
        upper = max(bottom, bottom_2) < 32
        assert upper if scene.place == "top" else min(top, top_2) >= 32
      else:
        assert bottom < 32 <= top_2
        left_half = max(right, right_2) < 32
        assert left_half if scene.place == "left" else min(left, left_2) >= 32
      wider = right - left > right_2 - left_2
      assert wider == (scene.first.size == "large"), (i, boxes)
      assert dots_in(colours == PALETTE.index(DOT_RGB)) == scene.dots, i


def dots_in(mask: np.ndarray) -> int:
  """Connected parts of at least four pixels."""
  mask, sizes = mask.copy(), []
  for start in zip(*np.nonzero(mask), strict=True):
    stack, size = [start], 0
    while stack:
      row, column = stack.pop()
      if 0 <= row < 64 and 0 <= column < 64 and mask[row, column]:
        mask[row, column] = False
        size += 1
        stack += [(row + 1, column), (row - 1, column)]
        stack += [(row, column + 1), (row, column - 1)]
    sizes.append(size)
  return sum(size >= 4 for size in sizes)


# --- Baselines on the 1,000 evaluation items, local R@1.
#
# Measured: histogram of the grammar's own palette, image to image, 5.9 %; plain colour
# histogram 2.0 %; colour words to image 1.0 %; bag of words, text to text, 4.1 %.
# configs/demo.py must reach twice these limits: test_the_demo_beats_them (slow)
# trains it. A limit above half of what it reaches makes these scenes a toy.
HISTOGRAM_LIMIT = 0.07
WORDS_LIMIT = 0.05
COLOUR_WORDS_LIMIT = 0.02


def recall_at_1(queries: np.ndarray, documents: np.ndarray) -> float:
  """R@1 of row i for row i by cosine; ties count against it."""
  queries = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-9)
  norms = np.maximum(np.linalg.norm(documents, axis=1, keepdims=True), 1e-9)
  scores = queries @ (documents / norms).T
  own = np.diag(scores)[:, None]
  return float(((scores >= own - 1e-6).sum(1) == 1).mean())


def test_colour_histograms_stay_low(held_out):
  """Image to image, between views; and colour words to image."""
  views = [[held_out[i]["images"][k] for i in range(1000)] for k in (0, 1)]

  def plain(image):
    r, g, b = (np.asarray(image).reshape(-1, 3) >> 6).astype(int).T
    return np.bincount(16 * r + 4 * g + b, minlength=64)

  def of_palette(image):  # as if it knew the grammar's colours
    return np.bincount(painted(image).ravel(), minlength=7)[:6]

  for histogram in (plain, of_palette):
    query, document = (np.array([histogram(v) for v in view], float) for view in views)
    score = max(recall_at_1(query, document), recall_at_1(query**0.5, document**0.5))
    assert score < HISTOGRAM_LIMIT, histogram.__name__
  words = np.array(
    [
      [sum(colour in word for word in text.split()) for colour in grammar.COLOURS]
      for text in (held_out[i]["texts"][0] for i in range(1000))
    ],
    float,
  )
  assert recall_at_1(words, document[:, :5] ** 0.5) < COLOUR_WORDS_LIMIT


def test_a_bag_of_words_stays_low(held_out):
  """Text to text, between wordings; also with synonyms known to be the same."""
  same = SHAPE_WORDS | SIZE_WORDS
  content = {*same.values(), *grammar.COLOURS, "two", "twin", "three"}
  content |= {"top", "bottom", "left", "right"}

  def bags(k, known):
    texts = [held_out[i]["texts"][k] for i in range(1000)]
    words = [re.findall(r"\w+", text) for text in texts]
    if known:
      words = [
        [same.get(w, w) for w in ws if same.get(w, w) in content] for ws in words
      ]
    return [Counter(ws) for ws in words]

  for known in (False, True):
    queries, documents = bags(1, known), bags(0, known)
    vocabulary = sorted({word for bag in queries + documents for word in bag})
    query, document = (
      np.array([[bag[w] for w in vocabulary] for bag in side], float)
      for side in (queries, documents)
    )
    rarity = np.log(1000 / (document > 0).sum(0).clip(1))
    score = max(recall_at_1(query, document), recall_at_1(query * rarity, document))
    assert score < WORDS_LIMIT, known


@pytest.mark.slow
def test_the_demo_beats_them(tmp_path):
  """Three minutes on two cores: the recipe as it comes, at twice a baseline's limit."""
  command = [sys.executable, "-m", "gcl_jax.train", "--config=configs/demo.py"]
  root = Path(__file__).resolve().parents[2]
  subprocess.run([*command, f"--workdir={tmp_path}"], cwd=root, check=True)
  results = sorted((tmp_path / "results").glob("*.json"), key=lambda path: path.stem)
  cells = json.loads(results[-1].read_text())["plain"]["local"]["cells"]
  recall = {name: cell["R@1"] / 100 for name, cell in cells.items()}
  assert recall["i->i"] > 2 * HISTOGRAM_LIMIT
  assert recall["t->t"] > 2 * WORDS_LIMIT
  assert recall["t->i"] > 2 * COLOUR_WORDS_LIMIT
