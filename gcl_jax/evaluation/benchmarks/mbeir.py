"""M-BEIR (UniIR, arXiv 2311.17136): sixteen test sets, local pools and their union."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks.documents import (
  Documents,
  check_distinct,
  documents,
  judgements,
  places,
)
from gcl_jax.evaluation.benchmarks.files import Files
from gcl_jax.evaluation.benchmarks.mbeir_text import CHOICES, Prompts, clean
from gcl_jax.evaluation.benchmarks.pictures import NoPictures, find_pictures
from gcl_jax.evaluation.benchmarks.result import mean_of, recall_of
from gcl_jax.evaluation.benchmarks.task import (
  BOTH,
  IMAGE,
  TEXT,
  Benchmark,
  Options,
  Scoring,
  Task,
  chosen,
  sizes,
)

LAYOUT = """\
  query/test/mbeir_<name>_test.jsonl
  qrels/test/mbeir_<name>_test_qrels.txt
  cand_pool/local/mbeir_<name>_cand_pool.jsonl  (mscoco_task0_test, mscoco_task3_test)
  instructions/query_instructions.tsv           (not with --instructions=none)
  mbeir_images/<dataset>_images/...             (as the image paths in the files say)
from https://huggingface.co/datasets/TIGER-Lab/M-BEIR"""
CUTOFFS = (1, 5, 10, 20, 50)
GLOBAL_K = 50  # what the GCL paper reports for the union pool


class Set(NamedTuple):
  """One test set: what it is, its cut-off, and how large the official one is."""

  dataset: int
  direction: tuple[str, str]
  k: int
  queries: int
  candidates: int


SETS = {
  "visualnews_task0": Set(0, (TEXT, IMAGE), 5, 19_995, 542_246),
  "mscoco_task0": Set(9, (TEXT, IMAGE), 5, 24_809, 5_000),
  "fashion200k_task0": Set(1, (TEXT, IMAGE), 10, 1_719, 201_824),
  "webqa_task1": Set(2, (TEXT, TEXT), 5, 2_455, 544_457),
  "edis_task2": Set(3, (TEXT, BOTH), 5, 3_241, 1_047_067),
  "webqa_task2": Set(2, (TEXT, BOTH), 5, 2_511, 403_196),
  "visualnews_task3": Set(0, (IMAGE, TEXT), 5, 20_000, 537_568),
  "mscoco_task3": Set(9, (IMAGE, TEXT), 5, 5_000, 24_809),
  "fashion200k_task3": Set(1, (IMAGE, TEXT), 10, 4_889, 61_707),
  "nights_task4": Set(4, (IMAGE, IMAGE), 5, 2_120, 40_038),
  "oven_task6": Set(5, (BOTH, TEXT), 5, 50_004, 676_667),
  "infoseek_task6": Set(6, (BOTH, TEXT), 5, 11_323, 611_651),
  "fashioniq_task7": Set(7, (BOTH, IMAGE), 10, 6_003, 74_381),
  "cirr_task7": Set(8, (BOTH, IMAGE), 5, 4_170, 21_551),
  "oven_task8": Set(5, (BOTH, BOTH), 5, 14_741, 335_135),
  "infoseek_task8": Set(6, (BOTH, BOTH), 5, 17_593, 481_782),
}
_POOLS = ("local", "union", "both")


def query_file(name: str) -> str:
  return f"query/test/mbeir_{name}_test.jsonl"


def qrels_file(name: str) -> str:
  return f"qrels/test/mbeir_{name}_test_qrels.txt"


def pool_file(name: str) -> str:
  split = "_test" if name.startswith("mscoco") else ""
  return f"cand_pool/local/mbeir_{name}{split}_cand_pool.jsonl"


def open_mbeir(root: str, options: Options) -> Benchmark:
  """The test sets asked for, checked.

  Raises:
    UserError: a file is missing or not as it should be, an id is there twice, a query
      has no judgement, none of the pictures is there.
  """
  files = Files(root, "M-BEIR", LAYOUT)
  names = chosen(options.tasks, list(SETS))
  pool, choice = options.pool or "local", options.instructions or "first"
  _check_choices(pool, choice)
  _check_there(files, names, pool)
  prompts = Prompts(files, choice, options.prompt_seed)
  pooled = list(SETS) if pool != "local" else names
  pools = {name: _pool(files, name) for name in pooled}
  if pool != "local":
    check_distinct("the union of the pools", _union(tuple(pools.values())))
  tasks = [_task(files, name, prompts, pools, pool) for name in names]
  folder = Path(options.images).expanduser() if options.images else files.root
  columns = [d.images for t in tasks for d in (t.queries, *pools.values())]
  some = [name for column in columns for name in column.drop_null()[:200].to_pylist()]
  return Benchmark(
    name="mbeir",
    tasks=tasks,
    pictures=find_pictures([folder], some) if some else NoPictures(),
    fusion="raw",
    stored="float16",
    protocol={
      "pool": pool,
      "instructions": choice,
      **({"prompt_seed": options.prompt_seed} if choice == "random" else {}),
      "recall": "1 if any answer is among the first K (official)",
      "masked": "nothing (official)",
      "text": "cleaned as UniIR does",
    },
    data_hash=files.digest(),
    summarise=summarise,
  )


def summarise(tasks: Mapping[str, Any]) -> dict[str, Any]:
  """The mean of the sixteen rows, only where all sixteen are there, whole, and of their
  official sizes."""
  out: dict[str, Any] = {}
  scorings = [
    s for s in ("local", "union") if any(s in t["scores"] for t in tasks.values())
  ]
  for scoring in scorings:
    rows = [recall_of(tasks, name, scoring, SETS[name].k) for name in SETS]
    out[f"mean of 16, {scoring}, official K"] = mean_of(rows)
    if scoring == "union":
      rows = [recall_of(tasks, name, scoring, GLOBAL_K) for name in SETS]
      out[f"mean of 16, union, R@{GLOBAL_K} (GCL paper)"] = mean_of(rows)
  return out


def _check_choices(pool: str, choice: str) -> None:
  for flag, value, known in (
    ("pool", pool, _POOLS),
    ("instructions", choice, CHOICES),
  ):
    if value not in known:
      raise UserError(f"--{flag}={value}: there are {', '.join(known)}.")


def _check_there(files: Files, names: list[str], pool: str) -> None:
  """One message for all sets of which a file is missing."""

  def there(name):
    return all(map(files.has, (query_file(name), qrels_file(name), pool_file(name))))

  missing = [name for name in names if not there(name)]
  if missing and len(missing) < len(names):
    present = ",".join(name for name in names if name not in missing)
    raise UserError(
      f"{files.root} lacks files of {', '.join(missing)}; evaluate what is there by "
      f"--tasks={present}. A folder of M-BEIR holds\n{LAYOUT}"
    )
  pools = [name for name in SETS if not files.has(pool_file(name))]
  if pool != "local" and pools:
    raise UserError(
      f"the union pool is all sixteen local pools, and {files.root} lacks those of "
      f"{', '.join(pools)}; use --pool=local"
    )


def _pool(files: Files, name: str) -> Documents:
  table = files.json_lines(
    pool_file(name),
    {"did": pa.string(), "txt": pa.large_string(), "img_path": pa.large_string()},
  )
  texts = [clean(text) for text in table["txt"].to_pylist()]
  return documents(
    f"the pool of {name}", table["did"], images=table["img_path"], texts=texts
  )


def _task(
  files: Files,
  name: str,
  prompts: Prompts,
  pools: dict[str, Documents],
  pool: str,
) -> Task:
  table = files.json_lines(
    query_file(name),
    {
      "qid": pa.string(),
      "query_txt": pa.large_string(),
      "query_img_path": pa.large_string(),
    },
  )
  dataset, direction, k, queries, candidates = SETS[name]
  texts = prompts.apply(table["query_txt"].to_pylist(), dataset, direction)
  asked = documents(
    f"the queries of {name}", table["qid"], images=table["query_img_path"], texts=texts
  )
  qids, dids = _qrels(files, name, asked)
  scorings = []
  for scoring, parts in (("local", (pools[name],)), ("union", tuple(pools.values()))):
    if pool in (scoring, "both"):
      answers = _answers(asked, parts, qids, dids)
      scorings.append(Scoring(scoring, parts, CUTOFFS, answers))
  size = sizes(len(asked), len(pools[name]), (queries, candidates))
  return Task(
    name,
    direction,
    asked,
    tuple(scorings),
    {"official_k": k, **size},
  )


def _qrels(files: Files, name: str, asked: Documents) -> tuple[list[str], list[str]]:
  """(query id, candidate id) of every judgement above zero.

  Raises:
    UserError: a line of another form, a query without any line.
  """
  file, qids, dids = qrels_file(name), [], []
  for number, line in enumerate(files.lines(file), start=1):
    fields = line.split()
    if not fields:
      continue
    try:
      qid, _, did, grade, *_ = fields
      grade = int(grade)
    except ValueError:
      raise UserError(
        f"{files.root / file}, line {number}: {line[:80]!r} is not 'qid 0 did relevance "
        "task_id'; download the file again."
      ) from None
    if grade > 0:
      qids.append(qid)
      dids.append(did)
  without = pc.is_null(
    pc.index_in(asked.ids, value_set=pa.array(qids, pa.large_string()))
  )
  lacking = pc.sum(without).as_py() or 0
  if lacking:
    first = asked.ids.filter(without)[0]
    raise UserError(
      f"{lacking} queries of {query_file(name)} have no line in {file}, the first is "
      f"{first}: the two files are not of one release."
    )
  return qids, dids


def _answers(
  asked: Documents, parts: tuple[Documents, ...], qids: list[str], dids: list[str]
):
  """Judgements over pools one after the other. Answers of another pool stay known."""
  queries, rows = places(asked.ids, qids), places(_union(parts), dids)
  known = queries >= 0
  inside = known & (rows >= 0)
  elsewhere = (known & ~inside).nonzero()[0]
  return judgements(
    queries[inside],
    rows[inside],
    len(asked),
    [(int(queries[k]), dids[k]) for k in elsewhere],
  )


def _union(parts: tuple[Documents, ...]) -> pa.ChunkedArray:
  """The ids of all parts, one after the other."""
  chunks = [chunk for part in parts for chunk in _chunks(part.ids)]
  return pa.chunked_array(chunks, pa.large_string())


def _chunks(column) -> list[pa.Array]:
  return column.chunks if isinstance(column, pa.ChunkedArray) else [column]
