"""Text encoders' tokenizers against transformers', and what is done to long texts."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers

from gcl_jax.errors import UserError
from gcl_jax.processing import EncoderTokenizer, ImageProcessor, Processor, Tokenizer

TEXTS = [
  "",
  "  \n ",
  "A dog runs.",
  "a man, a cat; RED-dog!",
  "[SEP] a [PAD] dog [CLS]",
  "café Ünïcode 中文 😀",
  "dogs running x" * 20,
  "\ud83d alone",
]
_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "runs", "##s", "cat", "red"]
_WORDS += ["man", ".", ",", "cafe", "中", "##x", "x", "running"]


def _write_wordpiece(folder):
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordPiece({w: i for i, w in enumerate(_WORDS)}, unk_token="[UNK]")
  )
  backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  backend.decoder = tokenizers.decoders.WordPiece()
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B [SEP]",
    special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
  )
  backend.add_special_tokens(_WORDS[:4])
  # As published folders have it: the reader must undo both.
  backend.enable_padding(length=16)
  backend.enable_truncation(16)
  backend.save(str(folder / "tokenizer.json"))
  settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_unigram(folder):
  pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
  words = [
    "▁a",
    "▁dog",
    "▁run",
    "s",
    "▁",
    "d",
    "o",
    "g",
    "r",
    "e",
    "中",
    "文",
    "x",
    ".",
  ]
  pieces += [(word, -float(i + 1)) for i, word in enumerate(words)]
  backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=3))
  backend.normalizer = tokenizers.normalizers.NFKC()
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  backend.decoder = tokenizers.decoders.Metaspace()
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A </s>",
    pair="<s> $A </s> </s> $B </s>",
    special_tokens=[("<s>", 0), ("</s>", 2)],
  )
  backend.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
  backend.save(str(folder / "tokenizer.json"))
  settings = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 1e30}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))


WRITERS = {"wordpiece": _write_wordpiece, "unigram": _write_unigram}
IDS = {"wordpiece": (2, 3, 0), "unigram": (0, 2, 1)}


@pytest.mark.parametrize("kind", WRITERS)
def test_ids_are_transformers_and_stay_so_when_saved(kind, tmp_path):
  import transformers

  WRITERS[kind](tmp_path)
  ours = EncoderTokenizer.from_folder(tmp_path)
  assert (ours.bos_id, ours.eos_id, ours.pad_id) == IDS[kind]
  assert ours.max_length == 512
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(tmp_path / "tokenizer.json")
  )
  texts = TEXTS[:-1]
  want = [theirs(text).input_ids for text in texts]
  assert [ours.encode(text) for text in texts] == want
  ours.save(tmp_path / "saved")
  again = EncoderTokenizer.from_folder(tmp_path / "saved")
  np.testing.assert_array_equal(again(TEXTS, 128), ours(TEXTS, 128))
  auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
  assert [auto(text).input_ids for text in texts[2:4]] == want[2:4]


def test_a_folder_of_a_vocabulary_alone_is_converted(tmp_path):
  (tmp_path / "vocab.txt").write_text("\n".join(_WORDS))
  (tmp_path / "tokenizer_config.json").write_text(
    '{"tokenizer_class": "BertTokenizer"}'
  )
  tokenizer = EncoderTokenizer.from_folder(tmp_path)
  assert tokenizer.encode("A dog runs.") == [2, 4, 5, 6, 11, 3]


def test_long_texts_keep_their_sep_and_are_counted(tmp_path):
  _write_wordpiece(tmp_path)
  tokenizer = EncoderTokenizer.from_folder(tmp_path)
  long = "a dog " * 600
  rows = tokenizer([long, "a dog", "a dog a dog a dog"], 8)
  assert rows.shape == (3, 8) and rows.dtype == np.int32
  assert rows[0, -1] == rows[2, -1] == tokenizer.eos_id
  assert list(rows[1]) == [2, 4, 5, 3, 0, 0, 0, 0]
  assert list(tokenizer.lengths(rows)) == [8, 4, 8]
  assert tokenizer.texts_cut == 1  # the third fits
  assert len(tokenizer.encode(long)) == 512 and tokenizer.encode(long)[-1] == 3
  with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda _: tokenizer([long], 4), range(200)))
  assert tokenizer.texts_cut == 201
  copy = pickle.loads(pickle.dumps(tokenizer))
  np.testing.assert_array_equal(copy([long], 8), tokenizer([long], 8))


def test_a_sep_within_a_text_does_not_end_it(tmp_path):
  _write_wordpiece(tmp_path)
  tokenizer = EncoderTokenizer.from_folder(tmp_path)
  rows = tokenizer(["a [SEP] dog", ""], 12)
  assert list(tokenizer.lengths(rows)) == [5, 2]


def _without_cls(content):
  content["model"]["vocab"].pop("[CLS]")
  content["post_processor"] = None
  added = content["added_tokens"]
  content["added_tokens"] = [token for token in added if token["content"] != "[CLS]"]


@pytest.mark.parametrize(
  ("change", "what"),
  [
    (lambda c: c.update(post_processor=None), r"does not put \[CLS\] and \[SEP\]"),
    (_without_cls, r"the vocabulary lacks one of \[CLS\], \[SEP\], \[PAD\]"),
    (
      lambda c: c["model"].update(type="WordLevel"),
      r"a vocabulary of WordLevel \(known: WordPiece, Unigram\)",
    ),
  ],
)
def test_other_tokenizers_are_refused(change, what, tmp_path):
  _write_wordpiece(tmp_path)
  content = json.loads((tmp_path / "tokenizer.json").read_text())
  change(content)
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  with pytest.raises(UserError, match=what) as error:
    EncoderTokenizer.from_folder(tmp_path)
  assert str(tmp_path) in str(error.value)


def test_a_vistas_processor_is_found_and_saved(tmp_path):
  _write_wordpiece(tmp_path)
  processor = Processor.from_folder(tmp_path)
  assert isinstance(processor.tokenizer, EncoderTokenizer)
  assert processor.image == ImageProcessor(round_crop=True)
  processor.save(tmp_path / "saved")
  again = Processor.from_folder(tmp_path / "saved")
  assert again.image == processor.image
  settings = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
  assert "processor_class" not in settings and settings["round_crop"] is True


def test_the_centre_is_torchvisions():
  from PIL import Image

  image = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (224, 227, 3), np.uint8)
  )
  rounds = ImageProcessor(round_crop=True).pixels(image)
  np.testing.assert_array_equal(rounds, np.asarray(image)[:, 2:226])  # 1.5 -> 2
  floors = ImageProcessor().pixels(image)
  np.testing.assert_array_equal(floors, np.asarray(image)[:, 1:225])
  image = image.crop((0, 0, 225, 224))  # 0.5 -> 0
  np.testing.assert_array_equal(
    ImageProcessor(round_crop=True).pixels(image), np.asarray(image)[:, :224]
  )


def test_clips_tokenizer_counts_to_its_first_end_token():
  tokenizer = Tokenizer.train(["a dog"], 514)
  rows = tokenizer(["a dog", ""], 12)
  assert list(tokenizer.lengths(rows)) == [len(tokenizer.encode("a dog")), 2]
