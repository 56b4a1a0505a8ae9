"""A run's folder in a bucket: Orbax, etils and tensorstore really write to `gs://`."""

import importlib
import json
import os
from pathlib import Path

import fake_gcs
import jax
import jax.numpy as jnp
import pytest
from checkpoint_cases import same_bits
from fsspec.registry import _registry
from orbax.checkpoint._src.path import gcs_utils

from gcl_jax.checkpoints import Checkpoints, is_run, manager, read_results, saved_steps
from gcl_jax.checkpoints.export import check_output
from gcl_jax.checkpoints.folder import check_free, run_folder, write_result
from gcl_jax.errors import UserError
from gcl_jax.paths import RemotePath, local_copy, local_draft
from gcl_jax.training.config import default_config
from gcl_jax.training.spool import Spool
from gcl_jax.training.writers import MetricWriter

RUN = "gs://bucket/runs/a"


@pytest.fixture
def bucket(monkeypatch):
  fake_gcs.serve()
  monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
  monkeypatch.setenv("EPATH_USE_TF", "false")
  for scheme in fake_gcs.Bucket.protocol:
    monkeypatch.setitem(_registry, scheme, fake_gcs.Bucket)
  monkeypatch.setattr(fake_gcs.Bucket, "store", {})
  monkeypatch.setattr(fake_gcs.Bucket, "put", [])
  # The one question that Orbax asks through Google's own library.
  monkeypatch.setattr(gcs_utils, "get_bucket", lambda name: object())
  return fake_gcs.Bucket


def state(seed=0):
  numbers = jax.random.normal(jax.random.key(seed), (8, 33))
  tree = {"params": {"kernel": numbers}, "step": jnp.int32(seed)}
  return jax.device_put(tree, jax.devices()[0])


def test_checkpoints_in_a_bucket_come_back_to_the_bit(bucket):
  checkpoints = Checkpoints(RUN, keep_last=2, keep_best=0)
  assert str(checkpoints._manager.directory) == f"{RUN}/checkpoints"
  for step in (1, 2, 3):
    checkpoints.save(step, state(step), position=step)
  checkpoints.close()
  assert saved_steps(RUN) == [2, 3]
  assert all(name.startswith("/bucket/runs/a/checkpoints/") for name in bucket.store)
  again = Checkpoints(RUN)
  restored, position = again.restore(again.latest(), state(0))
  assert position == 3 and same_bits(restored, state(3))
  again.close()


def test_a_step_that_was_cut_off_in_a_bucket_does_not_exist(bucket):
  """There is no rename: a half step has the name of a whole one."""
  checkpoints = Checkpoints(RUN)
  checkpoints.save(1, state(1), position=1)
  checkpoints.save(2, state(2), position=2)
  checkpoints.close()
  del bucket.store["/bucket/runs/a/checkpoints/2/commit_success.txt"]
  assert saved_steps(RUN) == [1]
  again = Checkpoints(RUN)
  assert again.latest() == 1
  again.save(2, state(5), position=2)
  again.wait()
  assert saved_steps(RUN) == [1, 2]
  assert same_bits(again.restore(2, state(0))[0], state(5))
  again.close()


def test_the_store_lets_orbax_in_or_one_message_says_so(bucket, monkeypatch):
  def refuse(name):
    raise OSError("Project was not passed and could not be determined")

  monkeypatch.setattr(gcs_utils, "get_bucket", refuse)
  with pytest.raises(UserError, match=r"Project was not passed.*GOOGLE_CLOUD_PROJECT"):
    Checkpoints(RUN)


def test_small_files_are_put_whole(bucket):
  write_result(RUN, 3, {"recall": 1.0})
  assert read_results(RUN) == {3: {"recall": 1.0}}
  assert bucket.put == ["gs://bucket/runs/a/results/000000003.json"]
  assert (
    read_results("gs://bucket/other") == {} and saved_steps("gs://bucket/other") == []
  )


def test_folders_go_up_and_come_down(bucket):
  folder = RemotePath(f"{RUN}/initial")
  with local_draft(folder) as here:
    (here / "sub").mkdir()
    (here / "sub" / "a").write_text("1")
    (here / "b").write_text("2")
    assert bucket.put == []
  with local_copy(folder) as here:
    assert (here / "sub" / "a").read_text() == "1" and (here / "b").read_text() == "2"
  assert not here.exists()
  with pytest.raises(KeyError), local_draft(folder / "half") as here:
    (here / "c").touch()
    raise KeyError
  assert not (folder / "half").exists()


def test_a_bucket_with_something_else_is_refused(bucket):
  check_free(RUN)
  bucket().pipe_file(f"{RUN}/thesis.tex", b"do not touch")
  with pytest.raises(
    UserError, match=r"gs://bucket/runs/a holds something else \(thesis"
  ):
    check_free(RUN)
  bucket().pipe_file(f"{RUN}/run.json", b"{}")
  check_free(RUN)
  assert is_run(RUN)


def lines(raw):
  return [json.loads(line)["step"] for line in raw.splitlines()]


def test_growing_files_are_in_the_bucket_before_their_checkpoint(bucket):
  config = default_config()
  metrics = RemotePath(f"{RUN}/metrics.jsonl")
  spool = Spool(run_folder(RUN), fetch=("metrics.jsonl",))
  writer = MetricWriter(spool.folder, config, 0)
  checkpoints = Checkpoints(RUN, beside=spool.sync)
  writer.write(1, {"loss": 1.0})
  assert not metrics.exists()
  checkpoints.save(1, state(1), position=1)
  checkpoints.wait()
  order = [address.removeprefix(f"{RUN}/") for address in bucket.put]
  commit = order.index("checkpoints/1/commit_success.txt")
  assert order.index("metrics.jsonl") < commit
  assert sum(name.startswith("tensorboard/events") for name in order) == 1
  writer.write(2, {"loss": 2.0})  # a kill: nothing is closed
  checkpoints.close()

  again = Spool(run_folder(RUN), fetch=("metrics.jsonl",))
  writer = MetricWriter(again.folder, config, 1)
  writer.write(2, {"loss": 3.0})
  writer.close()
  again.close()
  assert lines(metrics.read_text()) == [1, 2]
  assert json.loads(metrics.read_text().splitlines()[1])["loss"] == 3.0
  assert not again.folder.exists()


def test_what_has_not_changed_is_not_put_again_and_a_refusal_is_no_end(
  bucket, monkeypatch, capsys
):
  spool = Spool(run_folder(RUN))
  (spool.folder / "metrics.jsonl").write_text("1")
  spool.sync()
  spool.sync()
  assert len(bucket.put) == 1
  (spool.folder / "metrics.jsonl").write_text("12")
  with monkeypatch.context() as patch:

    def refuse(*_, **__):
      raise OSError("503")

    patch.setattr(bucket, "put_file", refuse)
    spool.sync()
  assert (
    "gs://bucket/runs/a/metrics.jsonl is not up to date (503)"
    in capsys.readouterr().err
  )
  spool.close()
  assert RemotePath(f"{RUN}/metrics.jsonl").read_text() == "12"


def test_a_local_run_writes_where_it_is(tmp_path):
  spool = Spool(tmp_path)
  assert spool.folder == tmp_path
  spool.close()
  assert tmp_path.is_dir()


@pytest.mark.parametrize("url", ["s3://bucket/a", "file:///a", "gs:/bucket/a"])
def test_other_addresses_are_refused(url):
  with pytest.raises(UserError, match="local or mounted folders and in buckets"):
    check_free(url)
  with pytest.raises(UserError, match="local or mounted folders and in buckets"):
    is_run(Path(url))


def test_a_path_that_lost_a_slash_is_explained():
  with pytest.raises(UserError, match="as a string, a Path loses a slash"):
    check_free(Path(RUN))


def test_a_missing_library_is_one_message(monkeypatch):
  import_module = importlib.import_module

  def missing(name, *args):
    if name == "gcsfs":
      raise ImportError(name)
    return import_module(name, *args)

  monkeypatch.setattr(importlib, "import_module", missing)
  with pytest.raises(UserError, match="pip install gcsfs"):
    check_free(RUN)


def test_an_export_is_a_local_folder():
  with pytest.raises(UserError, match="an export is a folder of this machine"):
    check_output(Path("gs://bucket/export"))


def test_etils_does_not_go_through_tensorflow(monkeypatch, bucket):
  monkeypatch.delenv("EPATH_USE_TF")
  assert str(manager._for_orbax(RUN)) == RUN
  assert os.environ["EPATH_USE_TF"] == "false"
