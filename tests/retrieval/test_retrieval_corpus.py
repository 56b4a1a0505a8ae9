"""A corpus to an index: which documents, in what order, whatever the batches."""

import dataclasses
import io
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gcl_jax.data import BadRecord
from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings, score_fusion
from gcl_jax.processing import (
  ImageProcessor,
  Processor,
  Tokenizer,
  default_clip_processor,
)
from gcl_jax.retrieval import Embedder, read_index
from gcl_jax.retrieval.corpus import STAGES, check_mode, embed_corpus
from gcl_jax.retrieval.identity import identity
from gcl_jax.retrieval.store_writer import IndexWriter
from gcl_jax.sharding import make_mesh

WORDS = ["a red circle", "blue", "two green triangles above a very small red square"]


@dataclasses.dataclass(frozen=True)
class Small:
  """A model without towers: four numbers of the picture, four of the text."""

  fusion: FusionSettings = dataclasses.field(default_factory=FusionSettings)
  pair_context: int = 40
  context: int = 40

  @property
  def config(self):
    return SimpleNamespace(
      projection_dim=4,
      vision=SimpleNamespace(image_size=16),
      text=SimpleNamespace(vocab_size=600, context=self.context, eos_id=539),
      pair_context=self.pair_context,
    )

  def bind(self, params):
    def embed_image(pixels):
      rows = jnp.concatenate([pixels.mean((1, 2)), pixels.std((1, 2, 3))[:, None]], 1)
      return rows @ params["image"]

    def embed_text(tokens):
      end = jnp.argmax(tokens == 539, axis=1)
      before = jnp.arange(tokens.shape[1]) < end[:, None]
      ids = jnp.where(before, tokens, 0).astype(jnp.float32)
      powers = [ids.sum(1) / 500, (ids % 7).sum(1), (ids % 3).sum(1), end.astype(float)]
      return jnp.stack(powers, axis=1) @ params["text"]

    def embed_pair(pixels, tokens):
      return score_fusion(embed_image(pixels), embed_text(tokens))

    return SimpleNamespace(
      embed_image=embed_image, embed_text=embed_text, embed_pair=embed_pair
    )


PARAMS = {
  name: np.random.default_rng(seed).normal(size=(4, 4)).astype(np.float32)
  for seed, name in enumerate(("image", "text"))
}


@pytest.fixture(scope="module")
def processor():
  tokenizer = Tokenizer.train(WORDS, vocab_size=540, max_length=40)
  return default_clip_processor(16, tokenizer)


@pytest.fixture(scope="module")
def embedder(processor):
  return Embedder(Small(), PARAMS, processor, batch_size=8)


def png(seed):
  pixels = np.random.default_rng(seed).integers(0, 256, (20, 18, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


class Torn:
  """Pictures that are named but not there."""

  def __len__(self):
    return 1

  def __getitem__(self, k):
    raise BadRecord("torn.jpg is not there")


class Pairs:
  """Sixty records: pictures as bytes or files, one or two texts, and all that can lack."""

  def __init__(self, folder):
    self._file = folder / "photo.png"
    self._file.write_bytes(png(100))

  def __len__(self):
    return 60

  def __getitem__(self, k):
    if k == 31:
      raise BadRecord("line 31 cannot be read")
    images, texts = [png(k)], [f"{WORDS[k % 3]} {k}", "another"]
    if k % 10 == 1:
      texts = []
    if k % 10 == 2:
      images = []
    if k % 10 == 3:
      images = [self._file, b"never read"]
    if k == 14:
      images = Torn()
    if k == 15:
      images = [b"no picture"]
    if k == 16:
      images, texts = [b"no picture"], []
    return {"id": f"id{k}", "images": images, "texts": texts}


@pytest.fixture
def pairs(tmp_path):
  return Pairs(tmp_path)


def embed(folder, source, embedder, mode="both", shard_size=25, shards=None, **given):
  settings = {
    "dtype": given.pop("dtype", "float32"),
    "dimension": 4,
    "model": identity(embedder),
    "data": {},
    "split": "all",
  }
  count = -(-len(source) // shard_size)
  writer = IndexWriter(folder, settings, count)
  stages = embed_corpus(
    source,
    embedder,
    writer,
    writer.missing() if shards is None else shards,
    shard_size=shard_size,
    mode=mode,
    **given,
  )
  writer.finish()
  return stages


def test_every_record_is_one_document_of_what_it_has(tmp_path, pairs, embedder):
  embed(tmp_path / "index", pairs, embedder)
  index = read_index(tmp_path / "index")
  documents = index.documents(range(len(index)))
  assert [d["record"] for d in documents] == [k for k in range(60) if k not in (16, 31)]
  for row, document in enumerate(documents):
    k = document["record"]
    record = pairs[k]
    readable = len(record["images"]) and k not in (14, 15)
    image = record["images"][0] if readable else None
    text = record["texts"][0] if record["texts"] else None
    kind = "text" if image is None else "image" if text is None else "fused"
    assert (document["id"], document["modality"]) == (record["id"], kind)
    assert document["text"] == text
    assert document["picture"] == (-1 if image is None else 0)
    assert document["image"] == (str(image) if k % 10 == 3 else None)
    wanted = embedder.embed([image], [text])[0]
    np.testing.assert_allclose(index.vectors[[row]][0], wanted, atol=1e-6)
  reasons = {entry["id"]: entry["reason"] for entry in index.manifest["bad"]}
  assert set(reasons) == {"id14", "id15", "id16", "record 31"}
  assert "torn.jpg is not there" in reasons["id14"]
  assert "not a picture" in reasons["id16"]
  assert reasons["record 31"] == "line 31 cannot be read"


def test_beside_an_image_a_text_is_as_long_as_fits_there(tmp_path, pairs, processor):
  less = Embedder(Small(pair_context=4), PARAMS, processor, batch_size=8)
  before = processor.tokenizer.texts_cut
  embed(tmp_path / "index", pairs, less, "each")
  index = read_index(tmp_path / "index")
  cut = 0
  for row, document in enumerate(index.documents(range(len(index)))):
    if document["text"] and document["picture"] >= 0:
      cut += len(processor.tokenizer.encode(document["text"])) > 4
    images = pairs[document["record"]]["images"] if document["picture"] >= 0 else [None]
    wanted = less.embed([images[0]], [document["text"]])[0]
    np.testing.assert_allclose(index.vectors[[row]][0], wanted, atol=1e-6)
  # By the index, and once more by the line above.
  assert processor.tokenizer.texts_cut - before == 2 * cut > 0


class Lengths:
  """Texts of 900 words, of 1,900 and of one."""

  def __len__(self):
    return 24

  def __getitem__(self, k):
    words = (900, 1, 1900, 900)[k % 4]
    return {"id": f"id{k}", "images": [], "texts": [f"{'red ' * words}{k}"]}


def test_long_texts_are_embedded_a_few_at_a_time(tmp_path, processor):
  longer = Processor(processor.image, processor.tokenizer.cut_to(4096))
  mesh = make_mesh(devices=jax.devices()[:1])
  model = Small(context=4096)
  embedder = Embedder(model, PARAMS, longer, mesh=mesh, batch_size=32)
  started, start = [], embedder.start
  embedder.start = lambda pixels, tokens: (
    started.append(tokens.shape) or start(pixels, tokens)
  )
  embed(tmp_path / "index", Lengths(), embedder)
  # Of twelve of 1,024 eight at once, of six of 2,048 two; what is left goes with the six
  # of one word.
  assert sorted(started) == [
    (2, 1024),
    (2, 2048),
    (2, 2048),
    (2, 2048),
    *[(8, 1024)] * 2,
  ]
  index = read_index(tmp_path / "index")
  texts = [document["text"] for document in index.documents(range(24))]
  wanted = embedder.embed(texts=texts)
  np.testing.assert_allclose(index.vectors[range(24)], wanted, atol=1e-6)


@pytest.mark.parametrize(
  ("mode", "counts", "bad"),
  [
    ("image", (50, 0, 0), 10),  # six without a picture, three unreadable, one torn line
    ("text", (0, 53, 0), 7),
    ("each", (50, 53, 45), 4),
  ],
)
def test_modes(tmp_path, pairs, embedder, mode, counts, bad):
  embed(tmp_path / "index", pairs, embedder, mode)
  index = read_index(tmp_path / "index")
  assert tuple(np.bincount(index.modalities, minlength=3)) == counts
  assert index.manifest["bad_count"] == bad
  reasons = {entry["id"]: entry["reason"] for entry in index.manifest["bad"]}
  assert reasons.get("id2") == ("no picture" if mode == "image" else None)
  assert reasons.get("id1") == ("no text" if mode == "text" else None)
  for document in index.documents(range(len(index))):
    assert (document["text"] is None) == (document["modality"] == "image")
    assert (document["picture"] < 0) == (document["modality"] == "text")


def test_the_same_vectors_whatever_the_batches_devices_and_threads(
  tmp_path, pairs, processor, embedder
):
  embed(tmp_path / "eight", pairs, embedder, "each")
  wanted = read_index(tmp_path / "eight")
  one = make_mesh(devices=jax.devices()[:1])
  for batch_size, threads, shard_size in ((1, 1, 25), (13, 5, 60), (64, 3, 7)):
    other = Embedder(
      Small(), PARAMS, processor, mesh=one, batch_size=batch_size, threads=threads
    )
    folder = tmp_path / f"{batch_size}"
    embed(folder, pairs, other, "each", shard_size)
    found = read_index(folder)
    every = range(len(wanted))
    assert found.documents(every) == wanted.documents(every)
    np.testing.assert_allclose(found.vectors[:], wanted.vectors[:], atol=1e-6)


class Killed(BaseException):
  pass


def test_a_run_that_is_killed_in_a_shard_goes_on(tmp_path, pairs, embedder):
  embed(tmp_path / "whole", pairs, embedder, shard_size=7)

  def contents(name):
    return {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}

  class Deadly(Pairs):
    def __getitem__(self, k):
      if k == self.at:
        raise Killed
      return super().__getitem__(k)

  for at in (0, 20, 59):
    source = Deadly(tmp_path)
    source.at, name = at, f"killed{at}"
    with pytest.raises(Killed):
      embed(tmp_path / name, source, embedder, shard_size=7)
    written = sorted(p.name for p in (tmp_path / name).glob("documents-*"))
    assert len(written) == at // 7
    embed(tmp_path / name, pairs, embedder, shard_size=7)
    assert contents(name) == contents("whole")


def test_processes_share_the_shards(tmp_path, pairs, embedder):
  embed(tmp_path / "alone", pairs, embedder, shard_size=9)
  for me in (1, 0):
    shards = [k for k in range(7) if k % 2 == me]
    embed(tmp_path / "two", pairs, embedder, shard_size=9, shards=shards)
  for path in (tmp_path / "alone").iterdir():
    assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_progress_and_stages(tmp_path, pairs, embedder, monkeypatch):
  monkeypatch.setattr("gcl_jax.retrieval.corpus._SAID", -1)
  said = []
  stages = embed(tmp_path / "index", pairs, embedder, "each", progress=said.append)
  assert [done.records for done in said] == [*range(1, 61), 60]
  assert {done.total for done in said} == {60} and said[-1].bad == 4
  assert list(stages) == list(STAGES)
  counts = {name: stage.items for name, stage in stages.items()}
  assert (counts["read"], counts["decode"], counts["tokenise"]) == (60, 52, 53)
  assert 0 < counts["model"] < 148  # all but the batches that compiled
  assert all(stage.rate > 0 for stage in stages.values())


def test_half_precision(tmp_path, pairs, embedder):
  embed(tmp_path / "half", pairs, embedder, dtype="float16")
  embed(tmp_path / "single", pairs, embedder)
  half, single = read_index(tmp_path / "half"), read_index(tmp_path / "single")
  np.testing.assert_array_equal(half.vectors[:], single.vectors[:].astype(np.float16))


def test_vectors_that_are_not_finite(tmp_path, pairs, processor):
  broken = {**PARAMS, "text": np.full((4, 4), np.nan, np.float32)}
  other = Embedder(Small(), broken, processor, batch_size=8)
  with pytest.raises(UserError, match="output in shard 0: row 0 is not finite"):
    embed(tmp_path / "index", pairs, other)


def test_an_index_of_another_model(tmp_path, pairs, embedder, processor):
  embed(tmp_path / "index", pairs, embedder)
  index = read_index(tmp_path / "index")
  index.check_model(embedder)
  index.check_model(Embedder(Small(), PARAMS, processor, batch_size=3))
  turned = {**PARAMS, "text": PARAMS["text"] * -1}
  raised = FusionSettings(text_weight=2.0)
  larger = Processor(
    ImageProcessor(shortest_edge=20, crop_size=16), processor.tokenizer
  )
  for other, what in (
    (embedder.with_params(turned), "weights"),
    (Embedder(Small(raised), PARAMS, processor), "fusion"),
    (Embedder(Small(), PARAMS, larger), "processor"),
  ):
    with pytest.raises(UserError, match=rf"another model .*what differs: {what}\)"):
      index.check_model(other)


def test_modes_that_there_are():
  check_mode("each")
  with pytest.raises(UserError, match="--modality=video is none of both, image"):
    check_mode("video")
