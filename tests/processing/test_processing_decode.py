"""Decoding: what `odd_images/expected.jsonl` says, and where each rule could break."""

import io
import json
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageOps

from gcl_jax.processing import ImageError, decode_image

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def encoded(image: Image.Image, format: str, **options) -> bytes:
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def rgb(image) -> np.ndarray:
  return np.asarray(decode_image(image)).astype(int)


def test_odd_images_do_as_expected(real_data):
  rows = (real_data / "odd_images" / "expected.jsonl").read_text().splitlines()
  rows = [json.loads(row) for row in rows]
  assert len(rows) == 49
  for row in rows:
    path = real_data / "odd_images" / row["image"]
    results = []
    for source in (path, path.read_bytes()):
      try:
        results.append(decode_image(source))
      except ImageError as error:
        results.append(error)
    from_path, from_bytes = results
    if row["expect"] in ("error", "warn"):  # the bomb of 144 megapixels: refused
      assert isinstance(from_path, ImageError), row
      assert isinstance(from_bytes, ImageError), row
      assert row["image"] in str(from_path)
      continue
    if row["expect"] == "ok-or-error" and isinstance(from_path, ImageError):
      continue
    assert from_path.mode == "RGB"
    turned = row["image"].startswith("exif") and row["size"] == [64, 96]
    assert list(from_path.size) == ([96, 64] if turned else row["size"])
    np.testing.assert_array_equal(from_path, from_bytes)


def test_exif_turns_files_and_bytes_but_not_pil_objects(real_data):
  folder = real_data / "odd_images"
  upright = rgb(folder / "exif_orientation_1.jpg")
  for k in range(1, 9):
    path = folder / f"exif_orientation_{k}.jpg"
    with Image.open(path) as image:
      want = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
      stored = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(rgb(path), want)
    np.testing.assert_array_equal(rgb(path.read_bytes()), want)
    assert np.abs(rgb(path) - upright).mean() < 8  # the same picture but for JPEG
    with Image.open(path) as image:
      np.testing.assert_array_equal(rgb(image), stored)
  with Image.open(folder / "exif_orientation_invalid.jpg") as image:
    stored = np.asarray(image)
  np.testing.assert_array_equal(rgb(folder / "exif_orientation_invalid.jpg"), stored)


def test_tiff_orientation_is_applied_once():
  image = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3))
  exif = Image.Exif()
  exif[0x0112] = 6
  turned = rgb(encoded(image, "TIFF", exif=exif))
  np.testing.assert_array_equal(turned, np.rot90(np.asarray(image), -1))


def test_transparency_is_composited_on_white():
  image = Image.new("RGBA", (1, 1), (10, 20, 30, 128))
  assert rgb(encoded(image, "PNG")).tolist() == [[[132, 137, 142]]]
  assert rgb(image).tolist() == [[[132, 137, 142]]]
  assert rgb(Image.new("LA", (1, 1), (0, 0))).tolist() == [[[255, 255, 255]]]
  palette = Image.new("P", (2, 1))
  palette.putpalette([10, 20, 30, 200, 100, 0])
  palette.putpixel((1, 0), 1)
  content = encoded(palette, "PNG", transparency=1)
  assert rgb(content).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_alpha_equals_transformers(real_data):
  from transformers.image_transforms import convert_to_rgb

  names = ["rgba.png", "grey_alpha.png", "palette_alpha.png", "cmyk.jpg"]
  names += ["palette_transparent_index.png", "lossless_alpha.webp", "bilevel.png"]
  for name in names:
    with Image.open(real_data / "odd_images" / name) as image:
      want = convert_to_rgb(image, return_numpy=True)
    np.testing.assert_array_equal(rgb(real_data / "odd_images" / name), want)


def test_sixteen_bit_grey_is_scaled():
  values = np.array([[0, 257, 128 * 257, 65535, 128, 129]], np.uint16)
  want = [0, 1, 128, 255, 0, 1]
  for format in ("PNG", "TIFF", "PPM"):
    content = encoded(Image.fromarray(values), format)
    assert rgb(content)[0, :, 0].tolist() == want, format
    assert rgb(content)[0, :, 2].tolist() == want, format
  for format in ("PNG", "PPM"):  # not 200: the file says sixteen bits
    dark = encoded(Image.fromarray(np.full((1, 1), 200, np.uint16)), format)
    assert rgb(dark)[0, 0, 0] == 1


def test_sixteen_bit_grey_with_a_transparent_value():
  values = np.array([[514, 65535, 1000]], np.uint16)
  content = encoded(Image.fromarray(values), "PNG", transparency=514)
  assert rgb(content)[0, :, 0].tolist() == [255, 255, 4]


def test_wide_ranges_are_scaled_or_refused():
  def tiff(values, dtype):
    return encoded(Image.fromarray(np.array([values], dtype)), "TIFF")

  assert rgb(tiff([0.0, 0.5, 1.0], np.float32))[0, :, 0].tolist() == [0, 128, 255]
  assert rgb(tiff([0.0, 100.4, 255.0], np.float32))[0, :, 0].tolist() == [0, 100, 255]
  assert rgb(Image.new("L", (1, 1), 77).convert("I"))[0, 0].tolist() == [77] * 3
  for values, dtype in [
    ([0, 1e5], np.float32),
    ([-1, 1], np.float32),
    ([np.nan, 0], np.float32),
    ([0, 70_000], np.int32),
  ]:
    with pytest.raises(ImageError):
      decode_image(tiff(values, dtype))


@pytest.mark.parametrize("name", ["bomb_60000x60000.png", "bomb_12000x12000.png"])
def test_bombs_are_refused_before_anything_is_decoded(real_data, name):
  content = (real_data / "odd_images" / name).read_bytes()
  decode_image(encoded(Image.new("RGB", (1, 1)), "PNG"))  # imports, once
  tracemalloc.start()
  start = time.perf_counter()
  with pytest.raises(ImageError, match="limit"):
    decode_image(content)
  assert time.perf_counter() - start < 0.5
  # Pillow's pixels are outside of tracemalloc's view: time says that none were made.
  assert tracemalloc.get_traced_memory()[1] < 2**20
  tracemalloc.stop()


def test_the_pixel_limit_can_be_chosen():
  content = encoded(Image.new("RGB", (11, 10)), "PNG")
  assert decode_image(content, max_pixels=110).size == (11, 10)
  with pytest.raises(ImageError, match="11 x 10"):
    decode_image(content, max_pixels=109)
  with pytest.raises(ImageError, match="11 x 10"):
    decode_image(Image.new("RGB", (11, 10)), max_pixels=109)


def test_every_failure_is_an_image_error(tmp_path):
  missing = tmp_path / "missing.jpg"
  with pytest.raises(ImageError, match=r"missing\.jpg: no such file"):
    decode_image(missing)
  with pytest.raises(ImageError):
    decode_image(tmp_path)
  with pytest.raises(ImageError, match="NoneType"):
    decode_image(None)
  with pytest.raises(ImageError, match="no pixels"):
    decode_image(Image.new("RGB", (0, 3)))
  with pytest.raises(ImageError, match="known format"):
    decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
  content = encoded(Image.new("RGB", (50, 50), "red"), "JPEG")
  for stop in (0, 2, 10, len(content) // 2):
    with pytest.raises(ImageError):
      decode_image(content[:stop])


def test_rgb_objects_come_back_as_they_are():
  image = Image.new("RGB", (3, 2), "red")
  assert decode_image(image) is image
  assert decode_image(bytearray(encoded(image, "PNG"))).size == (3, 2)
