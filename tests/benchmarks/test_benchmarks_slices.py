"""The table of slices: what is compiled is our loss, and it doubles while it fits."""

import types

from benchmarks import slices
from gcl_jax.errors import UserError
from gcl_jax.sharding import make_mesh
from gcl_jax.training import ahead
from gcl_jax.training.chips import Chip
from gcl_jax.training.program import Moved


def test_a_ring_gathers_nothing():
  ring = slices.compiled_loss(make_mesh(), 32, 8, "ring").as_text()
  assert "collective-permute" in ring
  assert "all-gather" not in ring


def test_pairs_double_while_they_fit(monkeypatch):
  asked = []

  def compile_only(config, topology):
    asked.append(config.batch_size)
    if config.batch_size > 16 * 2048:
      raise UserError("it does not fit")
    chip = Chip(1e12, 16e9, 1e11, 1e10)
    moved = Moved(1, {"all-gather": 3_000_000, "all-reduce": 2_000_000}, {})
    large = 16e9 if config.batch_size == 16 * 2048 else 1e9
    return ahead.Report(
      16, "TPU v0", config.batch_size, int(large), 0, 10**12, 10**12, moved, chip
    )

  monkeypatch.setattr(
    slices,
    "ahead",
    types.SimpleNamespace(compile_only=compile_only, chips_of=lambda topology: 16),
  )
  row = slices.largest("ViT-B/32", "v5e:4x4", 512, 8192)
  assert asked == [16 * 512, 16 * 1024, 16 * 2048]
  assert row.pairs == 1024
  assert (
    slices.table([row])
    .splitlines()[-1]
    .startswith("| ViT-B/32 | v5e:4x4 | 1,024 | 1.0 of 16 | 1.0 | 3 | 2 | arithmetic |")
  )
