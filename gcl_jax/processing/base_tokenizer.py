"""What the tokenizers have in common: texts to rows of ids, and how many were cut."""

from __future__ import annotations

import collections
import copy
import re
from collections.abc import Sequence
from typing import Self

import numpy as np
import tokenizers

_SURROGATE = re.compile("[\ud800-\udfff]")


class BaseTokenizer:
  """Texts to ids: start token, pieces, end token, padding on the right.

  Pickles and copies (data workers get their own). Safe to call from several threads.

  Attributes:
    bos_id, eos_id, pad_id: of the start token, the end token and padding.
    max_length: the longest text, start and end included.
    vocab_size: rows that an embedding table needs; more than the count of entries where
      ids have gaps.
  """

  def __init__(
    self, backend: tokenizers.Tokenizer, bos: str, eos: str, pad: str, max_length: int
  ):
    """Takes a backend whose post-processor adds `bos` and `eos`."""
    if max_length < 2:
      raise ValueError(f"max_length {max_length} has no room for start and end token")
    backend.no_padding()
    backend.no_truncation()
    self._backend = backend
    self._cut: collections.deque[int] = collections.deque()  # appends are atomic
    self.bos_id: int = backend.token_to_id(bos)
    self.eos_id: int = backend.token_to_id(eos)
    self.pad_id: int = backend.token_to_id(pad)
    self.max_length = max_length
    self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

  @property
  def texts_cut(self) -> int:
    """How many texts of all calls were longer than what was asked for."""
    return sum(list(self._cut))

  def __call__(self, texts: Sequence[str], length: int | None = None) -> np.ndarray:
    """int32 (B, length or max_length); a text that is too long keeps its end token."""
    return self.rows(texts, length)[0]

  def rows(
    self, texts: Sequence[str], length: int | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """What a call gives, and (B,) bool, which of the texts were cut."""
    if isinstance(texts, str):
      raise TypeError("texts is one str; give a list of texts")
    width = self.max_length if length is None else length
    if not 2 <= width <= self.max_length:
      raise ValueError(f"length {width} is not within 2..{self.max_length}")
    out = np.full((len(texts), width), self.pad_id, np.int32)
    encoded = self._backend.encode_batch_fast([whole(text) for text in texts])
    cut = np.array([len(encoding.ids) > width for encoding in encoded], bool)
    for row, encoding in zip(out, encoded, strict=True):
      row[: len(encoding.ids)] = encoding.ids[:width]
    out[cut, -1] = self.eos_id
    if cut.any():
      self._cut.append(int(cut.sum()))
    return out, cut

  def encode(self, text: str) -> list[int]:
    """The ids of one text, start and end included, at most `max_length`, unpadded."""
    ids = self._backend.encode(whole(text)).ids
    most = self.max_length
    return ids if len(ids) <= most else [*ids[: most - 1], self.eos_id]

  def cut_to(self, max_length: int) -> Self:
    """The same, for texts of at most so many tokens."""
    shorter = copy.deepcopy(self)
    shorter.max_length = max_length
    shorter._cut.clear()
    return shorter


def whole(text: str) -> str:
  """A text with lone surrogates replaced (Rust strings cannot hold them)."""
  if not isinstance(text, str):
    raise TypeError(f"a text must be a str, not {type(text).__name__}")
  if text.isascii() or not _SURROGATE.search(text):
    return text
  # By way of UTF-16, two halves that belong together become their character.
  return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
