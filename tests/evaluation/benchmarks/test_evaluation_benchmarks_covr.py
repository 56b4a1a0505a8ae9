"""CoVR: which frames, how they become one vector, real videos and extracted frames."""

import csv
import sys

import av
import numpy as np
import pytest
from benchmark_cases import Embedder, evaluated, paint
from PIL import Image

from gcl_jax.errors import UserError
from gcl_jax.evaluation.benchmarks import Options, open_benchmark
from gcl_jax.evaluation.benchmarks.video import VideoPictures, middle, spread
from gcl_jax.processing import decode_image


def shade(n):
  """The grey of frame n; far enough apart to survive compression."""
  return 10 + 11 * n


def write_video(path, frames, first=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  with av.open(str(path), "w") as container:
    stream = container.add_stream("mpeg4", rate=10)
    stream.width = stream.height = 32
    stream.bit_rate = 1_000_000
    for n in range(first, first + frames):
      picture = Image.new("RGB", (32, 32), (shade(n),) * 3)
      container.mux(stream.encode(av.VideoFrame.from_image(picture)))
    container.mux(stream.encode(None))


def write_frames(folder, frames, first=0):
  for n in range(frames):
    paint(folder / f"{n:03d}.png", (shade(first + n),) * 3)


def write_table(root, rows):
  fields = ("txt1", "txt2", "pth1", "pth2", "edit", "scores")
  with (root / "webvid8m-covr_test.csv").open("w", newline="") as file:
    table = csv.DictWriter(file, fields)
    table.writeheader()
    table.writerows({field: row.get(field, "") for field in fields} for row in rows)


def grey(picture):
  return float(np.asarray(decode_image(picture)).mean())


def on_a_circle(picture):
  """Greys as directions, so that every frame can be told from a mean."""
  angle = grey(picture) / 255 * np.pi / 2
  return 2 * np.array([np.cos(angle), np.sin(angle), 0])


def opened(root, **choices):
  return open_benchmark("covr", str(root), Options(**choices))


def test_which_frames():
  assert [middle(n) for n in (1, 2, 9, 10)] == [0, 1, 4, 5]
  assert spread(15, 15) == list(range(15))
  assert spread(30, 15) == list(range(0, 30, 2))
  assert spread(300, 15) == [9 + 20 * k for k in range(15)]
  assert spread(4, 15) == [0, 1, 2, 3]
  assert spread(0, 15) == []


def test_real_videos_give_the_frames_that_were_written(tmp_path):
  write_video(tmp_path / "a/long.mp4", 20)
  write_frames(tmp_path / "a/frames", 6)
  pictures = VideoPictures(tmp_path)
  assert [pictures.count(f"a/{n}") for n in ("long", "frames", "none")] == [20, 6, 0]
  asked = ["a/long#3", "a/long#17", "a/frames#5", "a/long#0", "a/long#99", "a/none#0"]
  assert pictures.missing(asked).tolist() == [False] * 4 + [True] * 2
  frames = pictures.load(asked)
  assert frames[4:] == [None, None]
  want = [shade(n) for n in (3, 17, 5, 0)]
  np.testing.assert_allclose([grey(f) for f in frames[:4]], want, atol=5)


def rows_of_three():
  """b -> a, a -> b, c -> c; written in another order than the targets'."""
  pairs = [("x/c", "x/c"), ("x/a", "x/b"), ("x/b", "x/a")]
  return [
    {
      "pth1": one,
      "pth2": two,
      "edit": "Make (it) #better!",
      "scores": "[0.1, 0.9, 0.2]",
    }
    for one, two in pairs
  ]


def unit(row):
  return row / np.linalg.norm(row)


@pytest.mark.parametrize("targets", ["mean", "query", "middle"])
def test_targets_by_hand_and_the_query_s_own_video_masked(tmp_path, targets):
  for n, name in enumerate("abc"):
    write_frames(tmp_path / f"videos/x/{name}", 3, first=6 * n)
  write_table(tmp_path, rows_of_three())
  embedder = Embedder(on_a_circle, lambda words: np.array([0, 0, 0.5]))
  run = tmp_path / "run"
  benchmark = opened(tmp_path, targets=targets)
  result = evaluated(benchmark, embedder, names=False, export_run=str(run))

  def frames(first):
    pictures = [Image.new("RGB", (1, 1), (shade(first + k),) * 3) for k in range(3)]
    return np.array([unit(on_a_circle(p)) for p in pictures])

  weights = {"mean": [1, 1, 1], "middle": [0, 1, 0]}.get(targets)
  if weights is None:
    weights = np.exp(np.array([0.1, 0.9, 0.2]) / 0.1)
  want = [unit(weights @ frames(6 * n)) for n in range(3)]
  got = np.load(run / "test/test/cand_embed.npy")
  np.testing.assert_allclose(got, want, atol=1e-5)
  queries = np.load(run / "test/test/query_embed.npy")
  middles = [unit(frames(6 * n)[1] + [0, 0, 1]) for n in (1, 0, 2)]  # sorted by pth2
  np.testing.assert_allclose(queries, middles, atol=1e-5)
  assert (run / "test/test/cand_ids.txt").read_text().split() == ["x/a", "x/b", "x/c"]
  masked = [line.split() for line in (run / "test/test/excluded.txt").open()]
  assert masked == [["q0", "x/b"], ["q1", "x/a"], ["q2", "x/c"]]
  block = result["tasks"]["test"]["scores"]["test"]
  # b finds a rather than c (a tie of angles is impossible here); c's answer is masked.
  assert block["recall"]["50"] == pytest.approx(200 / 3)
  assert result["protocol"]["fusion"] == "unit"
  assert result["protocol"]["targets"] == targets
  assert {text for _, text in embedder.asked if text} == {"make it better"}


def test_scores_that_do_not_fit_weigh_alike(tmp_path):
  rows = rows_of_three()
  for row, scores in zip(rows, ("[0.1, 0.9]", "none", "[1, 2, nan]"), strict=True):
    row["scores"] = scores
  for name in "abc":
    write_frames(tmp_path / f"videos/x/{name}", 3)
  write_table(tmp_path, rows)
  parts = opened(tmp_path, targets="query").tasks[0].scorings[0].pool[0].parts
  np.testing.assert_allclose(parts.weights, 1 / 3)


def test_missing_videos_are_told(tmp_path):
  write_table(tmp_path, rows_of_three())
  with pytest.raises(UserError, match=r"(?s)none of the videos .* x/a\.mp4 and others"):
    opened(tmp_path)
  write_frames(tmp_path / "videos/x/a", 3)
  write_frames(tmp_path / "videos/x/b", 3)
  (tmp_path / "videos/x/c.mp4").write_bytes(b"no video")
  embedder = Embedder(on_a_circle, lambda words: np.array([0, 0, 0.5]))
  result = evaluated(opened(tmp_path), embedder, names=False)
  block = result["tasks"]["test"]["scores"]["test"]
  assert block["partial"]["queries_left_out"] == 1
  assert block["partial"]["candidates_left_out"] == 1
  assert set(result["summary"].values()) == {None}


def test_tables_that_do_not_fit(tmp_path):
  with pytest.raises(
    UserError, match=r"(?s)lacks webvid8m-covr_test\.csv.*videos/<folder>"
  ):
    opened(tmp_path)
  write_frames(tmp_path / "videos/x/a", 1)
  write_table(tmp_path, [*rows_of_three(), rows_of_three()[0]])
  with pytest.raises(UserError, match="the targets: 1 ids are there more than once"):
    opened(tmp_path)
  (tmp_path / "webvid8m-covr_test.csv").write_text("pth1,pth2\na,b\n")
  with pytest.raises(UserError, match="lacks 'edit'"):
    opened(tmp_path)
  (tmp_path / "webvid8m-covr_test.csv").write_text(
    "txt1,txt2,pth1,pth2,edit,scores\na,b,x/a\n"
  )
  with pytest.raises(UserError, match="lacks 'pth2'"):
    opened(tmp_path)
  with pytest.raises(UserError, match="--targets=all: there are mean"):
    opened(tmp_path, targets="all")


def test_without_a_decoder_the_message_says_what_to_install(tmp_path, monkeypatch):
  write_video(tmp_path / "videos/x/a.mp4", 2)
  write_table(tmp_path, rows_of_three())
  monkeypatch.setitem(sys.modules, "av", None)
  with pytest.raises(UserError, match="pip install av; or extract the frames"):
    opened(tmp_path)
