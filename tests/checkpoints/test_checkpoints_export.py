"""An export appears whole or not at all, and deletes nothing that is not its own."""

import pytest

from gcl_jax.checkpoints import export
from gcl_jax.checkpoints.export import check_output, export_run
from gcl_jax.errors import UserError


def names(folder):
  return sorted(p.name for p in folder.iterdir())


def stop(*_, **__):
  raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["write_pretrained", "model_card", "_put_in_place"])
def test_an_interrupted_export_is_redone(tiny_run, tmp_path, monkeypatch, where):
  with monkeypatch.context() as patch:
    patch.setattr(export, where, stop)
    with pytest.raises(KeyboardInterrupt):
      export_run(tiny_run, tmp_path / "hf")
  assert names(tmp_path) == ["hf.part"]
  (tmp_path / "hf.part" / ".model.safetensors.half").touch()  # as a kill leaves it
  export_run(tiny_run, tmp_path / "hf")
  assert names(tmp_path) == ["hf"]
  assert set(names(tmp_path / "hf")) <= export._FILES
  assert "model.safetensors" in names(tmp_path / "hf")


def test_an_earlier_export_stays_until_the_new_one_is_whole(
  tiny_run, tmp_path, monkeypatch
):
  folder = export_run(tiny_run, tmp_path / "hf", table="first")
  before = {p.name: p.read_bytes() for p in folder.iterdir()}
  with monkeypatch.context() as patch:
    patch.setattr(export, "write_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
      export_run(tiny_run, folder, table="second")
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
  export_run(tiny_run, folder, table="second")
  assert names(tmp_path) == ["hf"]
  assert names(folder) == sorted(before)
  assert "second" in (folder / "README.md").read_text()


@pytest.mark.parametrize("renames", [0, 1])
def test_stopped_between_the_renames(tmp_path, monkeypatch, renames):
  part, output = tmp_path / "hf.part", tmp_path / "hf"
  for folder, text in ((part, "new"), (output, "earlier")):
    folder.mkdir()
    for name in ("config.json", "gcl_jax.json"):
      (folder / name).write_text(text)
  (part / export._MARK).touch()
  done = []
  rename = type(part).rename

  def rename_or_stop(path, target):
    if len(done) == renames:
      raise KeyboardInterrupt
    done.append(target)
    rename(path, target)

  with monkeypatch.context() as patch:
    patch.setattr(type(part), "rename", rename_or_stop)
    with pytest.raises(KeyboardInterrupt):
      export._put_in_place(part, output)
  check_output(output)  # nothing is in the next export's way
  (part / export._MARK).touch()
  export._put_in_place(part, output)
  assert names(tmp_path) == ["hf"]
  assert names(output) == ["config.json", "gcl_jax.json"]
  assert (output / "config.json").read_text() == "new"


def test_a_discard_that_stops_halfway_leaves_the_mark(tmp_path, monkeypatch):
  folder = tmp_path / "hf.part"
  folder.mkdir()
  for name in (export._MARK, "vocab.json", "merges.txt"):
    (folder / name).touch()
  deleted = []
  unlink = type(folder).unlink

  def unlink_or_stop(path, missing_ok=False):
    if deleted:
      raise KeyboardInterrupt
    deleted.append(path)
    unlink(path, missing_ok)

  with monkeypatch.context() as patch:
    patch.setattr(type(folder), "unlink", unlink_or_stop)
    with pytest.raises(KeyboardInterrupt):
      export._discard(folder)
  assert len(names(folder)) == 2
  check_output(tmp_path / "hf")
  export._discard(folder)
  assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["hf", "hf.part", "hf.old"])
def test_a_folder_with_something_else_is_refused_and_kept(tiny_run, tmp_path, place):
  (tmp_path / place).mkdir()
  (tmp_path / place / "config.json").touch()
  (tmp_path / place / "notes.txt").touch()
  with pytest.raises(UserError, match=r"notes\.txt" if place == "hf" else place):
    export_run(tiny_run, tmp_path / "hf")
  assert names(tmp_path / place) == ["config.json", "notes.txt"]


def test_an_earlier_export_with_a_users_file_is_refused_and_kept(tmp_path):
  for name in ("config.json", "gcl_jax.json", "model.safetensors", "evaluation.json"):
    (tmp_path / name).touch()
  with pytest.raises(UserError, match=r"\(evaluation\.json\)"):
    check_output(tmp_path)


def test_through_a_link_the_folder_behind_it_is_written(tiny_run, tmp_path):
  (tmp_path / "disk" / "hf").mkdir(parents=True)
  (tmp_path / "link").symlink_to(tmp_path / "disk" / "hf")
  export_run(tiny_run, tmp_path / "link")
  assert (tmp_path / "link").is_symlink()
  assert "config.json" in names(tmp_path / "disk" / "hf")
