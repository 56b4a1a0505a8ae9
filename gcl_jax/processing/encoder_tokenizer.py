"""WordPiece and SentencePiece tokenizers of text encoders (BERT, XLM-RoBERTa).

The ids of transformers' fast tokenizers. `tokenizer.json` is read by the `tokenizers`
library alone; a folder without one (`vocab.txt`, `sentencepiece.bpe.model`) is converted
by transformers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from gcl_jax.errors import UserError
from gcl_jax.processing.base_tokenizer import BaseTokenizer

MAX_LENGTH = 512
_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_SENTENCEPIECE = "sentencepiece.bpe.model"
_CONVERTED = ("vocab.txt", _SENTENCEPIECE)
_NAMES = ("cls_token", "sep_token", "pad_token")
# By the kind of model that tokenizer.json holds: transformers' class, start, end, padding.
_KINDS = {
  "WordPiece": ("BertTokenizer", ("[CLS]", "[SEP]", "[PAD]")),
  "Unigram": ("XLMRobertaTokenizer", ("<s>", "</s>", "<pad>")),
}
_MEND = (
  "Copy the tokenizer files of the text encoder there: tokenizer.json, or vocab.txt or "
  "sentencepiece.bpe.model."
)


class EncoderTokenizer(BaseTokenizer):
  """A text encoder's: its start token is [CLS], its end token [SEP]."""

  processor_class = None  # no processor of transformers' is of these

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    *,
    names: Mapping[str, str],
    max_length: int = MAX_LENGTH,
    settings: Mapping[str, Any] | None = None,
    sentencepiece: bytes = b"",
  ):
    """Takes a backend whose post-processor adds [CLS] and [SEP].

    Args:
      names: `cls_token`, `sep_token` and `pad_token` as the vocabulary spells them.
      max_length: see above.
      settings: of tokenizer_config.json, to be saved again.
      sentencepiece: the model file that `backend` came from, to be saved again.

    Raises:
      ValueError: the names are not in the vocabulary, or are not added.
    """
    ids = [backend.token_to_id(names[name]) for name in _NAMES]
    if None in ids:
      raise ValueError(f"the vocabulary lacks one of {', '.join(names.values())}")
    super().__init__(backend, *(names[name] for name in _NAMES), max_length)
    if backend.encode("").ids != ids[:2]:
      raise ValueError(f"it does not put {names['cls_token']} and {names['sep_token']}")
    self._names, self._settings = dict(names), dict(settings or {})
    self._sentencepiece = sentencepiece

  def reads_like(self, other: Any) -> bool:
    """Whether both give every text the same ids, but for length and padding."""
    same = isinstance(other, EncoderTokenizer)
    return same and self._backend.to_str() == other._backend.to_str()

  def lengths(self, tokens: np.ndarray) -> np.ndarray:
    """Of rows (B, L), the tokens of each: up to its last [SEP]; a text may spell one."""
    ends = (tokens == self.eos_id)[:, ::-1]
    return tokens.shape[1] - ends.argmax(axis=1)

  @classmethod
  def from_folder(cls, folder: str | os.PathLike) -> EncoderTokenizer:
    """Reads the tokenizer of a text encoder's folder.

    Without a `model_max_length`, 512.

    Raises:
      UserError: files are missing or broken, or are of another kind.
    """
    folder = Path(folder)
    try:
      backend = _backend(folder)
      kind = json.loads(backend.to_str())["model"]["type"]
      if kind not in _KINDS:
        raise ValueError(f"a vocabulary of {kind} (known: {', '.join(_KINDS)})")
      settings = _json(folder / _SETTINGS)
      given = _json(folder / "special_tokens_map.json") | settings
      class_name, defaults = _KINDS[kind]
      names = {
        name: _spelling(given.get(name) or default)
        for name, default in zip(_NAMES, defaults, strict=True)
      }
      length = settings.get("model_max_length", MAX_LENGTH)
      sentencepiece = folder / _SENTENCEPIECE
      return cls(
        backend,
        names=names,
        # transformers writes 1e30 where there is no limit.
        max_length=int(length) if length < 1e6 else MAX_LENGTH,
        settings={"tokenizer_class": class_name} | settings,
        sentencepiece=sentencepiece.read_bytes() if sentencepiece.is_file() else b"",
      )
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
      raise UserError(
        f"the tokenizer files in {folder} are not understood: {error}. {_MEND}"
      ) from error

  def save(self, folder: str | os.PathLike) -> None:
    """Writes the files that `transformers.AutoTokenizer` loads to the same ids."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    self._backend.save(str(folder / _FILE))
    if isinstance(self._backend.model, tokenizers.models.WordPiece):
      self._backend.model.save(str(folder))  # vocab.txt, for older readers
    if self._sentencepiece:
      (folder / _SENTENCEPIECE).write_bytes(self._sentencepiece)
    settings = self._settings | {"model_max_length": self.max_length, **self._names}
    for name, content in (
      (_SETTINGS, settings),
      ("special_tokens_map.json", self._names),
    ):
      text = json.dumps(content, indent=2, ensure_ascii=False)
      (folder / name).write_text(text + "\n", encoding="utf-8")


def is_encoder_tokenizer(folder: str | os.PathLike) -> bool:
  """Whether a folder's tokenizer is of a text encoder, and no CLIP's."""
  folder = Path(folder)
  if (folder / _FILE).is_file():
    try:
      return _json(folder / _FILE)["model"]["type"] in _KINDS
    except (OSError, ValueError, KeyError, TypeError):
      return False  # the reader of the other kind says what is wrong with it
  return any((folder / name).is_file() for name in _CONVERTED)


def _backend(folder: Path) -> tokenizers.Tokenizer:
  if (folder / _FILE).is_file():
    try:
      return tokenizers.Tokenizer.from_file(str(folder / _FILE))
    except Exception as error:  # the library raises bare Exception
      raise ValueError(f"{_FILE}: {error}") from error
  # Where none of them is, transformers makes up an empty vocabulary.
  if not any((folder / name).is_file() for name in _CONVERTED):
    raise ValueError(f"there is no {_FILE}, {' or '.join(_CONVERTED)}")
  try:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
  except Exception as error:  # whatever a converter of another package raises
    raise ValueError(str(error).partition("\n")[0]) from error


def _spelling(value: str | Mapping[str, Any]) -> str:
  return value if isinstance(value, str) else value["content"]


def _json(path: Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  content = json.loads(path.read_text(encoding="utf-8"))
  if not isinstance(content, dict):
    raise ValueError(f"{path.name} does not hold a JSON object")
  return content
