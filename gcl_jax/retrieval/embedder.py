"""Images, texts and documents with both, to unit embeddings, over all local devices."""

from __future__ import annotations

import collections
import copy
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from gcl_jax.errors import UserError
from gcl_jax.fusion import NORM_FLOOR, fuse
from gcl_jax.models import VistaConfig
from gcl_jax.processes import Largest
from gcl_jax.processing import ImageError, ImageProcessor, Processor
from gcl_jax.sharding import (
  batch_devices,
  batch_share,
  make_mesh,
  put_batch,
  replicated,
  spans_processes,
)

if TYPE_CHECKING:
  from gcl_jax.models import Model

# Token lengths that are compiled, beside the full one. Cutting padding is exact: a text
# tower is causal and pools at the end token, or does not look at padding.
_LENGTHS = (16, 32, 128, 512, 1024, 2048, 4096)
_WHOLE = 512  # the longest texts of which a batch is full
_LARGEST_ID = 2  # this end token in a config means: pool at the largest id
_WINDOW = 16  # batches of texts that are sorted by length together
_IN_FLIGHT = 2  # batches on the devices while the next one is decoded

ImageSource = bytes | str | os.PathLike | Image.Image
Progress = Callable[[int, int], None]


class Embedder:
  """A model with its weights and processor, as a function from documents to vectors.

  Attributes:
    model, params, processor: what it embeds with; `params` lie on the mesh.
    config: the run's config or, of a Hugging Face folder, the model's.
    mesh: the devices that share a batch.
  """

  def __init__(
    self,
    model: Model,
    params: Any,
    processor: Processor,
    *,
    mesh: Mesh | None = None,
    batch_size: int = 64,
    config: Any = None,
    threads: int | None = None,
  ):
    """Checks that the parts fit and places the parameters; compiles nothing yet.

    Args:
      model: from `models.build`.
      params: its parameters; NumPy or JAX arrays. Those that already lie on the mesh
        stay as they are, sharded or not.
      processor: the model's.
      mesh: by default one of all local devices.
      batch_size: the most documents at once, over all devices; fewer whose texts are
        beyond 512 tokens, see `most_rows`.
      config: kept as `.config`; by default the model's.
      threads: that decode images; by default one per core, at most 16.

    Raises:
      UserError: the processor is not of this model.
    """
    _check_fit(model, processor)
    self.model, self.processor = model, processor
    self.config = model.config if config is None else config
    self.mesh = make_mesh(devices=jax.local_devices()) if mesh is None else mesh
    self._sizes = _batch_sizes(max(batch_size, 1), batch_devices(self.mesh))
    self._threads = threads or min(16, os.cpu_count() or 1)
    self._failures, self._shared = (
      Largest("unreadable images"),
      spans_processes(self.mesh),
    )
    self._functions = _functions(model, processor.image, self.mesh)
    longest, shape = processor.tokenizer.max_length, model.config
    self._longest = {
      "text": min(longest, shape.text.context),
      "both": min(longest, shape.pair_context),
    }
    self.params = _placed(params, self.mesh)

  def with_params(self, params: Any) -> Embedder:
    """The same model with other weights. Shares what is compiled; costs nothing."""
    other = copy.copy(self)
    other.params = _placed(params, self.mesh)
    return other

  def embed(
    self,
    images: Sequence[ImageSource | None] | None = None,
    texts: Sequence[str | None] | None = None,
    *,
    normalize: bool = True,
    progress: Progress | None = None,
  ) -> np.ndarray:
    """Unit embeddings, float32 (N, D), in the order of the documents.

    A document with an image and a text is fused as the model's settings say
    (`gcl_jax.fusion`); one with a single modality is that modality's embedding. Rows
    do not depend on the batch size or on their neighbours (to about 1e-6). A row is
    zero where the model's own output is.

    Args:
      images: encoded bytes, paths or PIL images, None where a document has none; the
        whole argument None where no document has one. They are decoded batch by batch.
      texts: the same for texts; what is too long is cut, its end token kept.
      normalize: False gives the projected vectors at the length that the model gives
        them; then every document has one modality, since fusion is between units.
      progress: called with (documents done, N) after every batch.

    Raises:
      UserError: the lists do not fit, document k has neither image nor text, or its
        image cannot be read; the message names k.
      ValueError: a document with both is not to be normalised.

    Across processes (a mesh that spans them) every process must call this with the
    same documents, and gets all rows.
    """
    documents = _documents(images, texts)
    out = np.zeros((len(documents), self.model.config.projection_dim), np.float32)
    waiting: collections.deque[tuple[list[int], jax.Array]] = collections.deque()
    done = 0

    def collect(left: int) -> None:
      nonlocal done
      while len(waiting) > left:
        rows, vectors = waiting.popleft()
        out[rows] = np.asarray(vectors)[: len(rows)]
        done += len(rows)
        if progress is not None:
          progress(done, len(documents))

    with ThreadPoolExecutor(self._threads) as pool:
      for batch in self._batches(documents):
        if not normalize:
          batch = batch._replace(output=_projected(batch.kind))
        waiting.append((batch.rows, self._run(batch, documents, pool)))
        collect(left=_IN_FLIGHT)
      collect(left=0)
    return out

  @property
  def fuses_by_itself(self) -> bool:
    """Whether an image with a text is a pass of the model's own, and no sum of two."""
    return isinstance(self.model.config, VistaConfig)

  @property
  def batch_size(self) -> int:
    """The most documents at once, over all devices."""
    return self._sizes[-1]

  def most_rows(self, length: int) -> int:
    """The most documents at once whose texts have so many tokens; 0 is no text.

    Attention's memory grows as the square of the length: what a full batch of 512 tokens
    needs is what a batch of more tokens may need, but for one document a device.
    """
    room = self.batch_size * _WHOLE**2 // max(length, _WHOLE) ** 2
    return max(size for size in self._sizes if size <= max(room, self._sizes[0]))

  def split(self, lengths: Sequence[int]) -> Iterator[slice]:
    """Batches of documents that stand in the ascending order of their texts' lengths.

    Args:
      lengths: tokens, as `tokens` has them.
    """
    start = 0
    while start < len(lengths):
      fits = (
        count
        for count in range(min(self.batch_size, len(lengths) - start), 1, -1)
        if count <= self.most_rows(lengths[start + count - 1])
      )
      count = next(fits, 1)
      yield slice(start, start + count)
      start += count

  @property
  def threads(self) -> int:
    """That decode images."""
    return self._threads

  def tokens(self, text: str, *, beside_image: bool = False) -> np.ndarray:
    """One text as `start` takes it: int32 (L,), L one of few lengths."""
    tokenizer = self.processor.tokenizer
    longest = self._longest["both" if beside_image else "text"]
    ids = tokenizer([text], length=longest)
    return ids[0, : _bucket(int(_lengths(ids, tokenizer.pad_id)[0]), longest)]

  def start(
    self, pixels: np.ndarray | None = None, tokens: np.ndarray | None = None
  ) -> jax.Array:
    """Starts a batch of prepared documents of one kind, and does not wait for it.

    Args:
      pixels: uint8 (n, S, S, 3), of `processor.image.pixels`; None: texts alone.
      tokens: int32 (n, L), of `tokens`; None: images alone. n is at most
        `most_rows(L)`.

    Returns:
      (most_rows(L), D) float32 unit rows, of which the first n count.
    """
    size = self.most_rows(0 if tokens is None else tokens.shape[1])
    kind = "text" if pixels is None else "image" if tokens is None else "both"
    mine = batch_share(self.mesh).rows(size)
    given = {"pixels": pixels, "tokens": tokens}
    inputs = {
      name: _padded(rows, size)[mine]
      for name, rows in given.items()
      if rows is not None
    }
    return self._functions[kind](self.params, *put_batch(self.mesh, inputs).values())

  def _batches(self, documents: list[_Document]) -> Iterator[_Batch]:
    """Documents of one kind at a time, so that no tower runs on padding alone."""
    kinds: dict[str, list[int]] = {"image": [], "text": [], "both": []}
    for k, (image, text) in enumerate(documents):
      kinds["text" if image is None else "image" if text is None else "both"].append(k)
    size = self._sizes[-1]
    for kind, rows in kinds.items():
      window = size if kind == "image" else size * _WINDOW
      for first in range(0, len(rows), window):
        part = rows[first : first + window]
        if kind == "image":
          yield _Batch(kind, part, None)
          continue
        tokens = self.processor.tokenizer(
          [documents[k].text for k in part], length=self._longest[kind]
        )
        lengths = _lengths(tokens, self.processor.tokenizer.pad_id)
        order = np.argsort(lengths, kind="stable")
        widths = [_bucket(int(n), self._longest[kind]) for n in lengths[order]]
        for rows_of_batch in self.split(widths):
          chosen, width = order[rows_of_batch], max(widths[rows_of_batch])
          yield _Batch(kind, [part[k] for k in chosen], tokens[chosen, :width])

  def _run(
    self, batch: _Batch, documents: list[_Document], pool: ThreadPoolExecutor
  ) -> jax.Array:
    """Decodes, pads, sends and starts one batch; does not wait for it.

    A process decodes the rows of its own devices. Of an image that one of them cannot
    read all of them hear, or the others would wait for it for ever.
    """
    size = next(size for size in self._sizes if size >= len(batch.rows))
    mine = batch_share(self.mesh).rows(size)
    inputs = {}
    if batch.kind != "text":
      decode = functools.partial(_pixels, self.processor.image, documents)
      rows = _padded(np.array(batch.rows), size)[mine]
      inputs["pixels"] = self._together(lambda: list(pool.map(decode, rows)))
    if batch.tokens is not None:
      inputs["tokens"] = _padded(batch.tokens, size)[mine]
    sent = put_batch(self.mesh, inputs)
    return self._functions[batch.output or batch.kind](self.params, *sent.values())

  def _together(self, decode: Callable[[], list[np.ndarray]]) -> np.ndarray:
    """Decodes; raises on every process where it fails on one."""
    failure, pixels = None, []
    try:
      pixels = decode()
    except Exception as error:
      failure = error
    if self._shared and self._failures(int(failure is not None)) and failure is None:
      failure = UserError("another process could not read an image of this batch.")
    if failure is not None:
      raise failure
    return np.stack(pixels)


class _Document(NamedTuple):
  image: ImageSource | None
  text: str | None


class _Batch(NamedTuple):
  kind: str  # "image", "text" or "both"
  rows: list[int]  # positions among the documents
  tokens: np.ndarray | None  # (len(rows), L) int32
  output: str = ""  # the function's name where it is not the kind


@functools.lru_cache(maxsize=16)
def _functions(model: Model, image: ImageProcessor, mesh: Mesh) -> dict[str, Callable]:
  """One compiled function per kind of document: (params, inputs) -> (B, D) unit rows,
  and two more for projected vectors as they are.

  Cached, so that embedders of one model share what is compiled. The result is gathered
  to every device: one all-gather of (B, D).
  """

  def project_image(params, pixels):
    rows = model.bind(params).embed_image(image.normalize(pixels))
    return rows.astype(jnp.float32)

  def project_text(params, tokens):
    return model.bind(params).embed_text(tokens).astype(jnp.float32)

  def embed_image(params, pixels):
    return _unit(project_image(params, pixels))

  def embed_text(params, tokens):
    return _unit(project_text(params, tokens))

  def embed_both(params, pixels, tokens):
    return fuse(*model.bind(params).embed_pair(image.normalize(pixels), tokens))

  compiled = functools.partial(jax.jit, out_shardings=replicated(mesh))
  return {
    "image": compiled(embed_image),
    "text": compiled(embed_text),
    "both": compiled(embed_both),
    _projected("image"): compiled(project_image),
    _projected("text"): compiled(project_text),
  }


def _projected(kind: str) -> str:
  if kind == "both":
    raise ValueError("a document with both is fused from unit vectors: normalize=True")
  return f"projected {kind}"


def _unit(rows: jax.Array) -> jax.Array:
  """Rows of length 1, the floor as in `score_fusion`."""
  norm = jnp.sqrt(jnp.sum(rows * rows, axis=-1, keepdims=True))
  return rows / jnp.maximum(norm, NORM_FLOOR)


def _check_fit(model: Model, processor: Processor) -> None:
  size, wanted = processor.image.image_size, model.config.vision.image_size
  if size != wanted:
    raise UserError(
      f"the processor makes images of {size} pixels, the model wants {wanted}: use the "
      "processor files of this model."
    )
  entries, known = processor.tokenizer.vocab_size, model.config.text.vocab_size
  if entries > known:
    raise UserError(
      f"the tokenizer has {entries} entries, the model knows {known}: use the "
      "tokenizer files of this model."
    )
  end, wanted = processor.tokenizer.eos_id, model.config.text.eos_id
  if end != wanted and wanted != _LARGEST_ID:
    # The text tower would find no end and pool at the start token: all texts alike.
    raise UserError(
      f"the tokenizer's end token is {end}, the model's {wanted}: use the tokenizer "
      "files of this model."
    )


def _documents(
  images: Sequence[ImageSource | None] | None, texts: Sequence[str | None] | None
) -> list[_Document]:
  """Both lists side by side, or the UserError that says what is wrong with them."""
  if isinstance(images, (str, bytes, os.PathLike, Image.Image)):
    raise UserError("images is a single image: give a list, [image].")
  if isinstance(texts, str):
    raise UserError("texts is a single text: give a list, [text].")
  if images is None and texts is None:
    raise UserError("nothing to embed: give images, texts or both.")
  images = [None] * len(texts) if images is None else list(images)
  texts = [None] * len(images) if texts is None else list(texts)
  if len(images) != len(texts):
    raise UserError(
      f"{len(images)} images but {len(texts)} texts: give one entry per document, None "
      "where it has none."
    )
  for k, (image, text) in enumerate(zip(images, texts, strict=True)):
    if image is None and text is None:
      raise UserError(
        f"document {k} has neither image nor text: leave it out of both lists."
      )
    if text is not None and not isinstance(text, str):
      raise UserError(f"texts[{k}] is a {type(text).__name__}: give a str or None.")
  return list(map(_Document, images, texts))


def _pixels(
  processor: ImageProcessor, documents: list[_Document], k: int
) -> np.ndarray:
  try:
    return processor.pixels(documents[k].image)
  except ImageError as error:
    raise UserError(
      f"images[{k}] cannot be read: {error}. Replace the picture, or leave it out "
      "(None where the document has a text)."
    ) from error


def _batch_sizes(batch_size: int, devices: int) -> tuple[int, ...]:
  """Multiples of the devices by powers of two, up to the batch size (rounded up)."""
  largest = -(-batch_size // devices)
  powers = [2**k for k in range(largest.bit_length()) if 2**k < largest]
  return tuple(count * devices for count in [*powers, largest])


def _bucket(length: int, longest: int) -> int:
  fitting = [b for b in _LENGTHS if length <= b < longest]
  return fitting[0] if fitting else longest


def _lengths(tokens: np.ndarray, pad_id: int) -> np.ndarray:
  """(B,) how many columns hold more than padding, the end token included.

  One more than the last entry that is not padding, since the end token may be what
  pads.
  """
  width = tokens.shape[1]
  last = width - 1 - np.argmax((tokens != pad_id)[:, ::-1], axis=1)
  return np.minimum(last + 2, width)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
  """(B, ...) to (size, ...) by repeating the last row, whose results are dropped."""
  missing = size - len(rows)
  return np.concatenate([rows, rows[-1:].repeat(missing, axis=0)]) if missing else rows


def _placed(params: Any, mesh: Mesh) -> Any:
  """Every array on the mesh: left alone if it lies there already, else replicated."""
  devices = set(mesh.devices.flat)

  def place(leaf):
    if isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices:
      return leaf
    return jax.device_put(leaf, replicated(mesh))

  return jax.tree.map(place, params)
