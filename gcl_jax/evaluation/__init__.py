"""Evaluation: every modality asked for every modality, and what the numbers mean."""

from gcl_jax.evaluation.banks import EmbedFn
from gcl_jax.evaluation.choose import (
  best_metric,
  check_metric,
  choose_step,
  metric_names,
  scalars,
)
from gcl_jax.evaluation.items import Item, Items, build_items
from gcl_jax.evaluation.nine import VIEWS, direction_names, evaluate_nine
from gcl_jax.evaluation.tables import render, rows_of, to_markdown

__all__ = [
  "VIEWS",
  "EmbedFn",
  "Item",
  "Items",
  "best_metric",
  "build_items",
  "check_metric",
  "choose_step",
  "direction_names",
  "evaluate_nine",
  "metric_names",
  "render",
  "rows_of",
  "scalars",
  "to_markdown",
]
