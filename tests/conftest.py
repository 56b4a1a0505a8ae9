"""Eight virtual CPU devices, quick compilation, and where the real data is."""

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from absl import flags

# Most of the tests' time was XLA's: with these a training step compiles five times as
# fast, to code that runs more slowly. XLA aborts on a flag that it does not know, so
# they are given to the version only that is known to have them.
QUICK_COMPILATION = (
  ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")
  if importlib.metadata.version("jaxlib").startswith("0.10.")
  else ()
)


def _set_flags() -> None:
  """Adds to $XLA_FLAGS what it does not already say."""
  given = os.environ.get("XLA_FLAGS", "")
  ours = (*QUICK_COMPILATION, "--xla_force_host_platform_device_count=8")
  more = [flag for flag in ours if flag.split("=")[0] not in given]
  os.environ["XLA_FLAGS"] = " ".join([given, *more]).strip()


os.environ.setdefault("JAX_PLATFORMS", "cpu")
_set_flags()
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "gcl_jax_test_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
  del config
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain's worker code reads absl flags


def data_root() -> Path:
  """The folder of real data: $GCL_JAX_DATA, by default ../shared/data."""
  return Path(os.environ.get("GCL_JAX_DATA", ROOT.parent / "shared" / "data"))


def pytest_collection_modifyitems(config, items):
  """Tests of real data are not collected where there is none: nothing is skipped."""
  if data_root().is_dir():
    return
  missing = [item for item in items if "real_data" in item.fixturenames]
  config.hook.pytest_deselected(items=missing)
  items[:] = [item for item in items if item not in missing]


@pytest.fixture(scope="session")
def real_data() -> Path:
  """The real data; a test that asks for it is left out where the data is not."""
  return data_root()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
  """The folder of a run of a few steps on procedural scenes."""
  workdir = tmp_path_factory.mktemp("tiny") / "run"
  arguments = [
    "--config=configs/demo.py",
    "--config.batch_size=32",
    "--config.steps=2",
    "--config.optimizer.warmup_steps=1",
    "--config.data.scenes_train_size=64",
    "--config.eval.max_items=24",
    "--config.eval.before=false",
    f"--workdir={workdir}",
  ]
  done = subprocess.run(
    [sys.executable, "-m", "gcl_jax.train", *arguments],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": ""},  # one device, compiled as users compile it
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return workdir


def pytest_sessionfinish(session, exitstatus):
  """Where $CI is set, a test that was skipped is a failure: parity must have run."""
  reporter = session.config.pluginmanager.get_plugin("terminalreporter")
  skipped = len(reporter.stats.get("skipped", [])) if reporter else 0
  if os.environ.get("CI") and skipped and exitstatus == 0:
    reporter.write_line(f"{skipped} tests were skipped", red=True)
    session.exitstatus = 1
