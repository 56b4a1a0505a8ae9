"""CLIP's byte-level BPE: the ids of `CLIPTokenizer`, without importing transformers.

transformers 5 keeps vocabulary, merges and special tokens of a folder and builds the
rest (normaliser, splitting, start and end token) from its class. So does this file, on
the `tokenizers` library, which saves two and a half seconds of import.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers.processors import RobertaProcessing

from gcl_jax.errors import UserError
from gcl_jax.processing.base_tokenizer import BaseTokenizer, whole

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77
_CLIP_ENTRIES = 49408

_PATTERN = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
  r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
# In transformers' order, which is the order in which new tokens get their ids.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")
_NAMED += ("cls_token", "mask_token")
_DEFAULTS = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
_MEND = (
  "Copy the tokenizer files of the original model there (tokenizer.json, or vocab.json "
  "and merges.txt), or write them with CLIPTokenizer.save_pretrained."
)


class Tokenizer(BaseTokenizer):
  """CLIP's, or one of its form that was learned here."""

  processor_class = "CLIPProcessor"

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    *,
    bos: str = BOS,
    eos: str = EOS,
    pad: str = EOS,
    unk: str = EOS,
    max_length: int = MAX_LENGTH,
  ):
    """Takes a backend whose post-processor adds `bos` and `eos`; see `from_folder`."""
    super().__init__(backend, bos, eos, pad, max_length)
    self._names = {"bos_token": bos, "eos_token": eos, "unk_token": unk}
    self._names["pad_token"] = pad

  def reads_like(self, other: Tokenizer) -> bool:
    """Whether both give every text the same ids, but for length and padding."""
    return isinstance(other, Tokenizer) and self._spelling() == other._spelling()

  def _spelling(self) -> tuple[Any, ...]:
    parts = json.loads(self._backend.to_str())
    added = sorted((token["id"], token["content"]) for token in parts["added_tokens"])
    return parts["model"], added, self.bos_id, self.eos_id

  def lengths(self, tokens: np.ndarray) -> np.ndarray:
    """Of rows (B, L), the tokens of each: up to its first end token, which may pad."""
    return (tokens == self.eos_id).argmax(axis=1) + 1

  @classmethod
  def from_folder(cls, folder: str | os.PathLike) -> Tokenizer:
    """Reads what a Hugging Face CLIP folder holds.

    `tokenizer.json`, else `vocab.json` with `merges.txt`; `tokenizer_config.json`,
    `special_tokens_map.json` and `added_tokens.json` where they are. Without a
    `model_max_length`, 77.

    Raises:
      UserError: files are missing or broken, or are not those of a CLIP tokenizer.
    """
    folder = Path(folder)
    try:
      model, listed = _read_model(folder)
      config, added = _read_special_tokens(folder, listed)
      model.unk_token = config["unk_token"]
      backend = _pipeline(model)
      backend.add_tokens(added)
      _add_bos_eos(backend, config["bos_token"], config["eos_token"])
      length = config.get("model_max_length", MAX_LENGTH)
      return cls(
        backend,
        bos=config["bos_token"],
        eos=config["eos_token"],
        pad=config["pad_token"],
        unk=config["unk_token"],
        # transformers writes 1e30 where there is no limit.
        max_length=int(length) if length < 1e6 else MAX_LENGTH,
      )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise UserError(
        f"the tokenizer files in {folder} are not understood: {error}. {_MEND}"
      ) from error

  @classmethod
  def from_merges(cls, file: str | os.PathLike) -> Tokenizer:
    """Reads `bpe_simple_vocab_16e6.txt.gz`, as the packages for CLIP carry it.

    Raises:
      UserError: it is not that file.
    """
    symbols = _byte_symbols()
    symbols += [symbol + "</w>" for symbol in symbols]
    count = _CLIP_ENTRIES - len(symbols) - 2
    try:
      with gzip.open(file, "rt", encoding="utf-8") as lines:
        merges = [tuple(line.split()) for line in itertools.islice(lines, 1, 1 + count)]
    except (OSError, EOFError, ValueError, zlib.error) as error:
      raise UserError(f"{file} cannot be read as CLIP's merges: {error}.") from error
    if len(merges) != count or any(len(pair) != 2 for pair in merges):
      raise UserError(
        f"{file} is not CLIP's list of merges: name its bpe_simple_vocab_16e6.txt.gz."
      )
    names = [*symbols, *map("".join, merges), BOS, EOS]
    backend = _pipeline(_bpe({name: i for i, name in enumerate(names)}, merges))
    backend.add_tokens([AddedToken(t, special=True) for t in (BOS, EOS)])
    _add_bos_eos(backend, BOS, EOS)
    return cls(backend)

  @classmethod
  def train(
    cls, texts: Iterable[str], vocab_size: int, max_length: int = MAX_LENGTH
  ) -> Tokenizer:
    """Learns a BPE in CLIP's format; the same texts give the same one every time.

    Ids as in CLIP: 256 bytes, the same at a word's end, merges, start, end. So nothing
    is ever unknown and the end token has the highest id. A small corpus may give fewer
    than `vocab_size` entries.
    """
    if vocab_size < 514:
      raise ValueError(f"vocab_size {vocab_size} is under 514: all bytes, start, end")
    symbols = _byte_symbols()
    symbols += [symbol + "</w>" for symbol in symbols]
    backend = _pipeline(_bpe({}, []))
    # As special tokens the symbols get their ids up front: left to the trainer, those
    # with </w> would get theirs in the order of a hash map, and ties between merges,
    # which go by id, would fall differently in every process.
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size - 2,
      special_tokens=symbols,
      end_of_word_suffix="</w>",
      show_progress=False,
    )
    backend.train_from_iterator((whole(text) for text in texts), trainer)
    learned = json.loads(backend.to_str())["model"]
    vocab = dict(learned["vocab"])
    for token in (BOS, EOS):
      vocab[token] = len(vocab)
    backend = _pipeline(_bpe(vocab, [tuple(pair) for pair in learned["merges"]]))
    backend.add_tokens([AddedToken(t, special=True) for t in (BOS, EOS)])
    _add_bos_eos(backend, BOS, EOS)
    return cls(backend, max_length=max_length)

  def save(self, folder: str | os.PathLike) -> None:
    """Writes the files that `CLIPTokenizer.from_pretrained` loads to the same ids."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "tokenizer.json", json.loads(self._backend.to_str()), None)
    self._backend.model.save(str(folder))  # vocab.json, merges.txt, for older readers
    decoder = {
      str(index): {
        "content": token.content,
        "lstrip": token.lstrip,
        "normalized": token.normalized,
        "rstrip": token.rstrip,
        "single_word": token.single_word,
        "special": token.special,
      }
      for index, token in sorted(self._backend.get_added_tokens_decoder().items())
    }
    config = {
      "tokenizer_class": "CLIPTokenizer",
      "processor_class": "CLIPProcessor",
      "model_max_length": self.max_length,
      "do_lower_case": True,
      "errors": "replace",
      "clean_up_tokenization_spaces": False,
      **self._names,
      "added_tokens_decoder": decoder,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", self._names)


def _byte_symbols() -> list[str]:
  """The 256 letters of the byte alphabet, in CLIP's order."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [byte for byte in range(256) if byte not in printable]
  return [chr(b) for b in printable] + [chr(256 + n) for n in range(len(rest))]


def _bpe(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> models.BPE:
  return models.BPE(
    vocab=dict(vocab),
    merges=list(merges),
    continuing_subword_prefix="",
    end_of_word_suffix="</w>",
    fuse_unk=False,
    unk_token=EOS,
  )


def _pipeline(model: models.BPE) -> tokenizers.Tokenizer:
  """The parts that are the same for every CLIP tokenizer, as in `CLIPTokenizer`."""
  backend = tokenizers.Tokenizer(model)
  backend.normalizer = normalizers.Sequence(
    [
      normalizers.NFC(),
      normalizers.Replace(Regex(r"\s+"), " "),
      normalizers.Lowercase(),
    ]
  )
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  return backend


def _add_bos_eos(backend: tokenizers.Tokenizer, bos: str, eos: str) -> None:
  ends = (eos, backend.token_to_id(eos)), (bos, backend.token_to_id(bos))
  backend.post_processor = RobertaProcessing(
    *ends, trim_offsets=False, add_prefix_space=False
  )


def _read_model(folder: Path) -> tuple[models.BPE, list[dict[str, Any]]]:
  """The BPE model, and the added tokens that `tokenizer.json` lists."""
  whole, vocab, merges = (
    folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
  )
  if whole.is_file():
    content = _read_json(whole)
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != "</w>":
      raise ValueError("tokenizer.json does not hold CLIP's kind of byte-pair encoding")
    pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    return _bpe(model["vocab"], [tuple(p) for p in pairs]), content["added_tokens"]
  for path in (vocab, merges):
    if not path.is_file():
      raise UserError(
        f"no tokenizer in {folder}: neither tokenizer.json nor {path.name}. {_MEND}"
      )
  try:
    return _bpe(*models.BPE.read_file(str(vocab), str(merges))), []
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f"{vocab.name} or {merges.name}: {error}") from error


def _read_special_tokens(
  folder: Path, listed: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[AddedToken]]:
  """The settings, and the special tokens in the order in which they get their ids.

  Follows `PreTrainedTokenizerBase._from_pretrained`: `added_tokens_decoder` decides;
  older folders spread the same over three other files.
  """
  config = _read_json(folder / "tokenizer_config.json", optional=True)
  tokens: dict[int, AddedToken] = {}
  if "added_tokens_decoder" in config:
    tokens = {
      int(index): _token(value)
      for index, value in config["added_tokens_decoder"].items()
    }
  else:
    config |= _read_json(folder / "special_tokens_map.json", optional=True)
    named = {str(_token(config[k])) for k in _NAMED if config.get(k)}
    legacy = _read_json(folder / "added_tokens.json", optional=True)
    for content, index in legacy.items():
      special = content in named
      tokens[index] = AddedToken(content, special=special, normalized=not special)
    for entry in listed:
      tokens[entry["id"]] = _token(entry)
  for key, default in _DEFAULTS.items():
    if config.get(key) is None:
      config[key] = default
  known = {token.content: token for _, token in sorted(tokens.items())}
  extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
  extra = list(extra.values() if isinstance(extra, dict) else extra or [])
  for key in _NAMED:
    if config.get(key) is None:
      continue
    token = _token(config[key])
    known.setdefault(token.content, token)
    config[key] = token.content
  for token in map(_token, extra):
    known.setdefault(token.content, token)
  return config, list(known.values())


def _token(value: str | Mapping[str, Any]) -> AddedToken:
  if isinstance(value, str):
    return AddedToken(value, special=True)
  fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
  return AddedToken(**{key: value[key] for key in fields if key in value})


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
  if optional and not path.is_file():
    return {}
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read: {error}. {_MEND}") from error
  if not isinstance(content, dict):
    raise UserError(f"{path} does not hold a JSON object. {_MEND}")
  return content


def _write_json(path: Path, content: Any, indent: int | None = 2) -> None:
  text = json.dumps(content, indent=indent, ensure_ascii=False)
  path.write_text(text + "\n", encoding="utf-8")
