"""Record sources, and the pipeline that turns one of them into batches of arrays."""

from gcl_jax.data.guess import guess_source
from gcl_jax.data.options import change_data
from gcl_jax.data.pair_ids import collapse, pair_ids
from gcl_jax.data.pipeline import Pipeline
from gcl_jax.data.record import BadRecord, Record, Source
from gcl_jax.data.settings import DataSettings
from gcl_jax.data.sources import open_source

__all__ = [
  "BadRecord",
  "DataSettings",
  "Pipeline",
  "Record",
  "Source",
  "change_data",
  "collapse",
  "guess_source",
  "open_source",
  "pair_ids",
]
