"""The mesh from its sizes, and first-match rules over paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gcl_jax import sharding
from gcl_jax.errors import UserError


@pytest.mark.parametrize(
  ("sizes", "shape"),
  [
    ({}, (8, 1, 1)),
    ({"data": 2, "fsdp": -1}, (2, 4, 1)),
    ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
  ],
)
def test_minus_one_takes_the_rest_of_the_devices(sizes, shape):
  mesh = sharding.make_mesh(**sizes)
  assert tuple(mesh.shape[axis] for axis in sharding.AXES) == shape


@pytest.mark.parametrize(
  "sizes", [{"data": 3}, {"data": -1, "fsdp": -1}, {"data": 0}, {"data": -1, "fsdp": 3}]
)
def test_sizes_that_do_not_fit_are_refused_by_name(sizes):
  with pytest.raises(UserError, match=r"config\.mesh"):
    sharding.make_mesh(**sizes)


def test_first_rule_that_matches_the_whole_path_wins():
  rules = [("text/.*", 1), (".*/kernel", 2), ("text/x", 3)]
  assert sharding.first_match(rules, "text/kernel", 0) == 1
  assert sharding.first_match(rules, "vision/kernel", 0) == 2
  assert sharding.first_match(rules, "context/text/bias", 0) == 0  # not a part of it


def test_patterns_without_a_parameter_are_found():
  tree = {"text": {"kernel": jnp.zeros(2)}}
  assert sharding.unused_patterns([("text/.*", 1), ("txt/.*", 2)], tree) == ["txt/.*"]


def test_an_axis_that_does_not_divide_is_an_error_not_a_silent_copy():
  mesh = sharding.make_mesh(data=1, fsdp=8)
  tree = {"kernel": jax.ShapeDtypeStruct((6, 16), jnp.float32)}
  with pytest.raises(UserError, match=r"config.mesh.fsdp is 8, .* the 6 of kernel"):
    sharding.shardings(mesh, tree, [(".*", P("fsdp", None))])
  placed = sharding.shardings(mesh, tree, [(".*", P(None, "fsdp"))])
  assert placed["kernel"].spec == P(None, "fsdp")
  with pytest.raises(ValueError, match="no sharding rule"):
    sharding.shardings(mesh, tree, [("other", P())])


def test_a_batch_is_split_over_data_and_fsdp():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  rows = np.arange(16).reshape(16, 1)
  placed = sharding.put_batch(mesh, {"rows": rows})["rows"]
  assert sharding.batch_devices(mesh) == 8
  assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 1)}
  np.testing.assert_array_equal(placed, rows)
