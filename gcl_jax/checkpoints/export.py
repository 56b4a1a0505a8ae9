"""From a run to a folder that PyTorch users load, with a card that says how."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from pathlib import Path

from gcl_jax.checkpoints.card import model_card, vista_card
from gcl_jax.checkpoints.folder import Folder, read_description
from gcl_jax.checkpoints.manager import read_run
from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings
from gcl_jax.models import PTH, Config, VistaConfig, write_pretrained, write_vista

_CARD = "README.md"
# Lies in a folder for as long as we may throw it away, and is the last to go.
_MARK = ".gcl_jax_export"
_FILES = {
  _CARD,
  PTH,
  "config.json",
  "gcl_jax.json",
  "merges.txt",
  "model.safetensors",
  "preprocessor_config.json",
  "pytorch_clip.py",
  "sentencepiece.bpe.model",
  "special_tokens_map.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "vocab.json",
  "vocab.txt",
}


def export_run(
  workdir: Folder,
  output: str | os.PathLike,
  *,
  step: int | None = None,
  table: str = "",
) -> Path:
  """Writes weights, config, processor files and a model card.

  All of it is written to `<output>.part` and renamed at the end: an export that was
  interrupted leaves the output as it was, and the next one starts over.

  Args:
    workdir: a run's folder.
    output: a new or empty folder, or an earlier export.
    step: which checkpoint; None is the newest.
    table: Markdown for the card: what the evaluation found.

  Returns:
    The folder, which `CLIPModel.from_pretrained` and `CLIPProcessor` load; where
    `CLIPModel` has no such shape, the `pytorch_clip.py` inside loads it; of a VISTA a
    `.pth` with the keys of FlagEmbedding's `Visualized_BGE`. Weights are bit-identical to
    the run's.

  Raises:
    UserError: no such checkpoint, the output (or a folder beside it that the export
      needs) holds something else, or it cannot be written; a VISTA, and no PyTorch to
      write it.
  """
  output = Path(output)
  check_output(output)
  _check_pytorch(read_description(workdir).model)
  model, params, processor, config = read_run(workdir, step)
  fusion = _settings(model.fusion, params)
  place = output.resolve()  # renaming would replace a link, not the folder behind it
  part = _beside(place, "part")
  try:
    _discard(part)
    part.mkdir(parents=True)
    (part / _MARK).touch()
    processor.save(part)
    if isinstance(model.config, VistaConfig):
      write_vista(part, model.config, params, pth=True)
      card = vista_card(config.name, model.config, table)
    else:
      write_pretrained(part, model.config, params, fusion)
      card = model_card(config.name, fusion, table, model.config.plain)
    (part / _CARD).write_text(card)
    _put_in_place(part, place)
  except UserError:
    _discard(part)
    raise
  except OSError as error:
    raise UserError(
      f"--output={output} cannot be written ({error.strerror or error}): is there room, "
      f"and may you write to {place.parent}?"
    ) from error
  return output


def check_output(output: Path) -> None:
  """Refuses a folder that holds something other than an earlier export.

  Also refuses where `<output>.part` or `<output>.old`, which an export writes and
  deletes, holds something that no export of ours left there.

  Raises:
    UserError: it does, or it is a file, or an address.
  """
  if re.match(r"\w+:/", str(output)):  # a Path has lost the second slash
    raise UserError(
      f"--output={output}: an export is a folder of this machine; copy it from there."
    )
  if output.exists() and not output.is_dir():
    raise UserError(f"--output={output} is a file: name a folder.")
  others = _others(output)
  if others:
    raise UserError(
      f"--output={output} holds something else ({', '.join(others[:3])}): name a "
      "new or empty folder."
    )
  for word in ("part", "old"):
    beside = _beside(output.resolve(), word)
    if _is_ours(beside):
      continue
    raise UserError(
      f"{beside} is in the way: an export writes there first, and it holds something "
      "else. Move it, or name another --output."
    )


def _check_pytorch(config: Config) -> None:
  """Before a checkpoint of gigabytes is read for nothing."""
  if isinstance(config, VistaConfig) and importlib.util.find_spec("torch") is None:
    raise UserError(
      "a VISTA is handed over as a .pth, which only PyTorch writes: pip install torch."
    )


def _beside(output: Path, word: str) -> Path:
  return output.with_name(f"{output.name}.{word}")


def _others(folder: Path) -> list[str]:
  """What keeps a folder from being an earlier export (or empty, or absent)."""
  names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
  if {"config.json", "gcl_jax.json"} <= names:
    names -= _FILES
  return sorted(names - {_MARK})


def _is_ours(folder: Path) -> bool:
  if not folder.exists() or (folder.is_dir() and (folder / _MARK).exists()):
    return True
  return folder.is_dir() and not _others(folder)


def _discard(folder: Path) -> None:
  """Deletes a folder of ours, the mark last: stopped halfway, it is still ours."""
  if not folder.exists():
    return
  for path in folder.iterdir():
    if path.is_dir():
      shutil.rmtree(path)
    elif path.name != _MARK:
      path.unlink()
  (folder / _MARK).unlink(missing_ok=True)
  folder.rmdir()


def _put_in_place(part: Path, output: Path) -> None:
  """Renames `part` to `output`; an earlier export there is gone only afterwards."""
  old = _beside(output, "old")
  _discard(old)
  (part / _MARK).unlink()
  if output.exists():
    (output / _MARK).touch()
    output.rename(old)
  part.rename(output)
  _discard(old)


def _settings(fusion: FusionSettings, params: dict) -> FusionSettings:
  """The fusion as numbers, learned or not: that is what a user of the folder needs."""
  if not fusion.learned:
    return fusion
  weights = params["fusion"]
  return FusionSettings(
    of=fusion.of,
    image_weight=float(weights["image_weight"]),
    text_weight=float(weights["text_weight"]),
  )
