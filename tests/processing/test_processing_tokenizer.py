"""`Tokenizer` against transformers' `CLIPTokenizer`, golden ids, and training."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gcl_jax.errors import UserError
from gcl_jax.processing import Tokenizer

GOLDEN = {
  "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
  "": [49406, 49407],
  " \t\n ": [49406, 49407],
  "café naïve": [49406, 15304, 1097, 35689, 563, 49407],
  "😀 emoji 👨‍👩‍👧": [49406, 7334, 16327, 25023, 26304, 964, 356, 49407],
  "don't I'll we've it's": [49406, 847, 713, 328, 1342, 649, 1200, 585, 568, 49407],
  "3.14 2024": [49406, 274, 269, 272, 275, 273, 271, 273, 275, 49407],
  "中文测试": [49406, 19759, 255, 29032, 229, 162, 113, 233, 164, 107, 499, 49407],
  "wow ! nice!": [49406, 2781, 256, 1805, 256, 49407],
}
ODD = [
  *GOLDEN,
  "x" * 200,
  "word " * 500,
  "<|endoftext|> inside <|STARTOFTEXT|> and <|startoftext|>",
  "naïve cafe\u0301",
  "curly “quotes” & &amp; ﬁ ｆｕｌｌ",
  "\x00 nul \x1c fs \u00a0nbsp\u3000wide",
  "ТЕКСТ ὈΔΥΣΣΕΎΣ İstanbul ẞ",
  "!!! ... ?!?! --- 100% $5",
  "🇩🇪🏳️‍🌈 1️⃣",
]
CAPTIONS = [
  "a small red circle left of a large blue square",
  "three green triangles above one yellow star",
  "two large purple squares, and a tiny orange circle!",
] * 5


@pytest.fixture(scope="module")
def clip(real_data) -> Tokenizer:
  return Tokenizer.from_folder(real_data / "clip_tokenizer")


def reference(folder):
  from transformers import CLIPTokenizer

  return CLIPTokenizer.from_pretrained(folder)


def reference_ids(tokenizer, texts, length=77):
  return tokenizer(
    texts, padding="max_length", truncation=True, max_length=length, return_tensors="np"
  )["input_ids"]


@pytest.fixture
def folder(real_data, tmp_path):
  """A copy of the CLIP tokenizer's files, to be changed."""
  shutil.copytree(real_data / "clip_tokenizer", tmp_path / "clip")
  return tmp_path / "clip"


def change(path, **changes):
  content = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({k: v for k, v in content.items() if v != "drop"}))


def test_golden_ids(clip):
  for text, ids in GOLDEN.items():
    assert clip.encode(text) == ids, text
    assert clip([text], length=len(ids))[0].tolist() == ids
  assert len(clip.encode("x" * 200)) == 52
  assert (clip.bos_id, clip.eos_id, clip.pad_id) == (49406, 49407, 49407)
  assert (clip.vocab_size, clip.max_length) == (49408, 77)


def test_captions_are_transformers(clip, real_data):
  rows = (real_data / "flickr8k" / "captions.jsonl").read_text().splitlines()
  texts = [c for row in rows[::18] for c in json.loads(row)["captions"]][:2000]
  texts += ODD
  assert len(texts) > 2000
  want = reference_ids(reference(real_data / "clip_tokenizer"), texts)
  got = clip(texts)
  assert got.dtype == np.int32
  np.testing.assert_array_equal(got, want)
  for text, ids in zip(texts[-60:], got[-60:], strict=True):
    encoded = clip.encode(text)
    assert encoded == ids[: len(encoded)].tolist()


def test_lengths_truncate_but_keep_the_end(clip):
  texts, before = ["word " * 100, "a cat", ""], clip.texts_cut
  tokenizer_ids = clip(texts, length=16)
  assert tokenizer_ids.shape == (3, 16)
  assert tokenizer_ids[0, -1] == clip.eos_id
  assert clip.texts_cut == before + 1
  np.testing.assert_array_equal(tokenizer_ids[0, :15], clip(texts)[0, :15])
  assert (tokenizer_ids[1, 3:] == clip.eos_id).all()
  assert len(clip.encode("word " * 100)) == 77
  assert clip.encode("word " * 100)[-1] == clip.eos_id
  assert clip([]).shape == (0, 77)
  for length in (1, 78):
    with pytest.raises(ValueError, match="length"):
      clip(texts, length=length)
  with pytest.raises(TypeError, match="list"):
    clip("a cat")
  with pytest.raises(TypeError, match="NoneType"):
    clip([None])


def test_surrogates_are_replaced(clip):
  assert clip.encode("a \ud800 cat") == clip.encode("a \ufffd cat")
  assert clip.encode("\ud83d\ude00") == clip.encode("😀")
  clip(["\udfff", "ok"])


def test_an_exclamation_mark_as_padding(folder):
  decoder = json.loads((folder / "tokenizer_config.json").read_text())
  decoder = decoder["added_tokens_decoder"]
  decoder["0"] = decoder["49407"] | {"content": "!"}
  config = folder / "tokenizer_config.json"
  change(config, pad_token="!", added_tokens_decoder=decoder)
  ours = Tokenizer.from_folder(folder)
  assert ours.encode("wow ! nice!") == [49406, 2781, 0, 1805, 0, 49407]
  assert ours(["a cat"])[0, -1] == ours.pad_id == 0
  texts = [*ODD, "wow ! nice!", "hi !"]
  want = reference_ids(reference(folder), texts)
  np.testing.assert_array_equal(ours(texts), want)
  ours.save(folder.parent / "again")
  again = Tokenizer.from_folder(folder.parent / "again")
  np.testing.assert_array_equal(again(texts), want)
  again = reference(folder.parent / "again")
  np.testing.assert_array_equal(reference_ids(again, texts), want)


def _vocab_and_merges(folder):
  (folder / "tokenizer.json").unlink()


def _vocab_and_merges_alone(folder):
  for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
    (folder / name).unlink()


def _json_alone(folder):
  for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
    (folder / name).unlink()


def _old_config(folder):
  token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False}
  token |= {"single_word": False}
  change(
    folder / "tokenizer_config.json",
    added_tokens_decoder="drop",
    bos_token=token | {"content": "<|startoftext|>"},
    eos_token=token | {"content": "<|endoftext|>"},
    unk_token=token | {"content": "<|endoftext|>"},
    pad_token="!",
  )
  (folder / "special_tokens_map.json").unlink()


def _pad_in_special_map_only(folder):
  change(folder / "tokenizer_config.json", added_tokens_decoder="drop")
  change(folder / "special_tokens_map.json", pad_token="!")


def _new_tokens(folder):
  change(
    folder / "tokenizer_config.json",
    added_tokens_decoder="drop",
    pad_token="[PAD]",
    additional_special_tokens=["<thing>"],
  )
  change(folder / "special_tokens_map.json", pad_token="[PAD]")
  (folder / "added_tokens.json").write_text('{"cat": 49408, "[PAD]": 49409}')


def _file_without_lowercase(folder):
  change(folder / "tokenizer.json", normalizer=None, post_processor=None)


@pytest.mark.parametrize(
  "layout",
  [
    _vocab_and_merges,
    _vocab_and_merges_alone,
    _json_alone,
    _old_config,
    _pad_in_special_map_only,
    _new_tokens,
    _file_without_lowercase,
  ],
)
def test_layouts_of_folders_are_transformers(folder, layout):
  layout(folder)
  texts = [*ODD, "a CAT ! <thing> [PAD] concatenate"]
  want = reference(folder)
  ours = Tokenizer.from_folder(folder)
  np.testing.assert_array_equal(ours(texts), reference_ids(want, texts))
  assert ours.vocab_size == len(want)
  assert ours.pad_id == want.pad_token_id


def test_an_absent_or_endless_length_is_77(folder):
  config = folder / "tokenizer_config.json"
  for length in ("drop", int(1e30)):
    change(config, model_max_length=length)
    assert Tokenizer.from_folder(folder).max_length == 77
  change(config, model_max_length=32)
  assert Tokenizer.from_folder(folder)(["word " * 100]).shape == (1, 32)


def test_broken_folders_are_user_errors(folder):
  (folder / "tokenizer.json").unlink()
  (folder / "merges.txt").unlink()
  with pytest.raises(UserError, match=r"merges\.txt.*Copy"):
    Tokenizer.from_folder(folder)
  (folder / "merges.txt").write_text("not merges at all\n")
  with pytest.raises(UserError, match=r"merges\.txt"):
    Tokenizer.from_folder(folder)
  (folder / "tokenizer.json").write_text("{")
  with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
    Tokenizer.from_folder(folder)
  (folder / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
  with pytest.raises(UserError, match="byte-pair"):
    Tokenizer.from_folder(folder)
  (folder / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match="not understood"):
    Tokenizer.from_folder(folder)


def test_pickles_and_threads(clip):
  texts = [*ODD, "a cat sat"] * 3
  want = clip(texts)
  copy = pickle.loads(pickle.dumps(clip))
  np.testing.assert_array_equal(copy(texts), want)
  assert (copy.pad_id, copy.max_length) == (clip.pad_id, clip.max_length)
  with ThreadPoolExecutor(4) as pool:
    for ids in pool.map(clip, [texts] * 8):
      np.testing.assert_array_equal(ids, want)


def test_trained_has_clips_layout_and_knows_every_byte():
  tokenizer = Tokenizer.train(CAPTIONS, vocab_size=560, max_length=24)
  assert tokenizer.vocab_size == 560
  assert (tokenizer.bos_id, tokenizer.eos_id) == (558, 559)
  assert tokenizer.max_length == 24
  assert len(tokenizer.encode("red circle")) < len(tokenizer.encode("zxq wvkjyb"))
  vocab = tokenizer._backend.get_vocab()
  assert (vocab["!"], vocab["!</w>"], vocab["Ġ"]) == (0, 256, 220)
  for text in ("zebra", "日本 Ω", "😀", "".join(map(chr, range(33, 127)))):
    ids = Tokenizer.train(CAPTIONS, 560, 400).encode(text)
    assert tokenizer.eos_id not in ids[1:-1], text  # the unknown token is the end


def test_trained_round_trip(tmp_path):
  tokenizer = Tokenizer.train(CAPTIONS, vocab_size=600, max_length=24)
  tokenizer.save(tmp_path)
  texts = [*ODD, *CAPTIONS[:3]]
  want = tokenizer(texts)
  again = Tokenizer.from_folder(tmp_path)
  np.testing.assert_array_equal(again(texts), want)
  assert again.max_length == 24
  theirs = reference(tmp_path)
  np.testing.assert_array_equal(reference_ids(theirs, texts, 24), want)
  assert theirs.model_max_length == 24
  assert len(theirs) == tokenizer.vocab_size
  (tmp_path / "tokenizer.json").unlink()  # vocab.json and merges.txt say the same
  np.testing.assert_array_equal(Tokenizer.from_folder(tmp_path)(texts), want)


def test_training_is_the_same_in_every_process(tmp_path):
  program = (
    "import sys; from gcl_jax.processing import Tokenizer\n"
    "texts = [f'{a}{b} {b}{c}' for a in 'abcde' for b in 'fghij' for c in 'klmno']\n"
    "Tokenizer.train(texts, 700).save(sys.argv[1])"
  )
  files = []
  for seed in ("0", "1", "2"):
    subprocess.run(
      [sys.executable, "-c", program, str(tmp_path / seed)],
      check=True,
      env=os.environ | {"PYTHONHASHSEED": seed},
    )
    files.append((tmp_path / seed / "tokenizer.json").read_bytes())
  assert files[0] == files[1] == files[2]


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
  with pytest.raises(ValueError, match="514"):
    Tokenizer.train(CAPTIONS, vocab_size=513)
