"""M-BEIR's CIRR and FashionIQ test sets, made again from the public annotations.

Queries, answers and pools are the official ones; the running numbers in qid and did are
ours, in the order of the annotation files.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks import cirr, fashioniq
from gcl_jax.evaluation.benchmarks.files import Files
from gcl_jax.evaluation.benchmarks.mbeir import SETS, pool_file, qrels_file, query_file
from gcl_jax.evaluation.benchmarks.mbeir_text import INSTRUCTIONS, clean

INSTRUCTION_BYTES = 5_288  # of the official query_instructions.tsv
_TASK_ID = 7  # image,text -> image


class Query(NamedTuple):
  """A query before it is numbered; pictures are names in the pool."""

  text: str
  reference: str
  positives: Sequence[str]
  negatives: Sequence[str]


def build_cirr(root: str, output: Path) -> str:
  """CIRR's validation set as `cirr_task7`; returns what was written, in a line.

  Raises:
    UserError: a file is missing, or the sizes are not M-BEIR's.
  """
  files = Files(root, "CIRR", cirr.LAYOUT)
  pool = {}
  for split in ("train", "val", "test1"):
    pool |= cirr.read_split(files, split)
  merged: dict[tuple[str, str], dict[str, float]] = {}
  for entry in cirr.read_captions(files, "val"):
    soft = files.field(entry, "target_soft", "captions/cap.rc2.val.json", dict)
    merged.setdefault((entry["reference"], entry["caption"]), {}).update(soft)
  queries: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
  for (reference, caption), soft in merged.items():
    positives = [name for name, value in soft.items() if value == 1.0]
    if positives:
      both = queries.setdefault((reference, clean(caption)), ([], []))
      both[0].extend(positives)
      both[1].extend(name for name, value in soft.items() if value != 1.0)
  rows = [Query(text, ref, *both) for (ref, text), both in queries.items()]
  paths = {name: f"mbeir_images/cirr_images/{path}" for name, path in pool.items()}
  return _write("cirr_task7", rows, paths, output)


def build_fashioniq(root: str, output: Path, suffix: str = ".jpg") -> str:
  """FashionIQ's validation set as `fashioniq_task7`; `suffix`: of the pictures.

  Raises:
    UserError: a file is missing, or the sizes are not M-BEIR's.
  """
  files = Files(root, "FashionIQ", fashioniq.LAYOUT)
  rows = [
    Query(text, reference, targets, ())
    for (text, reference), targets in fashioniq.merged_queries(files).items()
  ]
  folder = "mbeir_images/fashioniq_images"
  paths = {n: f"{folder}/{n}{suffix}" for n in fashioniq.all_garments(files)}
  return _write("fashioniq_task7", rows, paths, output)


def copy_instructions(source: str, output: Path) -> None:
  """The official instruction file, by its size.

  Raises:
    UserError: it is not there, or of another size, or another is there already.
  """
  path = Path(source).expanduser()
  if not path.is_file() or path.stat().st_size != INSTRUCTION_BYTES:
    raise UserError(
      f"--instructions={source} is not M-BEIR's query_instructions.tsv of "
      f"{INSTRUCTION_BYTES:,} bytes"
    )
  _write_all(output, {INSTRUCTIONS: path.read_bytes()})


def _write(
  name: str, queries: Sequence[Query], paths: Mapping[str, str], output: Path
) -> str:
  """The three files of a test set, after its sizes were compared."""
  official = SETS[name]
  if (len(queries), len(paths)) != (official.queries, official.candidates):
    raise UserError(
      f"{len(queries):,} queries over {len(paths):,} candidates, where {name} has "
      f"{official.queries:,} over {official.candidates:,}: these are not the annotation "
      "files that M-BEIR was made from."
    )
  dids = {n: f"{official.dataset}:{k}" for k, n in enumerate(paths, start=1)}
  pool = (
    {
      "txt": None,
      "img_path": path,
      "modality": "image",
      "did": dids[picture],
      "src_content": None,
    }
    for picture, path in paths.items()
  )
  asked, judged = [], []
  for number, query in enumerate(queries, start=1):
    positives = _dids(dids, query.positives)
    qid = f"{official.dataset}:{number}"
    asked.append(
      {
        "qid": qid,
        "query_txt": query.text,
        "query_img_path": paths[query.reference],
        "query_modality": "image,text",
        "query_src_content": None,
        "pos_cand_list": positives,
        "neg_cand_list": [
          d for d in _dids(dids, query.negatives) if d not in positives
        ],
        "task_id": _TASK_ID,
      }
    )
    judged += [f"{qid} 0 {did} 1 {_TASK_ID}\n" for did in positives]
  texts = {
    pool_file(name): _json_lines(pool),
    query_file(name): _json_lines(asked),
    qrels_file(name): "".join(judged),
  }
  _write_all(output, {file: text.encode() for file, text in texts.items()})
  return (
    f"{name}: {len(asked):,} queries, {len(judged):,} answers, {len(dids):,} candidates"
  )


def _write_all(output: Path, contents: Mapping[str, bytes]) -> None:
  """All of the files or none; a file that is there already must be the same.

  Raises:
    UserError: another file is there, or the folder cannot be written.
  """
  parts: dict[Path, Path] = {}
  try:
    for file, raw in contents.items():
      path = output / file
      if path.exists() and path.read_bytes() != raw:
        raise UserError(
          f"{path} exists and is another: name an --output without M-BEIR's own files."
        )
    for file, raw in contents.items():
      path = output / file
      path.parent.mkdir(parents=True, exist_ok=True)
      parts[path] = path.with_name(path.name + ".part")
      parts[path].write_bytes(raw)
    for path, part in parts.items():
      os.replace(part, path)
  except OSError as error:
    raise UserError(f"--output={output} cannot be written: {error}") from error
  finally:
    for part in parts.values():
      with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)


def _dids(dids: Mapping[str, str], names: Iterable[str]) -> list[str]:
  return [dids[name] for name in dict.fromkeys(names)]


def _json_lines(entries: Iterable[Mapping[str, Any]]) -> str:
  return "".join(json.dumps(entry) + "\n" for entry in entries)
