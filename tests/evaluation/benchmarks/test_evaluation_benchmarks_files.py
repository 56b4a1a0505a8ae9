"""Damaged and misshapen files of any benchmark: one message, and lines end where they do."""

import gzip

import pyarrow as pa
import pytest

from gcl_jax.errors import UserError
from gcl_jax.evaluate import check_output
from gcl_jax.evaluation.benchmarks.files import Files


@pytest.fixture
def files(tmp_path):
  return Files(tmp_path, "a benchmark", "the layout")


def test_a_damaged_gzip_is_told(files):
  packed = bytearray(gzip.compress(b'{"a": "b"}\n' * 500, mtime=0))
  packed[12:40] = b"\xff" * 28  # inside the deflated stream: zlib.error
  (files.root / "x.json.gz").write_bytes(packed)
  for read in (
    lambda: files.json("x.json"),
    lambda: files.text("x.json"),
    lambda: files.json_lines("x.json", {"a": pa.string()}),
  ):
    with pytest.raises(UserError, match=r"x\.json\.gz cannot be read: .*download"):
      read()


def test_json_that_is_too_deep_is_told(files):
  (files.root / "x.json").write_text("[" * 200_000)
  with pytest.raises(UserError, match=r"x\.json cannot be read"):
    files.json("x.json")
  with pytest.raises(UserError, match=r"x\.json, line 1: "):
    files.objects("x.json", {})


def test_a_table_that_csv_refuses_is_told(files):
  (files.root / "x.csv").write_text("a,b\n1," + "2" * 200_000 + "\n")
  with pytest.raises(UserError, match=r"x\.csv cannot be read: field larger"):
    files.rows("x.csv")


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\x1c", "\x0b"])
def test_only_line_feeds_end_lines(files, mark):
  (files.root / "x.csv").write_text(f'a,b\n1,x{mark}y\n2,"p\nq"\n', encoding="utf-8")
  rows = files.rows("x.csv")
  assert rows == [{"a": "1", "b": f"x{mark}y"}, {"a": "2", "b": "p\nq"}]
  text = f"x{mark}y" if mark > "\x1f" else "xy"  # JSON itself forbids the others
  (files.root / "x.jsonl").write_bytes(f'{{"a": "{text}"}}\r\n\n'.encode())
  assert files.objects("x.jsonl", {"a": str}) == [{"a": text}]
  (files.root / "x.txt").write_text(f"q{mark} 0\n", encoding="utf-8")
  assert files.lines("x.txt")[0] == f"q{mark} 0"


@pytest.mark.parametrize("text", ["5", '"checkpoint"', '["checkpoint"]', "[" * 200_000])
def test_an_output_that_is_no_evaluation_is_kept(tmp_path, text):
  path = tmp_path / "x.json"
  path.write_text(text)
  with pytest.raises(UserError, match="exists and is no evaluation of ours"):
    check_output(path)
  assert path.read_text() == text
  path.write_text('{"checkpoint": "runs/a"}')
  check_output(path)
