"""The scenes: deterministic, unambiguous, truthful, and no toy.

What the baselines are held against: see TRAINED.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from random import Random

import numpy as np
import pytest

from gcl_jax.data import scenes_grammar as grammar
from gcl_jax.data.scenes import Scenes, contact_sheet, corpus
from gcl_jax.data.scenes_drawing import COLOUR_RGB
from gcl_jax.data.scenes_grammar import Group, Scene
from gcl_jax.errors import UserError


@pytest.fixture(scope="module")
def train() -> Scenes:
  return Scenes("train")


@pytest.fixture(scope="module")
def held_out() -> Scenes:
  return Scenes("eval")


# --- An inverse of the grammar, written without it.

COUNT_WORDS = {"a": 1, "one": 1, "two": 2, "a pair of": 2}
SIZE_WORDS = {"small": "small", "little": "small", "large": "large", "big": "large"}
SHAPE_WORDS = {
  "circle": ("circle", "circles", "disc", "discs"),
  "square": ("square", "squares", "box", "boxes"),
  "triangle": ("triangle", "triangles"),
  "cross": ("cross", "crosses", "plus", "pluses"),
  "ring": ("ring", "rings", "hoop", "hoops"),
  "star": ("star", "stars"),
}
SHAPE_OF = {word: shape for shape, words in SHAPE_WORDS.items() for word in words}
GROUP = re.compile(
  rf"\b(a pair of|two|one|a) ({'|'.join(SIZE_WORDS)}) (\w+) ({'|'.join(SHAPE_OF)})\b"
)
PLACE_WORDS = {
  "at the top": "top",
  "in the upper half": "top",
  "at the bottom": "bottom",
  "in the lower half": "bottom",
  "on the left": "left",
  "in the left half": "left",
  "on the right": "right",
  "in the right half": "right",
}
# Where the words put the group told first: +1 is left or above.
AFTER = {  # said of the group before them, A ... B
  "left of": 1,
  "to the left of": 1,
  "right of": -1,
  "to the right of": -1,
  "above": 1,
  "over": 1,
  "below": -1,
  "under": -1,
}
SIDE = {
  "to the left": 1,
  "to the right": -1,
  "higher up": 1,
  "further up": 1,
  "lower down": -1,
  "further down": -1,
}
ORDER = {
  "from left to right": 1,
  "from right to left": -1,
  "from top to bottom": 1,
  "downwards": 1,
  "from bottom to top": -1,
  "upwards": -1,
}
VERTICAL = re.compile(
  r"\b(above|over|below|under|up|down|downwards|upwards|top to|bottom to)\b"
)


def parse(text: str) -> Scene:
  """The scene that a wording tells."""
  groups = []
  for count, size, colour, shape in GROUP.findall(text):
    assert (shape in [words[1] for words in _pairs(SHAPE_WORDS[SHAPE_OF[shape]])]) == (
      COUNT_WORDS[count] == 2
    ), text
    groups.append(Group(COUNT_WORDS[count], SIZE_WORDS[size], colour, SHAPE_OF[shape]))
  assert len(groups) == 2, text
  rest = GROUP.sub("#", text)
  places = [place for words, place in PLACE_WORDS.items() if words in rest]
  assert len(places) == 1, text
  for words in PLACE_WORDS:
    rest = rest.replace(words, "")
  order = [sign for words, sign in ORDER.items() if words in rest]
  between = re.fullmatch(r"[^#]*# ([a-z ]+) #[^#]*", rest)
  before = re.match(r"([a-z ]+) # (is|are) #", rest)
  of_each = re.match(r"[, ]*# ([a-z ]+) and # ([a-z ]+)", rest)
  with_b = re.match(r"[^#]*# with # ([a-z ]+)", rest)
  if order:
    sign = order[0]
  elif before:
    sign = -AFTER[before[1]]
  elif of_each:
    assert SIDE[of_each[1]] == -SIDE[of_each[2]], text
    sign = SIDE[of_each[1]]
  elif with_b:
    sign = -SIDE[with_b[1].strip()]
  else:
    sign = AFTER[between[1]]
  assert bool(VERTICAL.search(rest)) == (places[0] in ("left", "right")), text
  return Scene(*groups[::sign], places[0])


def _pairs(words):
  return list(zip(words[::2], words[1::2], strict=True))


def test_parser_by_hand():
  told = parse("to the right of two big red pluses is a little blue disc, at the top")
  red, blue = Group(2, "large", "red", "cross"), Group(1, "small", "blue", "circle")
  assert told == Scene(red, blue, "top")
  told = parse("upwards on the left: a little blue disc, then two large red crosses")
  assert told == Scene(red, blue, "left")
  told = parse("a small blue disc with two big red pluses lower down, on the right")
  assert told == Scene(blue, red, "right")


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
  words = {*SIZE_WORDS, *SHAPE_OF, "pair", "under", "upwards", "downwards", "both"}
  assert words <= set(used)


def test_wordings_of_an_item_differ(train, held_out):
  for source, step in ((train, 40), (held_out, 4)):
    for i in range(0, len(source), step):
      texts = list(source[i]["texts"])
      assert len(set(texts)) == len(texts)
      assert all(8 <= len(text.split()) <= 23 for text in texts)


# --- Splits.


def test_no_scene_twice(train, held_out):
  assert len(train) == 20_000 and len(held_out) == 1_000
  scenes = [train.scene(i) for i in range(len(train))]
  scenes += [held_out.scene(i) for i in range(len(held_out))]
  assert len(set(scenes)) == 21_000


def test_held_out_combinations(train, held_out):
  """No {two colours} × {two shapes} of evaluation is in training, for any seed."""

  def combination(scene):
    a, b = scene.first, scene.second
    return frozenset((a.colour, b.colour)), frozenset((a.shape, b.shape))

  def combinations(source):
    return {combination(source.scene(i)) for i in range(len(source))}

  trained = combinations(train) | combinations(Scenes("train", seed=7, size=20_000))
  evaluated = combinations(held_out) | combinations(Scenes("eval", size=5760))
  assert not trained & evaluated
  for part in (0, 1):  # but each pair of colours and each of shapes was seen
    assert {c[part] for c in evaluated} <= {c[part] for c in trained}
  pairs = itertools.product(
    map(frozenset, grammar.COLOUR_PAIRS), map(frozenset, grammar.SHAPE_PAIRS)
  )
  assert trained | evaluated == set(pairs)


def test_evaluation_is_made_of_anagrams(held_out):
  """Most items have at least seven others with the same words."""

  def words(scene):
    a, b = scene.first, scene.second
    return frozenset(Counter([*a, *b, scene.place]).items())

  families = Counter(words(held_out.scene(i)) for i in range(len(held_out)))
  assert sum(n for n in families.values() if n >= 8) >= 980


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
  assert (len(images), len(texts)) == (16, 12)
  assert texts[-1] == texts[11] and texts[:2] == [texts[0], texts[1]]
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
  """A byte-level BPE of 512 ids tells every wording in 30 tokens, ends included."""
  from tokenizers import ByteLevelBPETokenizer

  bpe = ByteLevelBPETokenizer()
  bpe.train_from_iterator(corpus(0, 3_000), vocab_size=512, show_progress=False)
  longest = max(len(bpe.encode(text).ids) for text in corpus(1, 2_000))
  assert longest + 2 <= 30


# --- Pictures.

PALETTE = np.array([COLOUR_RGB[colour] for colour in grammar.COLOURS])


def painted(image) -> np.ndarray:
  """(H, W) index of the palette colour that a pixel has, −1 for none."""
  pixels = np.asarray(image).astype(int)[:, :, None]
  distance = np.abs(pixels - PALETTE).max(-1)
  return np.where(distance.min(-1) <= 26, distance.argmin(-1), -1)


def test_views_differ_and_tell_the_truth(held_out):
  for i in range(0, len(held_out), 10):
    scene = held_out.scene(i)
    views = [np.asarray(image) for image in held_out[i]["images"]]
    for a, b in itertools.combinations(views, 2):
      assert (a != b).any(-1).mean() > 0.5
    for image in views:
      colours = painted(image)
      centres, widths = [], []
      for group in (scene.first, scene.second):
        rows, columns = np.nonzero(colours == grammar.COLOURS.index(group.colour))
        assert len(rows) >= 12 * group.count, (i, group)
        centres.append((columns.mean() / 64, rows.mean() / 64))
        widths.append(np.sqrt(len(rows) / group.count))
      (x, y), (u, v) = centres
      if scene.side_by_side:
        assert x < 0.5 < u
        assert (max(y, v) < 0.5) if scene.place == "top" else (min(y, v) > 0.5)
      else:
        assert y < 0.5 < v
        assert (max(x, u) < 0.5) if scene.place == "left" else (min(x, u) > 0.5)
      if scene.first.shape in ("circle", "square") and scene.second.shape in (
        "circle",
        "square",
      ):
        assert (widths[0] > widths[1]) == (scene.first.size == "large")


# --- No toy. A model that knows colours or words alone must stay under half of TRAINED.

TRAINED = 0.30  # to be measured


def recall_at_1(queries: np.ndarray, documents: np.ndarray) -> float:
  """R@1 of row i for row i by cosine; ties count against it."""
  queries = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-9)
  norms = np.maximum(np.linalg.norm(documents, axis=1, keepdims=True), 1e-9)
  scores = queries @ (documents / norms).T
  own = np.diag(scores)[:, None]
  return float(((scores >= own - 1e-6).sum(1) == 1).mean())


def test_colour_histograms_are_not_enough(held_out):
  """Image to image, between views; and colour words to image."""
  views = [[held_out[i]["images"][k] for i in range(1000)] for k in (0, 1)]

  def plain(image):
    r, g, b = (np.asarray(image).reshape(-1, 3) >> 6).astype(int).T
    return np.bincount(16 * r + 4 * g + b, minlength=64)

  def of_palette(image):  # as if it knew the grammar's colours
    return np.bincount(painted(image).ravel() + 1, minlength=7)[1:]

  for histogram in (plain, of_palette):
    query, document = (np.array([histogram(v) for v in view], float) for view in views)
    score = max(recall_at_1(query, document), recall_at_1(query**0.5, document**0.5))
    assert score < TRAINED / 2, histogram.__name__
  words = np.array(
    [
      [sum(colour in word for word in text.split()) for colour in grammar.COLOURS]
      for text in (held_out[i]["texts"][0] for i in range(1000))
    ],
    float,
  )
  assert recall_at_1(words, document**0.5) < TRAINED / 2


def test_a_bag_of_words_is_not_enough(held_out):
  """Text to text, between wordings; also with synonyms known to be the same."""
  same = SHAPE_OF | SIZE_WORDS
  content = {*same.values(), *grammar.COLOURS, "two", "pair"}
  content |= {"top", "bottom", "left", "right", "upper", "lower"}

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
    assert score < TRAINED / 2, known
