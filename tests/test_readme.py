"""What the README and the pages of docs print runs as printed."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(language: str, page: str = README) -> list[str]:
  return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def commands() -> list[str]:
  """Of all pages."""
  found = [block for page in PAGES for block in blocks("bash", page)]
  text = "\n".join(found).replace("\\\n", " ")
  return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def python(code: str, folder: Path) -> str:
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=folder,
    capture_output=True,
    text=True,
    timeout=200,
    env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_the_test_command_is_the_one_that_ci_runs():
  ci = (ROOT / ".ci" / "run").read_text().splitlines()
  assert "pip install -r requirements-test.txt && pytest" in commands()
  assert "pytest" in ci
  assert any("pip install" in line and "requirements-test.txt" in line for line in ci)


@functools.cache
def help_of(tool: str) -> str:
  return subprocess.run(
    [sys.executable, "-m", tool, "--helpfull"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  ).stdout


@pytest.mark.parametrize("command", [c for c in commands() if "python -m" in c])
def test_every_command_names_recipes_and_flags_that_exist(command):
  for recipe in re.findall(r"--config=(\S+?)(?::\w+)?(?:\s|$)", command):
    assert (ROOT / recipe).is_file(), recipe
  tool = re.search(r"python -m (gcl_jax(?:\.\w+)+|benchmarks\.\w+)", command)[1]
  flags = help_of(tool)
  for flag in re.findall(r"--(\w+)=", command.replace("--config.", "--config_")):
    if flag.startswith("config_"):
      continue
    assert f"--{flag}" in flags or f"--[no]{flag}" in flags, flag


def test_fields_of_the_pages_are_fields_of_the_config():
  from gcl_jax.training.config import default_config

  namespace: dict = {}
  exec((ROOT / "configs" / "demo.py").read_text(), namespace)
  known, demo = default_config(), namespace["get_config"]()
  for field in set(re.findall(r"--config\.([\w.]+)=", "\n".join(PAGES))):
    # The fields of a Hugging Face config are those that a recipe has.
    node = demo if field.startswith("model.hf.") else known
    for name in field.split("."):
      assert name in node, field
      node = node[name]


def test_the_loss_in_python_runs_as_printed(tmp_path):
  code = next(block for block in blocks("python") if "gcl_loss" in block)
  output = python(code, tmp_path)
  assert "nan" not in output


def test_load_and_embed_run_as_printed(tmp_path, tiny_run):
  code = next(block for block in blocks("python") if "gcl_jax.load" in block)
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "demo").symlink_to(tiny_run)
  (tmp_path / "docs").symlink_to(ROOT / "docs")
  numbers = re.findall(r"[-\d.]+", python(code, tmp_path))
  matrix = [float(x) for x in numbers if "." in x]
  assert matrix[0] == pytest.approx(1.0, abs=1e-5)  # unit vectors
  assert len(matrix) == 9


def test_the_model_card_runs_as_printed_and_fuses_as_we_do(tmp_path, tiny_run):
  import numpy as np

  import gcl_jax
  from gcl_jax.checkpoints.export import export_run

  folder = export_run(tiny_run, tmp_path / "hf")
  card = (folder / "README.md").read_text()
  code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
  assert len([line for line in code.splitlines() if line.strip()]) <= 10
  Image.linear_gradient("L").convert("RGB").save(folder / "picture.jpg")
  python(code + "\nimport numpy\nnumpy.save('fused.npy', fused.numpy())", folder)
  theirs = np.load(folder / "fused.npy")
  ours = gcl_jax.load(tiny_run).embed(
    images=[str(folder / "picture.jpg")], texts=["a caption"]
  )
  np.testing.assert_allclose(theirs, ours, atol=2e-5)
