"""VISTA's files: its `.pth` beside its text encoder's folder, in and out.

A folder holds the encoder's config.json and tokenizer files (as BAAI/bge-base-en-v1.5 or
BAAI/bge-m3 have them) and one `.pth`, or what `write_vista` wrote. Sizes of the image
tower are read off its tensors. A folder without image tower is a text encoder: a VISTA
may begin from it and an EVA-CLIP file (`read_towers`).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.models.convert import from_tensors, to_tensors
from gcl_jax.models.huggingface import (
  CONFIG,
  SETTINGS,
  WEIGHTS,
  is_clip,
  read_json,
  weight_files,
  write_file,
  write_json,
)
from gcl_jax.models.model import build
from gcl_jax.models.open_clip import DESCRIPTION
from gcl_jax.models.vista_config import (
  ENCODERS,
  BertConfig,
  EvaConfig,
  VistaConfig,
  bert_from_hf,
  bert_to_hf,
)
from gcl_jax.models.vista_table import (
  POOLER,
  TEXT_BLOCKS,
  TEXT_EMBEDDINGS,
  VISTA,
  VISTA_TABLE,
  VISUAL,
)
from gcl_jax.models.weights import open_weights
from gcl_jax.processing import EncoderTokenizer

PTH = "Visualized_BGE.pth"
_SCALE = "logit_scale"  # ours, in gcl_jax.json: VISTA's files hold none
# Every block of EVA's repeats the one rotary module that they share.
_SHARED = re.compile(r"(.*)\.blocks\.\d+\.attn\.(rope\.freqs_(?:cos|sin))")
# How an encoder's own file names what VISTA's prefixes.
_ENCODER_PARTS = {
  "embeddings": TEXT_EMBEDDINGS,
  "encoder": TEXT_BLOCKS,
  "pooler": POOLER,
}
_ENCODER_KEY = re.compile(r"(?:(?:bert|roberta|model)\.)?(embeddings|encoder|pooler)\.")


def is_vista(folder: str | os.PathLike) -> bool:
  """Whether a folder holds a VISTA: a `.pth`, or what `write_vista` wrote."""
  folder = Path(folder)
  config = folder / CONFIG
  if _pth_files(folder) and not (folder / DESCRIPTION).is_file():
    # A CLIP's folder may have a .pth too: of whoever trained it.
    return not (config.is_file() and is_clip(read_json(config)))
  return (folder / WEIGHTS).is_file() and _is_ours(folder)


def is_text_encoder(folder: str | os.PathLike) -> bool:
  """Whether a folder holds a BERT or an XLM-RoBERTa, and no VISTA."""
  config = Path(folder) / CONFIG
  if is_vista(folder) or not config.is_file():
    return False
  return read_json(config).get("model_type") in ENCODERS


def holds_vista(file: Path) -> bool:
  """Whether a file is a `.pth` beside a text encoder's config.json."""
  config = file.parent / CONFIG
  if file.suffix != ".pth" or not config.is_file():
    return False
  return read_json(config).get("model_type") in ENCODERS


def read_vista(
  folder: str | os.PathLike, file: Path | None = None
) -> tuple[VistaConfig, dict[str, Any]]:
  """The shape and the parameters, NumPy float32, of a VISTA's folder.

  Args:
    folder: with its text encoder's config.json and tokenizer.
    file: its weights; None is the only ones that lie there.

  Raises:
    UserError: a file is missing or unreadable, holds more than tensors, is of another
      layout, or its towers do not fit each other; it names what is missing or left over.
  """
  folder = Path(folder)
  text = text_encoder_config(folder)
  file = _weights(folder) if file is None else file
  scale = VistaConfig.logit_scale_init
  if (folder / SETTINGS).is_file():
    scale = float(read_json(folder / SETTINGS).get(_SCALE, scale))
  with open_weights([file]) as opened:
    tensors = {key.removeprefix("module."): opened[key] for key in opened}
  vision = _eva_config(tensors, VISUAL, file)
  try:
    config = VistaConfig(vision, text)
  except UserError as error:
    raise UserError(f"{file} and {folder / CONFIG}: {error}") from error
  params = from_tensors(_without_repeats(tensors, file), config, str(file), VISTA)
  return config, {**params, _SCALE: np.float32(scale)}


def write_vista(
  folder: str | os.PathLike,
  config: VistaConfig,
  params: Mapping[str, Any],
  *,
  pth: bool = False,
) -> None:
  """Writes config.json, weights under VISTA's own keys, and gcl_jax.json.

  Each file appears whole or not at all, config.json last. `read_vista` gives the same
  bits back.

  Args:
    folder: where; made where there is none.
    config: the shape.
    params: arrays of any kind, all on this process.
    pth: as the `.pth` that FlagEmbedding's `Visualized_BGE` loads, which takes PyTorch;
      else as safetensors.

  Raises:
    UserError: the folder cannot be written, or PyTorch is not installed.
    ValueError: the parameters are not of this config.
  """
  folder = Path(folder)
  tensors = to_tensors(params, config, VISTA_TABLE)
  for name in ("cos", "sin"):
    shared = tensors[f"{VISUAL}.rope.freqs_{name}"]
    for i in range(config.vision.layers):
      tensors[f"{VISUAL}.blocks.{i}.attn.rope.freqs_{name}"] = shared
  settings = {"model_type": config.model_type, _SCALE: float(params[_SCALE])}
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if pth:
      write_file(folder / PTH, lambda path: _save_pth(tensors, path))
    else:
      from safetensors.numpy import save_file

      write_file(folder / WEIGHTS, lambda path: save_file(tensors, path))
    write_json(folder / SETTINGS, settings)
    write_json(folder / CONFIG, bert_to_hf(config.text))
  except OSError as error:
    raise UserError(
      f"the model cannot be written to {folder} ({error.strerror or error}): is there "
      "room, and may you write there?"
    ) from error


def read_towers(
  folder: str | os.PathLike, image_tower: str | os.PathLike | EvaConfig, seed: int
) -> tuple[VistaConfig, dict[str, Any]]:
  """A VISTA to begin with: a trained text encoder, and an image tower.

  What neither has (the projection between them; an untrained tower) is drawn.

  Args:
    folder: of the text encoder: BGE, MiniLM or another BERT or XLM-RoBERTa, saved
      without the head of a pretraining.
    image_tower: an EVA-CLIP file (`EVA02_CLIP_B_psz16_s8B.pt`, of which the text tower
      is left out), or the shape of a tower to be drawn.
    seed: of what is drawn.

  Raises:
    UserError: as `read_vista`.
  """
  folder = Path(folder)
  text = text_encoder_config(folder)
  tensors: dict[str, np.ndarray] = {}
  vision, where = image_tower, str(folder)
  if not isinstance(image_tower, EvaConfig):
    tensors = _eva_tensors(Path(image_tower).expanduser())
    vision, where = (
      _eva_config(tensors, VISUAL, image_tower),
      f"{folder}, {image_tower}",
    )
  try:
    config = VistaConfig(vision, text)
  except UserError as error:
    raise UserError(f"{where}: {error}") from error
  with open_weights(weight_files(folder)) as theirs:
    tensors |= {_encoder_key(key): theirs[key] for key in theirs}
  first = jax.jit(build(config).init)(jax.random.key(seed))
  drawn = to_tensors(first, config, VISTA_TABLE)
  untrained = ("visual_proj.", "model_visual.", POOLER)
  tensors = {k: v for k, v in drawn.items() if k.startswith(untrained)} | tensors
  params = from_tensors(tensors, config, where, VISTA)
  return config, {**params, _SCALE: np.float32(config.logit_scale_init)}


def _is_ours(folder: Path) -> bool:
  """Whether `write_vista` wrote its config."""
  settings = folder / SETTINGS
  return (
    settings.is_file()
    and read_json(settings).get("model_type") == VistaConfig.model_type
  )


def text_encoder_config(folder: Path) -> BertConfig:
  """The shape of the text encoder whose config.json and tokenizer lie in a folder.

  Raises:
    UserError: one of them is missing, or of another kind, or they do not fit.
  """
  if not (folder / CONFIG).is_file():
    raise UserError(
      f"{folder} has no {CONFIG}: a VISTA's .pth holds weights alone. Copy the files of "
      "its text encoder beside it (BAAI/bge-base-en-v1.5 or BAAI/bge-m3: config.json and "
      "the tokenizer's)."
    )
  try:
    text = bert_from_hf(read_json(folder / CONFIG))
  except UserError as error:
    raise UserError(f"{folder / CONFIG}: {error}") from error
  if _is_ours(folder):
    return text
  # A BERT's config does not say which ids its vocabulary gives to [CLS] and [SEP].
  tokenizer = EncoderTokenizer.from_folder(folder)
  if tokenizer.vocab_size > text.vocab_size:
    raise UserError(
      f"{folder}: the tokenizer has {tokenizer.vocab_size} entries and {CONFIG} says "
      f"{text.vocab_size}: take both from the same text encoder."
    )
  return dataclasses.replace(
    text,
    bos_id=tokenizer.bos_id,
    eos_id=tokenizer.eos_id,
    pad_id=tokenizer.pad_id,
  )


def _pth_files(folder: Path) -> list[Path]:
  """But for the random states that transformers' Trainer leaves in its folders."""
  return [f for f in sorted(folder.glob("*.pth")) if not f.name.startswith("rng_state")]


def _weights(folder: Path) -> Path:
  found = _pth_files(folder)
  if len(found) > 1:
    raise UserError(
      f"{folder} holds {len(found)} .pth files ({', '.join(f.name for f in found[:4])}): "
      "leave one."
    )
  return found[0] if found else folder / WEIGHTS


def _save_pth(tensors: Mapping[str, np.ndarray], path: Path) -> None:
  try:
    import torch
  except ImportError as error:
    raise UserError(
      "a VISTA is handed over as a .pth, which only PyTorch writes: pip install torch."
    ) from error
  # Copies: PyTorch wants arrays that it may write to.
  torch.save({key: torch.from_numpy(x.copy()) for key, x in tensors.items()}, path)


def _eva_tensors(file: Path) -> dict[str, np.ndarray]:
  """The image tower of an EVA-CLIP file, under VISTA's keys."""
  if not file.is_file():
    raise UserError(f"config.init.image_tower: there is no file {file}.")
  with open_weights([file]) as opened:
    opened = opened.renamed(lambda key: key.removeprefix("module."))
    kept = {
      f"model_visual.{key}": opened[key]
      for key in opened
      if key.startswith("visual.") or key == "logit_scale"
    }
    if not kept:  # a VISTA's own file has such a tower too
      kept = {key: opened[key] for key in opened if key.startswith("model_visual.")}
  return _without_repeats(kept, file)


def _eva_config(tensors: Mapping[str, np.ndarray], at: str, where: Any) -> EvaConfig:
  """The image tower's sizes, off its tensors."""
  blocks = {
    int(found[1])
    for key in tensors
    if (found := re.match(rf"{re.escape(at)}\.blocks\.(\d+)\.", key))
  }
  try:
    patch = tensors[f"{at}.patch_embed.proj.weight"].shape
    turns = tensors[f"{at}.rope.freqs_cos"].shape
    mlp = tensors[f"{at}.blocks.0.mlp.w1.weight"].shape
    head = tensors[f"{at}.head.weight"].shape
    grid = round(turns[0] ** 0.5)
    return EvaConfig(
      width=patch[0],
      layers=max(blocks) + 1,
      heads=patch[0] // turns[1],
      mlp=mlp[0],
      patch=patch[3],
      image_size=grid * patch[3],
      head=head[0],
    )
  except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
    lacks = f"lacks {error}" if isinstance(error, KeyError) else "has other shapes"
    raise UserError(
      f"{where} is of a layout that is not known: an EVA02-CLIP image tower has patches, "
      f"rotary positions and gated blocks, under {at} in a VISTA's file, under visual in "
      f"its own. This one {lacks}."
    ) from error


def _without_repeats(
  tensors: Mapping[str, np.ndarray], where: Any
) -> dict[str, np.ndarray]:
  """Leaves out the copies of the rotary positions that every block has.

  Raises:
    UserError: a copy says something else.
  """
  kept = {}
  for key, tensor in tensors.items():
    repeats = _SHARED.fullmatch(key)
    if repeats is None:
      kept[key] = tensor
    elif not np.array_equal(tensor, tensors.get(f"{repeats[1]}.{repeats[2]}")):
      raise UserError(
        f"{where}: {key} is not the tower's own {repeats[2]}: such a model is not known."
      )
  return kept


def _encoder_key(key: str) -> str:
  """A text encoder's key as VISTA has it; what is none stays, and is left over."""
  found = _ENCODER_KEY.match(key)
  return key if found is None else _ENCODER_PARTS[found[1]] + key[found.end() - 1 :]
