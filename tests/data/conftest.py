"""A small processor, and a cache of indexes that is not the user's."""

from __future__ import annotations

import pytest

from gcl_jax.processing import Processor, Tokenizer, default_clip_processor

SIDE = 16


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
  """Indexes of tables go to a folder of this test."""
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
  return folder


@pytest.fixture(scope="session")
def processor() -> Processor:
  """Pictures of 16 x 16 pixels and a vocabulary of bytes, at most 20 tokens."""
  return default_clip_processor(SIDE, Tokenizer.train(["a b"], 514, 20))
