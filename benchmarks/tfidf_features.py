"""TF-IDF rows of captions, as frozen text features for the separation term.

    python -m benchmarks.tfidf_features --config=configs/small.py \
      --config.data.path=data/flickr8k --output=tfidf.npy

One unit row per training record, all its captions taken together, reduced to --width
columns by a truncated SVD. Needs scikit-learn.
"""

from __future__ import annotations

import numpy as np
from absl import flags
from ml_collections import config_flags

from gcl_jax import command_line
from gcl_jax.errors import UserError

_FLAGS = flags.FLAGS


def _define_flags() -> None:
  config_flags.DEFINE_config_file("config", None, "a recipe")
  flags.DEFINE_string("output", "tfidf.npy", "the file to write")
  flags.DEFINE_integer("width", 256, "columns")


def main() -> None:
  """Reads the training captions, writes the rows."""
  try:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize
  except ImportError:
    raise UserError(
      "this script needs scikit-learn: pip install scikit-learn"
    ) from None
  from gcl_jax.data import open_source

  data = _FLAGS.config.data
  source = open_source(data, split=data.train_split)
  texts = [" ".join(source[i]["texts"]) for i in range(len(source))]
  sparse = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit_transform(texts)
  rows = TruncatedSVD(_FLAGS.width, random_state=0).fit_transform(sparse)
  np.save(_FLAGS.output, normalize(rows).astype(np.float32))
  print(f"written: {_FLAGS.output} {rows.shape}")


if __name__ == "__main__":
  _define_flags()
  command_line.run(main)
