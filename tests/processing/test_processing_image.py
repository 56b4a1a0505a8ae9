"""`ImageProcessor` against transformers' `CLIPImageProcessor` (PIL backend)."""

import io
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gcl_jax.errors import UserError
from gcl_jax.processing import ImageError, ImageProcessor
from gcl_jax.processing import image as image_module

SIZES = [
  (224, 224),
  (1, 1),
  (2, 1),
  (3, 7),
  (300, 200),
  (200, 300),
  (225, 224),
  (227, 224),
  (299, 224),
  (224, 299),
  (500, 333),
  (1024, 683),
  (31, 640),
  (640, 31),
  (100, 450),
  (1000, 60),
  (60, 1000),
  (2000, 20),
  (1, 300),
  (300, 1),
]


def noise(size, seed=0) -> Image.Image:
  shape = (size[1], size[0], 3)
  values = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
  return Image.fromarray(values)


def reference(image, **settings) -> np.ndarray:
  """(H, W, 3) after crop, uint8, by transformers."""
  from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

  processor = CLIPImageProcessorPil(do_rescale=False, do_normalize=False, **settings)
  out = processor(image, return_tensors="np")["pixel_values"]
  assert out.dtype == np.uint8
  return out[0].transpose(1, 2, 0)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_bit_equal(size):
  image = noise(size, seed=sum(size))
  got = ImageProcessor().pixels(image)
  assert got.dtype == np.uint8
  assert got.shape == (224, 224, 3)
  np.testing.assert_array_equal(got, reference(image))


@pytest.mark.parametrize(
  "settings",
  [
    {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
    {"size": {"shortest_edge": 96}, "crop_size": {"height": 65, "width": 65}},
    {"size": {"shortest_edge": 40}, "crop_size": {"height": 65, "width": 65}},
    {"size": {"height": 50, "width": 50}, "crop_size": {"height": 44, "width": 44}},
    {"resample": 2, "size": {"shortest_edge": 48}},
    {"resample": 1, "size": {"shortest_edge": 48}, "crop_size": 32},
  ],
)
def test_other_settings_are_bit_equal(settings):
  ours = ImageProcessor.from_dict(settings)
  for size in [(300, 200), (37, 91), (90, 1000), (1000, 90), (5, 400), (400, 5)]:
    image = noise(size)
    np.testing.assert_array_equal(ours.pixels(image), reference(image, **settings))


@pytest.mark.parametrize("resample", [1, 2, 3])
def test_the_strip_equals_the_plain_path(monkeypatch, resample):
  ours = ImageProcessor(shortest_edge=48, crop_size=40, resample=resample)
  rng = np.random.default_rng(resample)
  sizes = [(int(w), int(w * r)) for w, r in zip(
    rng.integers(1, 120, 40), rng.uniform(4, 40, 40), strict=True)]  # fmt: skip
  sizes += [(h, w) for w, h in sizes]
  images = [noise(size, 7) for size in sizes]
  strips = [ours.pixels(image) for image in images]
  monkeypatch.setattr(image_module, "_EXTREME", np.inf)
  for image, strip in zip(images, strips, strict=True):
    np.testing.assert_array_equal(ours.pixels(image), strip)


@pytest.mark.parametrize("size", [(1, 2_000_000), (2_000_000, 1)])
def test_extreme_shapes_cost_little(size):
  image = Image.new("RGB", size, (10, 200, 30))
  start = time.perf_counter()  # the whole picture would be 224 x 448,000,000
  got = ImageProcessor().pixels(image)
  assert time.perf_counter() - start < 2
  assert (got == [10, 200, 30]).all()


def test_real_photographs_are_bit_equal(real_data):
  paths = sorted((real_data / "flickr8k" / "images" / "test-00").glob("*.jpg"))[::50]
  assert len(paths) == 20
  for path in paths:
    with Image.open(path) as image:
      want = reference(image)
    np.testing.assert_array_equal(ImageProcessor().pixels(path), want)
    np.testing.assert_array_equal(ImageProcessor().pixels(path.read_bytes()), want)


def test_odd_images_are_bit_equal(real_data):
  for name in ("thin_1x1000.png", "thin_1000x1.png", "one_pixel.png", "rgba.png"):
    path = real_data / "odd_images" / name
    with Image.open(path) as image:
      np.testing.assert_array_equal(ImageProcessor().pixels(path), reference(image))
  with pytest.raises(ImageError):
    ImageProcessor().pixels(real_data / "odd_images" / "truncated.jpg")


def test_normalized_is_transformers(real_data):
  from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

  photo = next((real_data / "flickr8k" / "images" / "dev-00").glob("*.jpg"))
  with Image.open(photo) as image:
    want = CLIPImageProcessorPil()(image, return_tensors="np")["pixel_values"][0]
  ours = ImageProcessor()
  pixels = ours.pixels(photo)
  for got in (
    ours.normalize(pixels),
    ours.normalize(jnp.asarray(pixels)),
    jax.jit(ours.normalize)(pixels),
    ours.normalize(pixels.astype(np.float32)[None])[0],
  ):
    assert got.dtype == np.float32
    np.testing.assert_allclose(got.transpose(2, 0, 1), want, atol=1e-6, rtol=0)
  assert isinstance(ours.normalize(pixels), np.ndarray)
  assert isinstance(ours.normalize(jnp.asarray(pixels)), jax.Array)


def test_old_and_new_files_say_the_same():
  new = ImageProcessor(shortest_edge=336, crop_size=336).to_dict()
  old = {
    "crop_size": 336,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 336,
  }
  want = ImageProcessor(shortest_edge=336, crop_size=336)
  assert ImageProcessor.from_dict(new) == want
  assert ImageProcessor.from_dict(old) == want
  nested = {"image_processor": new, "processor_class": "CLIPProcessor", "size": 1}
  assert ImageProcessor.from_dict(nested) == want
  assert ImageProcessor.from_dict({}) == ImageProcessor()
  assert hash(want) == hash(ImageProcessor.from_dict(old))
  half = ImageProcessor.from_dict({"image_mean": 0.5, "image_std": [0.5] * 3})
  assert half.mean == half.std == (0.5, 0.5, 0.5)
  square = {"size": {"height": 64, "width": 64}, "do_center_crop": False}
  assert ImageProcessor.from_dict(square).image_size == 64
  assert ImageProcessor.from_dict({"do_normalize": False}).std == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
  "settings",
  [
    {"size": {"height": 64, "width": 32}},
    {"size": {"shortest_edge": 64, "longest_edge": 90}},
    {"size": {"max_height": 64, "max_width": 90}},
    {"size": "large"},
    {"size": 0},
    {"crop_size": {"height": 1, "width": 2}},
    {"do_resize": False},
    {"do_rescale": False},
    {"do_center_crop": False},
    {"rescale_factor": 1 / 127.5},
    {"rescale_factor": None},
    {"resample": 0},
    {"image_mean": [0.5, 0.5]},
    {"image_std": [0.0, 1.0, 1.0]},
    {"image_std": None},
  ],
)
def test_settings_that_would_give_other_pixels_are_refused(settings):
  with pytest.raises(UserError, match=r"settings in there\.json: .*\. Use the"):
    ImageProcessor.from_dict(settings, "there.json")


def test_truncated_bytes_name_the_reason():
  file = io.BytesIO()
  noise((40, 40)).save(file, "PNG")
  with pytest.raises(ImageError, match="truncated"):
    ImageProcessor().pixels(file.getvalue()[:2000])
