"""How M-BEIR's texts are cleaned, and the instructions before its queries."""

from __future__ import annotations

import random
from collections.abc import Sequence

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks.files import Files

INSTRUCTIONS = "instructions/query_instructions.tsv"
CHOICES = ("first", "random", "none")


def clean(text: str | None) -> str:
  """No carriage returns, no blanks and then no quotes around, a capital first and a
  full stop last. Empty stays empty. Cleaning twice changes nothing but inner blanks."""
  text = (text or "").replace("\r", "").strip().strip('"')
  if not text:
    return ""
  text = text[0].upper() + text[1:]
  return text if text[-1] in ".?!" else text + "."


class Prompts:
  """The prompts of `query_instructions.tsv`, and which one a query gets."""

  def __init__(self, files: Files, choice: str, seed: int):
    """`choice`: "first" is always prompt 1, "random" one of the four for each query as
    UniIR draws them (another generator, so other draws), "none" leaves texts alone.

    Raises:
      UserError: the file is missing or lacks a column.
    """
    self._choice, self._random = choice, random.Random(seed)
    self._prompts: dict[tuple[str, str, str], list[str]] = {}
    if choice == "none":
      return
    for row in files.rows(INSTRUCTIONS, delimiter="\t"):
      key = tuple(
        files.field(row, name, INSTRUCTIONS)
        for name in ("dataset_id", "query_modality", "cand_modality")
      )
      prompts = [row.get(f"prompt_{k}") or "" for k in (1, 2, 3, 4)]
      self._prompts[key] = [p.strip() for p in prompts if p.strip()]

  def apply(
    self, texts: Sequence[str | None], dataset: int, direction: tuple[str, str]
  ) -> list[str]:
    """Clean query texts with their prompt, if any, cleaned again.

    Raises:
      UserError: there is no prompt for this dataset and direction.
    """
    texts = [clean(text) for text in texts]
    if self._choice == "none":
      return texts
    prompts = self._prompts.get((str(dataset), *direction))
    if not prompts:
      raise UserError(
        f"{INSTRUCTIONS} has no prompt for dataset {dataset}, {' to '.join(direction)}: "
        "use the official file, or --instructions=none"
      )
    if self._choice == "first":
      return [clean(f"{prompts[0]} {text}") for text in texts]
    return [clean(f"{self._random.choice(prompts)} {text}") for text in texts]
