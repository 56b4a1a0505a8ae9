"""Where the frozen text features of AlignCLIP's separation term come from."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from gcl_jax.errors import UserError


def needs_initial_tower(config: ConfigDict) -> bool:
  """Whether the text tower that the run started from gives the features."""
  asked = config.loss.separation_features == "initial_text_tower"
  return bool(config.loss.intra_modal_separation) and asked


def read_features(config: ConfigDict, records: int | None = None) -> np.ndarray | None:
  """The features (records, F) of the file that the config names, mapped into memory.

  Args:
    config: the run's.
    records: of the training source; None where there is none to compare with.

  Returns:
    None where no file is asked for.

  Raises:
    UserError: it cannot be read, or has not one row for each record.
  """
  name = config.loss.separation_features
  if not config.loss.intra_modal_separation or not name.endswith(".npy"):
    return None
  try:
    features = np.load(name, mmap_mode="r", allow_pickle=False)
  except (OSError, ValueError) as error:
    raise UserError(f"config.loss.separation_features={name}: {error}.") from None
  if features.ndim != 2 or records not in (None, len(features)):
    rows = (
      "each training record"
      if records is None
      else f"each of the {records} training records"
    )
    raise UserError(
      f"config.loss.separation_features={name} has shape {features.shape}: it needs one "
      f"row for {rows}, in their order."
    )
  return features
