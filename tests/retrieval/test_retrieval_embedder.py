"""The embedder: against a model small enough to know by heart, and a random CLIP."""

import dataclasses
import io
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gcl_jax import sharding
from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings, score_fusion
from gcl_jax.processing import ImageProcessor, Tokenizer, default_clip_processor
from gcl_jax.retrieval import embedder as embedder_module
from gcl_jax.retrieval.embedder import Embedder
from gcl_jax.sharding import Share

TEXTS = ["a red circle", "", "blue", "two large green triangles above a red square"]
SETTINGS = FusionSettings(image_weight=2.0, text_weight=0.5)
TRACES = []


@dataclasses.dataclass(frozen=True)
class Known:
  """Image: mean colour. Text: length, sum of ids, 1. Both times a parameter."""

  fusion: FusionSettings = SETTINGS
  eos_id: int = 539
  context: int = 40

  @property
  def config(self):
    return SimpleNamespace(
      projection_dim=3,
      vision=SimpleNamespace(image_size=16),
      text=SimpleNamespace(vocab_size=600, context=self.context, eos_id=self.eos_id),
      pair_context=self.context,
    )

  def bind(self, params):
    def embed_image(pixels):
      TRACES.append(("image", pixels.shape))
      return params["image"] * pixels.mean((1, 2))

    def embed_text(tokens):
      TRACES.append(("text", tokens.shape))
      end = jnp.argmax(tokens == 539, axis=1)
      before = jnp.arange(tokens.shape[1]) < end[:, None]
      total = jnp.where(before, tokens, 0).sum(1)
      rows = jnp.stack([end, total / 100, jnp.ones_like(total)], axis=1)
      return params["text"] * rows.astype(jnp.float32)

    def embed_pair(pixels, tokens):
      return score_fusion(
        embed_image(pixels),
        embed_text(tokens),
        image_weight=self.fusion.image_weight,
        text_weight=self.fusion.text_weight,
        of=self.fusion.of,
      )

    return SimpleNamespace(
      embed_image=embed_image, embed_text=embed_text, embed_pair=embed_pair
    )


def picture(colour, format=None):
  image = Image.new("RGB", (20, 17), colour)
  if format is None:
    return image
  file = io.BytesIO()
  image.save(file, format)
  return file.getvalue()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
  return Tokenizer.train(TEXTS, vocab_size=540, max_length=40)


@pytest.fixture(scope="module")
def processor(tokenizer):
  return default_clip_processor(16, tokenizer)


@pytest.fixture
def known(processor):
  TRACES.clear()
  embedder_module._functions.cache_clear()
  params = {"image": np.float32(1), "text": np.float32(1)}
  return Embedder(Known(), params, processor, batch_size=16)


def unit(row):
  row = np.asarray(row, np.float64)
  return row / np.linalg.norm(row)


def known_image(colour):
  processor = ImageProcessor()
  return (np.array(colour) / 255 - processor.mean) / processor.std


def known_text(text, tokenizer):
  ids = tokenizer.encode(text)
  return np.array([len(ids) - 1, sum(ids[:-1]) / 100, 1.0])


def test_values_by_hand_in_the_order_of_the_documents(known, tokenizer, tmp_path):
  red, blue = (250, 10, 30), (5, 20, 200)
  (tmp_path / "blue.png").write_bytes(picture(blue, "PNG"))
  images = [picture(red), None, picture(blue, "PNG"), tmp_path / "blue.png", None]
  texts = [None, TEXTS[3], TEXTS[0], None, ""]
  got = known.embed(images, texts)
  assert got.dtype == np.float32
  assert got.shape == (5, 3)
  both = 2 * known_image(blue) + 0.5 * known_text(TEXTS[0], tokenizer)
  want = [known_image(red), known_text(TEXTS[3], tokenizer), both, known_image(blue)]
  want.append(known_text("", tokenizer))
  np.testing.assert_allclose(got, [unit(row) for row in want], atol=2e-6)


def test_projected_vectors_keep_their_length(known, tokenizer):
  got = known.embed([picture("red"), None], [None, "blue"], normalize=False)
  want = [known_image((255, 0, 0)), known_text("blue", tokenizer)]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert np.linalg.norm(got[1]) > 2
  with pytest.raises(ValueError, match="normalize=True"):
    known.embed([picture("red")], ["blue"], normalize=False)


def test_one_list_alone(known, tokenizer):
  got = known.embed(texts=TEXTS)
  want = [unit(known_text(text, tokenizer)) for text in TEXTS]
  np.testing.assert_allclose(got, want, atol=2e-6)
  got = known.embed([picture("red")])
  np.testing.assert_allclose(got, [unit(known_image((255, 0, 0)))], atol=2e-6)
  assert known.embed([], []).shape == (0, 3)


def test_only_the_towers_that_are_needed_run_and_shapes_are_few(known):
  known.embed(texts=TEXTS)
  assert {kind for kind, _ in TRACES} == {"text"}
  known.embed([picture("red")] * 3)
  assert TRACES[-1] == ("image", (8, 16, 16, 3))  # eight devices
  for count in (1, 5, 8):
    known.embed([picture("red")] * count)
  assert len([kind for kind, _ in TRACES if kind == "image"]) == 1
  known.embed([picture("red")] * 37)  # 16 + 16 + 5
  shapes = [shape[0] for kind, shape in TRACES if kind == "image"]
  assert shapes == [8, 16]


def test_texts_are_cut_to_the_longest_of_their_batch(known, tokenizer):
  known.embed(texts=["blue"] * 3)
  assert TRACES[-1] == ("text", (8, 16))
  long = " ".join(["circle"] * 60)
  assert len(tokenizer.encode(long)) == 40
  known.embed(texts=[long] + ["blue"] * 20)  # sorted: the long one goes last
  widths = sorted(shape for _, shape in TRACES)
  assert widths == [(8, 16), (8, 40), (16, 16)]


def test_long_texts_are_not_padded_to_the_longest_that_there_could_be():
  lengths = (16, 513, 1024, 1025, 2049, 4096, 4097, 8192)
  got = [embedder_module._bucket(n, 8192) for n in lengths]
  assert got == [16, 1024, 1024, 2048, 4096, 4096, 8192, 8192]
  assert embedder_module._bucket(513, 514) == 514


def test_of_long_texts_fewer_are_embedded_at_once(tokenizer):
  TRACES.clear()
  embedder_module._functions.cache_clear()
  params = {"image": np.float32(1), "text": np.float32(1)}
  processor = default_clip_processor(16, tokenizer.cut_to(8192))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  model = Known(context=8192)
  embedder = Embedder(model, params, processor, mesh=mesh, batch_size=64)
  lengths = (0, 512, 513, 1024, 2048, 4096, 8192)
  assert [embedder.most_rows(n) for n in lengths] == [64, 64, 32, 16, 4, 1, 1]
  texts = ["blue"] * 60
  for words, count in ((900, 20), (1900, 3), (3900, 2)):
    texts += ["red " * words] * count
  texts = texts[::-1]
  got = embedder.embed(texts=texts)
  shapes = sorted({shape for _, shape in TRACES})
  assert shapes == [(1, 4096), (4, 1024), (4, 2048), (16, 1024), (64, 16)]
  want = [unit(known_text(text, processor.tokenizer)) for text in texts]
  np.testing.assert_allclose(got, want, atol=2e-6)
  tokens = embedder.tokens("red " * 900)
  assert embedder.start(tokens=np.stack([tokens] * 16)).shape == (16, 3)


def test_a_batch_is_split_over_all_devices(known, monkeypatch):
  sent = []
  original = embedder_module.put_batch

  def spy(mesh, batch):
    sent.append(original(mesh, batch))
    return sent[-1]

  monkeypatch.setattr(embedder_module, "put_batch", spy)
  known.embed(texts=TEXTS * 4)  # 16 of them, of at most 32 tokens
  tokens = sent[-1]["tokens"]
  assert len(tokens.sharding.device_set) == len(jax.devices()) == 8
  assert {shard.data.shape for shard in tokens.addressable_shards} == {(2, 32)}


def test_a_process_reads_the_images_of_its_own_rows(known, monkeypatch):
  """As the second of two: its half of a padded batch, and word of the other's failure."""
  read, told = [], []

  def put_half(mesh, batch):
    rows = {name: np.concatenate([x, x]) for name, x in batch.items()}
    return original(mesh, rows)

  original, decode = embedder_module.put_batch, embedder_module._pixels
  monkeypatch.setattr(embedder_module, "batch_share", lambda mesh: Share((1,), 2))
  monkeypatch.setattr(embedder_module, "put_batch", put_half)
  monkeypatch.setattr(
    embedder_module,
    "_pixels",
    lambda *parts: read.append(int(parts[-1])) or decode(*parts),
  )
  known._shared, known._failures = True, lambda failed: told.append(failed) or failed
  known.embed([picture("red")] * 16)
  assert sorted(read) == list(range(8, 16))
  assert told == [0]
  known._failures = lambda failed: 1
  with pytest.raises(UserError, match="another process could not read"):
    known.embed([picture("red")] * 16)


def test_other_weights_share_what_is_compiled(known, tokenizer):
  image, text = [picture("red")], ["blue"]
  first = known.embed(image, text)
  traces = len(TRACES)
  other = known.with_params({"image": np.float32(-1), "text": np.float32(1)})
  second = other.embed(image, text)
  want = -2 * known_image((255, 0, 0)) + 0.5 * known_text("blue", tokenizer)
  np.testing.assert_allclose(second, [unit(want)], atol=2e-6)
  np.testing.assert_array_equal(known.embed(image, text), first)
  Embedder(Known(), known.params, known.processor, batch_size=16).embed(image, text)
  assert len(TRACES) == traces
  assert other.config.projection_dim == known.config.projection_dim


def test_parameters_on_the_mesh_stay_where_they_are(processor):
  mesh = sharding.make_mesh(data=4, fsdp=2)
  spec = jax.sharding.PartitionSpec("fsdp")
  split = jax.device_put(jnp.ones((2,)), jax.sharding.NamedSharding(mesh, spec))
  params = {"image": split, "text": np.float32(1)}
  embedder = Embedder(Known(), params, processor, mesh=mesh)
  assert embedder.params["image"] is split
  assert len(embedder.params["text"].sharding.device_set) == 8


def test_progress_counts_documents(known):
  calls = []
  known.embed(
    [picture("red")] * 20 + [None],
    [None] * 20 + ["blue"],
    progress=lambda done, total: calls.append((done, total)),
  )
  assert calls == [(16, 21), (20, 21), (21, 21)]


def test_zero_rows_give_zeros(processor):
  params = {"image": np.float32(0), "text": np.float32(0)}
  embedder = Embedder(Known(), params, processor)
  got = embedder.embed([picture("red"), None, picture("red")], [None, "blue", "blue"])
  np.testing.assert_array_equal(got, np.zeros((3, 3)))


@pytest.mark.parametrize(
  ("images", "texts", "message"),
  [
    (None, None, "nothing to embed"),
    ([None, b""], ["a", "b", "c"], "2 images but 3 texts"),
    ([None, None], ["a", None], "document 1 has neither"),
    (None, ["a", "b", None], "document 2 has neither"),
    ("photo.jpg", None, r"single image: give a list, \[image\]"),
    (b"...", None, "single image"),
    (None, "a cat", r"single text: give a list, \[text\]"),
    (None, ["a", 7], r"texts\[1\] is a int"),
    ([picture("red"), b"no picture"], None, r"images\[1\] cannot be read: .*known"),
    (
      ["/nowhere/x.jpg"],
      ["a"],
      r"images\[0\] cannot be read: /nowhere/x\.jpg: no",
    ),
  ],
)
def test_mistakes_are_named(known, images, texts, message):
  with pytest.raises(UserError, match=message):
    known.embed(images, texts)


def test_a_processor_of_another_model_is_refused(tokenizer):
  with pytest.raises(UserError, match="images of 20 pixels, the model wants 16"):
    Embedder(Known(), {}, default_clip_processor(20, tokenizer))
  letters = "abcdefghijklmnop"
  large = Tokenizer.train([a + b + "z" for a in letters for b in letters], 700)
  assert large.vocab_size > 600
  with pytest.raises(UserError, match="the model knows 600"):
    Embedder(Known(), {}, default_clip_processor(16, large))
  with pytest.raises(UserError, match="end token is 539, the model's 538"):
    Embedder(Known(eos_id=538), {}, default_clip_processor(16, tokenizer))
  Embedder(Known(eos_id=2), {}, default_clip_processor(16, tokenizer))  # OpenAI's files


def test_batch_sizes_are_few():
  assert embedder_module._batch_sizes(64, 8) == (8, 16, 32, 64)
  assert embedder_module._batch_sizes(64, 1) == (1, 2, 4, 8, 16, 32, 64)
  assert embedder_module._batch_sizes(50, 8) == (8, 16, 32, 56)
  assert embedder_module._batch_sizes(1, 8) == (8,)
  assert embedder_module._batch_sizes(3, 1) == (1, 2, 3)


@pytest.mark.parametrize("pad", [0, 9])
def test_lengths_count_the_end_token(pad):
  tokens = np.full((3, 6), pad)
  tokens[0, :3] = [8, 5, 9]
  tokens[1, :2] = [8, 9]
  tokens[2] = [8, 5, 5, 5, 5, 9]
  got = embedder_module._lengths(tokens, pad)
  assert (got >= [3, 2, 6]).all()
  assert (got <= [4, 3, 6]).all()
