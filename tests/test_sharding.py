"""The mesh from its sizes, and first-match rules over paths."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gcl_jax import sharding
from gcl_jax.errors import UserError
from gcl_jax.models import CLIPConfig, build, named_config


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


class Device:
  def __init__(self, process_index):
    self.process_index = process_index


@pytest.mark.parametrize(
  ("held", "share"),
  [
    # device -> (process, part of the batch that it holds)
    ([(0, 0), (0, 1), (1, 2), (1, 3)], ((2, 3), 4)),
    ([(0, 1), (0, 0), (1, 3), (1, 2)], ((2, 3), 4)),
    ([(0, 0), (0, 1), (1, 0), (1, 1)], ((0, 1), 2)),  # tensor spans both
    ([(0, 0), (0, 0), (1, 1), (1, 1)], ((1,), 2)),
    ([(0, 0), (0, 2), (1, 1), (1, 3)], ((1, 3), 4)),  # a torus
  ],
)
def test_processes_read_what_their_devices_hold(held, share, monkeypatch):
  parts = max(part for _, part in held) + 1
  where = {Device(process): (slice(part, part + 1),) for process, part in held}
  monkeypatch.setattr(sharding, "batch_devices", lambda mesh: parts)
  monkeypatch.setattr(
    sharding,
    "batch_sharding",
    lambda mesh: types.SimpleNamespace(devices_indices_map=lambda shape: where),
  )
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  assert sharding.batch_share(None) == share


def test_rows_of_a_share():
  share = sharding.Share((1, 3), 4)
  assert share.rows(8).tolist() == [2, 3, 6, 7]
  assert share.rows(8, cuts=2).tolist() == [1, 3, 5, 7]


def test_scattered_rows_come_to_their_devices():
  """A mesh whose devices of one process are not neighbours in the batch."""
  devices = np.array(jax.devices())[[0, 4, 1, 5, 2, 6, 3, 7]]
  mesh = jax.sharding.Mesh(devices.reshape(8, 1, 1), sharding.AXES)
  rows = np.arange(16).reshape(16, 1)
  placed = sharding.put_batch(mesh, {"x": rows})["x"]
  np.testing.assert_array_equal(placed, rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:4x4", "v5e:16x16", "v5p:4x4x4"])
def test_every_host_of_a_real_slice_has_a_share(name, monkeypatch):
  from gcl_jax.training.ahead import slice_devices

  devices = slice_devices(name)
  hosts = sorted({device.process_index for device in devices})
  for fsdp in (1, 4, -1):
    mesh = sharding.make_mesh(data=1 if fsdp == -1 else -1, fsdp=fsdp, devices=devices)
    seen = []
    for host in hosts:
      monkeypatch.setattr(jax, "process_index", lambda host=host: host)
      share = sharding.batch_share(mesh)
      assert len(share.held) == len(devices) // len(hosts)
      seen += share.held
    assert sorted(seen) == list(range(len(devices)))


def test_every_parameter_has_a_place_and_moments_lie_with_it():
  model = build(CLIPConfig.from_hf(named_config("ViT-B/32").to_hf()))
  shapes = model.abstract()
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
  placed = sharding.shardings(mesh, shapes, sharding.PARAMETER_RULES)

  def held(shape, place):
    return int(np.prod(place.shard_shape(shape.shape)))

  whole = sum(x.size for x in jax.tree.leaves(shapes))
  mine = sum(jax.tree.leaves(jax.tree.map(held, shapes, placed)))
  # The token embedding is split over fsdp alone, norms and positions not at all.
  assert whole / 8 < mine < whole / 6
  query = placed["vision"]["blocks"]["attention"]["query"]["kernel"]
  assert query.spec == P(None, "fsdp", "tensor")

  moments = {"0": {"mu": shapes, "count": jax.ShapeDtypeStruct((), "int32")}}
  lying = sharding.state_shardings(mesh, moments, shapes, placed)["0"]
  assert jax.tree.leaves(lying["mu"]) == jax.tree.leaves(placed)
  assert lying["count"].spec == P()


def test_a_leaf_of_another_shape_lies_everywhere():
  mesh = sharding.make_mesh(data=1, fsdp=8)
  params = {"text_projection": {"kernel": jax.ShapeDtypeStruct((16, 4), "float32")}}
  placed = sharding.shardings(mesh, params, sharding.PARAMETER_RULES)
  rows = {
    "row": {"text_projection": {"kernel": jax.ShapeDtypeStruct((16,), "float32")}}
  }
  found = sharding.state_shardings(mesh, rows, params, placed)
  assert found["row"]["text_projection"]["kernel"].spec == P()


def test_put_copies_what_every_process_holds():
  mesh = sharding.make_mesh(data=1, fsdp=8)
  rows = np.arange(32.0).reshape(16, 2)
  placed = sharding.put({"x": rows}, {"x": sharding.NamedSharding(mesh, P("fsdp"))})
  assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(2, 2)}
  np.testing.assert_array_equal(placed["x"], rows)
