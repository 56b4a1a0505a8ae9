"""The embed command: a run's held-out scenes to an index, alone and as two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gcl_jax import embed
from gcl_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments):
  return subprocess.Popen(
    [sys.executable, "-m", "gcl_jax.embed", *map(str, arguments)],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def run(*arguments):
  process = start(*arguments)
  output, _ = process.communicate(timeout=200)
  return process.returncode, output


def files(folder, *names):
  return {p.name: p.read_bytes() for n in names for p in sorted(folder.glob(n))}


@pytest.fixture(scope="module")
def made(tiny_run, tmp_path_factory):
  """An index of the scenes that the run held out, and what the command printed."""
  folder = tmp_path_factory.mktemp("embed") / "index"
  code, output = run(
    f"--checkpoint={tiny_run}",
    f"--output={folder}",
    "--shard_size=400",
    "--faiss=IVF8,Flat",
  )
  assert code == 0, output
  return folder, output


def test_what_is_written_and_said(made, tiny_run):
  from gcl_jax.evaluation.banks import MODALITIES
  from gcl_jax.retrieval import load, read_index, store_format

  folder, output = made
  assert "embedded 1,000 of 1,000 records" in output and "0:00 left, 0 bad" in output
  assert "(1,000 documents: 1,000 fused; 128 x float32)" in output
  assert "each stage by itself" in output and "  model  " in output
  assert "IVF8,Flat nprobe=1: " in output and "% of the top 10 that exact" in output
  index = read_index(folder)
  assert store_format.MODALITIES == MODALITIES
  assert index.manifest["checkpoint"] == str(tiny_run)
  assert index.manifest["step"] == 2
  embedder = load(tiny_run)
  index.check_model(embedder)
  document = index.documents([123])[0]
  query = embedder.embed([index.picture(123)], [document["text"]])
  found = index.search(query, 1)
  assert found.rows.tolist() == [[123]] and found.scores[0, 0] > 1 - 1e-5
  np.testing.assert_allclose(index.vectors[[123]], query, atol=1e-6)


def test_the_same_command_again_finds_it_done(made, tiny_run):
  folder, _ = made
  before = files(folder, "*")
  code, output = run(
    f"--checkpoint={tiny_run}", f"--output={folder}", "--shard_size=400"
  )
  assert code == 0 and "embedded" not in output, output
  assert files(folder, "*") == before


def test_two_processes_share_the_work(made, tiny_run):
  folder, _ = made
  two = folder.parent / "two"
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  pair = [
    start(
      f"--checkpoint={tiny_run}",
      f"--output={two}",
      "--shard_size=400",
      f"--coordinator=127.0.0.1:{port}",
      "--processes=2",
      f"--process_id={k}",
    )
    for k in range(2)
  ]
  said = [process.communicate(timeout=200)[0] for process in pair]
  assert [process.returncode for process in pair] == [0, 0], said
  assert "embedded 600 of 600" in said[0] and "embedded 400 of 400" in said[1]
  assert "written" in said[0] and "written" not in said[1]
  names = ("vectors-*", "documents-*")
  assert files(two, *names) == files(folder, *names)


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    ({"faiss": "HNWS32"}, "--faiss=HNWS32: FAISS refuses"),
    (
      {"faiss": "IVF4,Flat", "faiss_search": "nprob=3"},
      "--faiss_search=nprob=3: FAISS",
    ),
    ({"faiss_search": "nprobe=3"}, "--faiss_search=nprobe=3 is of an approximate"),
  ],
)
def test_faiss_is_checked_before_anything_is_embedded(monkeypatch, flags, said):
  given = {
    "checkpoint": "run", "step": "latest", "output": "x", "modality": "both",
    "shard_size": 8, "batch_size": 8, "faiss": "", "faiss_search": "",
    "distributed": False, "coordinator": "", "processes": 0, "process_id": -1,
  }  # fmt: skip
  model = SimpleNamespace(config=SimpleNamespace(projection_dim=16))
  opened = SimpleNamespace(embedder=SimpleNamespace(model=model))
  monkeypatch.setattr(embed, "_FLAGS", SimpleNamespace(**{**given, **flags}))
  monkeypatch.setattr(embed, "open_model", lambda *_, **__: opened)
  monkeypatch.setattr(embed, "_write_shards", lambda *_: pytest.fail("embedded"))
  with pytest.raises(UserError, match=said):
    embed.main()


def test_without_faiss(monkeypatch):
  monkeypatch.setitem(sys.modules, "faiss", None)
  flags = SimpleNamespace(faiss="Flat", faiss_search="")
  monkeypatch.setattr(embed, "_FLAGS", flags)
  with pytest.raises(UserError, match="FAISS, which is not installed"):
    embed._check_faiss(16)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--output=x", "--modality=video"), "--modality=video is none of both"),
    (("--output=x", "--shard_size=0"), "--shard_size=0: at least one record"),
    (("--output=x", "--batch_size=0"), "--batch_size=0: at least one document"),
    (("--output=x",), "error: name a model: --checkpoint"),
    ((), "error: name the folder to write: --output"),
  ],
)
def test_flags(arguments, message):
  code, output = run(*arguments)
  assert code == 2 and message in output and "Traceback" not in output, output


def test_another_index_is_not_gone_on_with(made, tiny_run):
  folder, _ = made
  common = (f"--checkpoint={tiny_run}", f"--output={folder}", "--shard_size=400")
  code, output = run(*common, "--dtype=float16", "--modality=text", "--batch_size=32")
  assert code == 2 and "Traceback" not in output
  assert "batch_size: 64 then, 32 now; " in output
  assert "dtype: 'float32' then, 'float16' now; modality: 'both' then" in output
