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


def test_the_largest_that_fits_is_looked_for_where_it_should_be(monkeypatch):
  asked = []

  def compile_only(config, topology):
    pairs = config.batch_size // 16
    asked.append(pairs)
    if pairs > 1024:
      raise UserError("it does not fit")
    chip = Chip(1e12, 16e9, 1e11, 1e10)
    moved = Moved(1, {"all-gather": 3_000_000, "all-reduce": 2_000_000}, {})
    return ahead.Report(
      16, "TPU v0", config.batch_size, 10**9, pairs * 6 * 10**6, 1, 1, moved, chip
    )

  fake = types.SimpleNamespace(
    compile_only=compile_only, chips_of=lambda topology: 16, USABLE=0.96
  )
  monkeypatch.setattr(slices, "ahead", fake)
  row = slices.largest("ViT-B/32", "v5e:4x4", 256, 8192)
  # 256 pairs take 1.5 GB, so 2,048 would take 12.3 beside the state's 1: they do not.
  assert asked == [256, 2048, 1024]
  assert row.pairs == 1024
  assert (
    slices.table([row])
    .splitlines()[-1]
    .startswith("| ViT-B/32 | v5e:4x4 | 1,024 | 7.1 of 16 | 0.0 | 3 | 2 | links | 0 |")
  )
  monkeypatch.setattr(
    fake, "compile_only", lambda *_: compile_only(*_)._replace(arguments=10**11)
  )
  assert slices.largest("ViT-B/32", "v5e:4x4", 256, 8192) is None
