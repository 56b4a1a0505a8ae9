"""From a batch to the loss: the model, the fusion and the loss that the config names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gcl_jax.errors import UserError
from gcl_jax.fusion import Mix, fuse
from gcl_jax.losses import (
  affinity_loss,
  contrastive_loss,
  gcl_loss,
  intra_modal_separation_loss,
)
from gcl_jax.models import Model, ResNetConfig
from gcl_jax.models.lora import merge_lora
from gcl_jax.processing import ImageProcessor
from gcl_jax.sharding import BATCH_AXES, gathered, map_with_path, used_on
from gcl_jax.training.check import direction_weights
from gcl_jax.training.microbatches import in_microbatches
from gcl_jax.training.patch_dropout import kept_patches

# params, batch, constants -> loss (), metrics (a flat dict of float32 scalars)
Objective = Callable[
  [Any, Mapping[str, jax.Array], Any], tuple[jax.Array, dict[str, jax.Array]]
]


def make_objective(
  model: Model,
  images: ImageProcessor,
  config: ConfigDict,
  mesh: Mesh,
  teacher: tuple[Model, ImageProcessor] | None = None,
) -> Objective:
  """The function that a step differentiates.

  Args:
    model: of which the parameters are.
    images: turns uint8 pixels (N, S, S, 3) to the floats that the model takes.
    config: the run's.
    mesh: negatives are global over its batch axes.
    teacher: the model whose affinities are learned, and what turns pixels to its floats.

  Returns:
    (params, batch, constants) -> loss, metrics. `batch` is the pipeline's, with
    `separation_features` (N, F) where a file was given, and with patch dropout `place`
    (N,) int32, each row's place in the global batch. `constants` holds `initial_params`
    where the initial text tower gives those features, `teacher_params` where there is a
    teacher, and `step` () int32.

  Raises:
    UserError: patches shall be dropped, and the image tower has none.
  """
  if config.model.patch_dropout and isinstance(model.config.vision, ResNetConfig):
    raise UserError(
      f"config.model.patch_dropout is {config.model.patch_dropout}, but the image tower is "
      "a ResNet, which has no patches: set it to 0."
    )
  loss_config, weights = config.loss, direction_weights(config)
  separation = loss_config.intra_modal_separation
  placement = {"mesh": mesh, "batch_axes": BATCH_AXES, "form": loss_config.form}

  def embed_rows(params, rows):
    pixels, tokens, options = rows
    pixels = images.normalize(pixels)
    return _bound(model, params).embed_pair(pixels, tokens, **options)

  def embed_text_rows(params, tokens):
    return _bound(model, params).embed_text(tokens)

  def embed_rows_as_teacher(params, rows):
    pixels, tokens, present = rows
    pixels = teacher[1].normalize(pixels)
    image, text, mix = _bound(teacher[0], params).embed_pair(pixels, tokens, **present)
    return image, text, fuse(image, text, mix)

  embed = in_microbatches(embed_rows, config.microbatches, mesh)
  embed_as_teacher = in_microbatches(embed_rows_as_teacher, config.microbatches, mesh)
  embed_texts = in_microbatches(embed_text_rows, config.microbatches, mesh)

  def dropped(batch, constants):
    dropout, patches = config.model.patch_dropout, model.config.vision.grid**2
    if not dropout:
      return {}
    rows = (constants["step"], batch["place"])
    return {"kept_patches": kept_patches(config.seed, *rows, patches, dropout)}

  def objective(params, batch, constants):
    params = merge_lora(params, config.lora.alpha)
    present = {name: batch[name] for name in ("has_image", "has_text")}
    options = {**present, **dropped(batch, constants)}
    inputs = batch["pixels"], batch["tokens"]
    # In microbatches a device's rows are its own already.
    with used_on(mesh) if config.microbatches == 1 else contextlib.nullcontext():
      # Of a model that fuses by itself `mix` is the bank of what it makes of pairs.
      image, text, mix = embed(params, (*inputs, options))
      if teacher:
        frozen = jax.lax.stop_gradient(constants["teacher_params"])
        wanted = embed_as_teacher(frozen, (*inputs, present))
    scale = jnp.exp(params["logit_scale"])
    shared = {
      "logit_scale": scale,
      "pair_ids": batch["pair_ids"],
      **present,
      **placement,
    }
    kernel = loss_config.kernel
    fused = fuse(image, text, mix) if config.fusion.as_bank else mix
    if loss_config.name == "contrastive":
      loss, directions = contrastive_loss(image, text, kernel=kernel, **shared)
    else:
      loss, directions = gcl_loss(
        image,
        text,
        fused,
        denominator=loss_config.denominator,
        direction_weights=weights,
        kernel=kernel,
        **shared,
      )
    metrics = {"loss": loss, **_diagnostics(directions, mix, present, scale)}
    if separation:
      features = _separation_features(embed_texts, batch, constants)
      term = intra_modal_separation_loss(image, text, features, **shared)
      metrics["loss/separation"] = term
      loss = loss + separation * term
      metrics["loss"] = loss
    if teacher:
      its_scale = config.distill.logit_scale or jnp.exp(frozen["logit_scale"])
      term, _ = affinity_loss(
        image,
        text,
        fused,
        *wanted,
        logit_scale=scale,
        teacher_scale=its_scale,
        direction_weights=direction_weights(config, "distill"),
        **present,
        **placement,
      )
      metrics["loss/affinity"] = term
      loss = config.distill.loss_weight * loss + config.distill.weight * term
      metrics["loss"] = loss
    return loss, metrics

  return objective


def _bound(model: Model, params: Any) -> Any:
  """The model with parameters that are whole, but for those that a layer gathers."""

  def one(path: str, leaf: jax.Array) -> jax.Array:
    return leaf if "/blocks/" in path else gathered(leaf, path)

  return model.bind(map_with_path(one, params))


def _separation_features(embed_texts, batch, constants) -> jax.Array | None:
  if "separation_features" in batch:
    return batch["separation_features"]
  if "initial_params" in constants:
    initial = jax.lax.stop_gradient(constants["initial_params"])
    raw = embed_texts(initial, batch["tokens"])
    norm = jnp.linalg.norm(raw, axis=-1, keepdims=True)
    return raw / jnp.maximum(norm, 1e-6)
  return None


def _diagnostics(directions, mix, present, scale) -> dict[str, jax.Array]:
  """Per-direction losses, the logit scale, and the ratio of raw norms text : image.

  The ratio is that of the mix, beta / alpha, averaged over whole pairs as a geometric
  mean: when text norms swamp the sum, fused retrieval dies. A bank has none.
  """
  names = ("image", "text", "fused")
  metrics = {
    f"loss/{names[a]}_to_{names[b]}": directions[a, b]
    for a in range(3)
    for b in range(3)
    if a != b
  }
  metrics["logit_scale"] = scale
  if not isinstance(mix, Mix):
    return metrics
  both = present["has_image"] & present["has_text"]
  count = jnp.maximum(both.sum(), 1)
  tiny = jnp.float32(1e-6)
  log_ratio = jnp.log(jnp.maximum(mix.beta, tiny) / jnp.maximum(mix.alpha, tiny))
  largest = jnp.maximum(mix.alpha, mix.beta)
  metrics["fusion/norm_ratio"] = jnp.exp(jnp.where(both, log_ratio, 0).sum() / count)
  metrics["fusion/largest_weight"] = jnp.where(both, largest, 0).max()
  return metrics
