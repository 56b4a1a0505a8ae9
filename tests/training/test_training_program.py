"""What a compiled program moves: loops count as often as they run."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from gcl_jax.sharding import make_mesh
from gcl_jax.training.program import moved

ROUNDS = 5


def compiled(function, *arguments, out):
  mapped = jax.shard_map(
    function, mesh=make_mesh(), in_specs=P("data"), out_specs=out, check_vma=False
  )
  return jax.jit(mapped).lower(*arguments).compile().as_text()


def test_collectives_of_a_loop_count_as_often_as_it_runs():
  def rounds(x):
    def one(total, _):
      return total + jax.lax.all_gather(x * total.sum(), "data", tiled=True), None

    return jax.lax.scan(one, jnp.ones((16, 4)), length=ROUNDS)[0]

  found = moved(compiled(rounds, jnp.ones((16, 4)), out=P()))
  assert found.counts == {"all-gather": ROUNDS}
  assert found.collectives == {"all-gather": ROUNDS * 16 * 4 * 4}


def test_a_sum_comes_twice_and_a_ring_once():
  def both(x):
    away = jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)])
    return jax.lax.psum(x, "data").sum() + away.sum()[None]

  found = moved(compiled(both, jnp.ones((8, 32)), out=P("data")))
  assert found.counts == {"all-reduce": 1, "collective-permute": 1}
  assert found.collectives == {"all-reduce": 2 * 32 * 4, "collective-permute": 32 * 4}


def test_memory_is_what_operations_read_and_write():
  text = """HloModule m

%body (s: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {
  %s = (s32[], f32[64,64]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%s), index=0
  %c = f32[64,64]{1,0} get-tuple-element(%s), index=1
  %d = f32[64,64]{1,0} dot(%c, %c), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[64,64]{1,0}) tuple(%k, %d)
}

%test (s: (s32[], f32[64,64])) -> pred[] {
  %s = (s32[], f32[64,64]{1,0}) parameter(0)
  ROOT %y = pred[] constant(true)
}

ENTRY %main (a: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {
  %a = (s32[], f32[64,64]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[64,64]{1,0}) while(%a), condition=%test, body=%body, TRIPS
}
"""
  text = text.replace("TRIPS", 'backend_config={"known_trip_count":{"n":"7"}}')
  assert moved(text).memory == 7 * 3 * 64 * 64 * 4  # two read, one written


def test_scratch_memory_is_free_and_one_branch_runs():
  text = """HloModule m

%small (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%p)
}

%large (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  %m = f32[8]{0:T(256)S(1)} negate(%q)
  ROOT %o = f32[8]{0} negate(%m)
}

ENTRY %main (a: f32[8], i: pred[]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %i = pred[] parameter(1)
  ROOT %c = f32[8]{0} conditional(%i, %a, %a), true_computation=%small, false_computation=%large
}
"""
  assert moved(text).memory == 2 * 8 * 4  # q read, o written


def test_what_starts_and_is_done_later_counts_once():
  text = """HloModule m

ENTRY %main (a: f32[2,8]) -> f32[16,8] {
  %a = f32[2,8]{1,0} parameter(0)
  %s = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%a), dimensions={0}
  ROOT %d = f32[16,8]{1,0} all-gather-done(%s)
}
"""
  found = moved(text)
  assert found.counts == {"all-gather": 1}
  assert found.collectives == {"all-gather": 16 * 8 * 4}


def test_a_loop_over_layers_reads_and_writes_one_of_them():
  text = """HloModule m

%take (p: f32[12,64], k: s32[]) -> f32[1,64] {
  %p = f32[12,64]{1,0} parameter(0)
  %k = s32[] parameter(1)
  ROOT %s = f32[1,64]{1,0} dynamic-slice(%p, %k, %k), dynamic_slice_sizes={1,64}
}

%keep (p: f32[12,64], u: f32[1,64], k: s32[]) -> f32[12,64] {
  %p = f32[12,64]{1,0} parameter(0)
  %u = f32[1,64]{1,0} parameter(1)
  %k = s32[] parameter(2)
  ROOT %s = f32[12,64]{1,0} dynamic-update-slice(%p, %u, %k, %k)
}

ENTRY %main (a: f32[12,64], k: s32[]) -> f32[12,64] {
  %a = f32[12,64]{1,0} parameter(0)
  %k = s32[] parameter(1)
  %x = f32[1,64]{1,0} fusion(%a, %k), kind=kLoop, calls=%take
  ROOT %y = f32[12,64]{1,0} fusion(%a, %x, %k), kind=kLoop, calls=%keep
}
"""
  layer, index = 64 * 4, 4
  assert moved(text).memory == 2 * layer + index + 2 * layer + index


def test_a_loop_counts_to_a_constant_where_the_compiler_says_nothing():
  text = """HloModule m

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %k = s32[] get-tuple-element(%s), index=0
  %c = f32[8]{0} get-tuple-element(%s), index=1
  %f = f32[8]{0} fusion(%c), kind=kCustom, calls=%inside
  ROOT %t = (s32[], f32[8]{0}) tuple(%k, %f)
}

%inside (c: f32[8]) -> f32[8] {
  %c = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} all-reduce(%c), to_apply=%sum
}

%test (s: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(12), metadata={op_name="x"}
  %s = (s32[], f32[8]{0}) parameter(0)
  %k = s32[] get-tuple-element(%s), index=0
  ROOT %y = pred[]{:T(512)} compare(%k, %n), direction=LT
}

ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]{0}) parameter(0)
  ROOT %w = (s32[], f32[8]{0}) while(%a), condition=%test, body=%body
}
"""
  found = moved(text)
  assert found.counts == {"all-reduce": 12}
  assert found.collectives == {"all-reduce": 12 * 2 * 32}
  with pytest.raises(ValueError, match="how often does the loop"):
    moved(text.replace("constant(12)", "parameter(1)"))


def test_of_a_combined_gather_all_results_count():
  text = """HloModule m

ENTRY %main (a: f32[4], b: f32[8]) -> f32[16] {
  %a = f32[4]{0} parameter(0)
  %b = f32[8]{0} parameter(1)
  ROOT %s = ((f32[4]{0}, f32[8]{0}), (f32[16]{0}, f32[32]{0})) all-gather-start(%a, %b)
}
"""
  assert moved(text).collectives == {"all-gather": 4 * (16 + 32)}


def test_a_slice_within_a_fusion_of_a_fusion_reads_that_slice():
  text = """HloModule m

%taken (p: f32[64,8,8], k: s32[]) -> f32[8,8] {
  %p = f32[64,8,8]{2,1,0} parameter(0)
  %k = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = f32[1,8,8]{2,1,0} dynamic-slice(%p, %k, %z, %z), dynamic_slice_sizes={1,8,8}
  ROOT %b = f32[8,8]{1,0} bitcast(%s)
}

%product (q: f32[8,8], r: f32[64,8,8], i: s32[]) -> f32[8,8] {
  %q = f32[8,8]{1,0} parameter(0)
  %r = f32[64,8,8]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %f = f32[8,8]{1,0} fusion(%r, %i), kind=kLoop, calls=%taken
  ROOT %d = f32[8,8]{1,0} dot(%q, %f), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: f32[8,8], c: f32[64,8,8], n: s32[]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %c = f32[64,8,8]{2,1,0} parameter(1)
  %n = s32[] parameter(2)
  ROOT %o = f32[8,8]{1,0} fusion(%a, %c, %n), kind=kOutput, calls=%product
}
"""
  # Two arrays of 8 x 8 read and one written, and the place.
  assert moved(text).memory == 3 * 8 * 8 * 4 + 4
