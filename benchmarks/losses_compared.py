"""What the losses do to a model, at equal steps: one recipe, several losses and seeds.

    python -m benchmarks.losses_compared --config=configs/demo.py --output=rows.json

With a teacher, what its student gains by the teacher's weights and by its affinities:

    python -m benchmarks.losses_compared --config=configs/demo.py \
      --config.distill.teacher=runs/demo --config.init.inherit=runs/demo \
      --config.model.hf.vision_config.num_hidden_layers=2 \
      --config.model.hf.text_config.num_hidden_layers=1 \
      --losses=GCL,GCL+inherit,GCL+mimic,GCL+mimic+inherit

Each run lives in its own folder below --root, so that a comparison that was stopped
goes on. Prints one table, mean and range over seeds, plain and centred; writes one JSON
row per run.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from gcl_jax import command_line
from gcl_jax.errors import UserError

_FLAGS = flags.FLAGS
_SHOWN = (
  "global.other.R@1",
  "global.other.R@10",
  "global.same.R@10",
  "local.other.R@1",
  "local.other.R@10",
  "local.same.R@10",
)
SEPARATION = "CL+separation"
# What a name on the command line sets in the config, beside no separation.
LOSSES = {
  "CL": {"loss.name": "contrastive"},
  # Pushed apart as the recipe's features differ, and all alike.
  SEPARATION: {"loss.name": "contrastive", "loss.intra_modal_separation": 0.5},
  "CL+image_separation": {
    "loss.name": "contrastive",
    "loss.intra_modal_separation": 0.5,
    "loss.separation_features": "none",
  },
  "GCL": {"loss.name": "gcl", "loss.denominator": "self_masked"},
  "GCL-literal": {"loss.name": "gcl", "loss.denominator": "literal"},
  "GCL-clean": {"loss.name": "gcl", "loss.denominator": "clean"},
  "GCL-cross_only": {"loss.name": "gcl", "loss.denominator": "cross_only"},
  "GCL-target_only": {"loss.name": "gcl", "loss.denominator": "target_only"},
}
# What follows such a name keeps a field of the recipe, which the others go without.
KEPT = {"+mimic": "distill.teacher", "+inherit": "init.inherit"}


def _define_flags() -> None:
  config_flags.DEFINE_config_file("config", None, "a recipe")
  flags.DEFINE_list("losses", ["CL", "GCL", "GCL-literal", "GCL-target_only"], "which")
  flags.DEFINE_list("seeds", ["0", "1", "2"], "which")
  flags.DEFINE_string("root", "runs/compared", "where the runs live")
  flags.DEFINE_string(
    "start_from", "", "each seed starts from <root>/<this>-seed<seed>"
  )
  flags.DEFINE_string("output", "", "the JSON file of rows")


def main() -> None:
  """Runs what is not finished yet, then prints and writes the rows."""
  if _FLAGS.config is None:
    raise UserError("name a recipe, such as --config=configs/demo.py")
  for name in _FLAGS.losses:  # a mistake is found before the first run
    configure(_FLAGS.config, name, 0)
  rows = []
  for seed in map(int, _FLAGS.seeds):
    for place, name in enumerate(_FLAGS.losses):
      rows += _run(name, seed, with_start=place == 0)
  if _FLAGS.output:
    Path(_FLAGS.output).write_text(json.dumps(rows, indent=1) + "\n")
  print(table(rows))


def configure(
  recipe: ConfigDict, name: str, seed: int, *, root: str = "", start_from: str = ""
) -> tuple[str, ConfigDict]:
  """One run's label in the table, and its config.

  Args:
    recipe: what all runs share; it is left as it is.
    name: of `LOSSES`, and what is `KEPT`.
    seed: of the run, and of the run it starts from.
    root, start_from: the run starts from <root>/<start_from>-seed<seed>; "": the
      recipe's own start.

  Raises:
    UserError: no such loss, or a separation whose features, or a teacher that the
      recipe does not name.
  """
  config = copy.deepcopy(recipe)
  config.seed = seed
  config.loss.intra_modal_separation = 0.0
  label = name
  for ending, field in KEPT.items():
    asked, name = ending in name, name.replace(ending, "")
    group, _, last = field.partition(".")
    if asked and not config[group][last]:
      raise UserError(f"--losses: {label} needs --config.{field}=<a folder or run>")
    if not asked:
      config[group][last] = ""
  if name not in LOSSES:
    raise UserError(
      f"--losses: {label!r} is none of {', '.join(LOSSES)}, nor one of them and "
      f"{' or '.join(KEPT)}"
    )
  config.update_from_flattened_dict(LOSSES[name])
  if config.loss.intra_modal_separation:
    features = config.loss.separation_features
    if name == SEPARATION and features == "none":
      raise UserError(
        f"--losses: {name} needs --config.loss.separation_features=<initial_text_tower"
        " or a .npy file>; without features it is CL+image_separation"
      )
    label = (
      f"{SEPARATION} ({'image only' if features == 'none' else Path(features).name})"
    )
  if start_from:
    config.init.pretrained = f"{root}/{start_from}-seed{seed}"
    label = f"{start_from}, then {label}"
  config.name = re.sub(r"[^\w.+-]+", "-", label).strip("-")
  return label, config


def _run(name: str, seed: int, with_start: bool) -> list[dict]:
  from gcl_jax.checkpoints import read_description
  from gcl_jax.evaluation import best_metric
  from gcl_jax.train import train_and_evaluate

  label, config = configure(
    _FLAGS.config, name, seed, root=_FLAGS.root, start_from=_FLAGS.start_from
  )
  config.eval.before = with_start  # the same for every loss
  workdir = Path(_FLAGS.root) / f"{config.name}-seed{seed}"
  _, results = train_and_evaluate(config, workdir)
  steps = read_description(workdir).steps  # config.steps may be 0: so many epochs
  rows = []
  for stage, result in results.items():
    shown = label if stage == "after" else "untrained"
    if stage == "before" and _FLAGS.start_from:
      shown = _FLAGS.start_from
    for variant in ("plain", "centered"):
      numbers = {m: best_metric(result, f"{variant}.{m}") for m in _SHOWN}
      rows.append(
        {"loss": shown, "seed": seed, "steps": steps, "variant": variant}
        | numbers
        | {"gap_image_text": result[variant]["gap"]["delta"]["i-t"]}
        | {"own_share": result[variant]["own_share"]["mean"]}
        | {"se": {name: _standard_error(result[variant], name) for name in _SHOWN}}
      )
  return rows


def _standard_error(view: Mapping, name: str) -> float:
  """Of one run's recall, by bootstrap over its queries; in points."""
  pool, group, recall = name.split(".")
  return view[pool][group]["se"][recall]


def table(rows: list[dict]) -> str:
  """Mean (lowest to highest) over seeds, a line per loss and variant, in Markdown.

  The last line is two standard errors of a single run, the largest of all: smaller
  differences say nothing, and seeds differ by more.
  """
  names = [*_SHOWN, "own_share", "gap_image_text"]
  lines = [
    "| loss | " + " | ".join(names) + " | seeds |",
    "|---|" + "---|" * (len(names) + 1),
  ]
  keys = dict.fromkeys((row["loss"], row["variant"]) for row in rows)
  for loss, variant in keys:
    unique = {
      row["seed"]: row
      for row in rows
      if (row["loss"], row["variant"]) == (loss, variant)
    }
    cells = []
    for name in names:
      values = np.array([row[name] for row in unique.values()], float)
      digits = 2 if name == "gap_image_text" else 1
      spread = f" ({values.min():.{digits}f} to {values.max():.{digits}f})"
      cells.append(f"{values.mean():.{digits}f}" + (spread if len(values) > 1 else ""))
    centred = ", centred" if variant == "centered" else ""
    lines.append(f"| {loss}{centred} | " + " | ".join(cells) + f" | {len(unique)} |")
  largest = [2 * max(row["se"][name] for row in rows) for name in _SHOWN]
  errors = " | ".join(f"{error:.1f}" for error in largest)
  return "\n".join([*lines, f"| two standard errors of a run | {errors} | | | |"])


if __name__ == "__main__":
  _define_flags()
  command_line.run(main, resumable=True)
