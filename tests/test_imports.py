"""Which floors import which, and that neither PyTorch nor TensorFlow is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gcl_jax"
# A room may import itself and the floors below it.
FLOORS = {
  "errors": 0,
  "_version": 0,
  "fusion": 1,
  "sharding": 1,
  "processes": 1,
  "paths": 1,
  "processing": 1,
  "models": 2,
  "losses": 2,
  "data": 3,
  "checkpoints": 3,
  "retrieval": 4,
  "training": 5,
  "evaluation": 5,
  "command_line": 6,
  "open_model": 6,
  "pages": 6,
  "train": 7,
  "evaluate": 7,
  "embed": 7,
  "search": 7,
  "export": 7,
  "report": 7,
}
# A command line that stays beside what it runs: flags and one call, imported by nobody.
COMMANDS = {"data/pack.py": 7, "evaluation/benchmarks/rebuild_mbeir.py": 7}

# Copied beside an export, for people who have PyTorch; nothing here imports it.
FOR_PYTORCH = "models/pytorch_clip.py"


def room_of(path: Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
  rooms = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      names = [node.module]
      if node.module == "gcl_jax":
        names = [f"gcl_jax.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    else:
      continue
    rooms |= {name.split(".")[1] for name in names if name.startswith("gcl_jax.")}
  return rooms


def files() -> list[Path]:
  others = {PACKAGE / "__init__.py", PACKAGE / FOR_PYTORCH}
  return sorted(p for p in PACKAGE.rglob("*.py") if p not in others)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_room_imports_only_from_the_floors_below(path):
  room = room_of(path)
  floor = COMMANDS.get(path.relative_to(PACKAGE).as_posix(), FLOORS[room])
  for other in imported_rooms(path) - {room}:
    # A fused embedding is a setting that both models and folders carry.
    assert FLOORS[other] < floor, f"{path.name} imports {other}"


def test_nothing_needs_pytorch_or_tensorflow():
  modules = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in files()
  ]
  code = f"""
import importlib, sys
for name in ("torch", "tensorflow", "torchvision"):
  sys.modules[name] = None  # any import of it raises
for name in {modules!r}:
  importlib.import_module(name)
import gcl_jax
for name in gcl_jax.__all__:
  getattr(gcl_jax, name)
"""
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0, done.stderr


def test_the_package_itself_imports_nothing_heavy():
  code = "import gcl_jax, sys; print([m for m in ('jax', 'flax') if m in sys.modules])"
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
  )
  assert done.stdout.strip() == "[]", done.stdout + done.stderr
