"""The two sides of benchmarks/step.py: our training step, and PyTorch's of the same.

Both train the same weights on the same pairs with the same loss and AdamW, so that the
comparison is of nothing but how they compute it; `agreement` measures that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers
from ml_collections import ConfigDict
from torch.nn.functional import normalize

from benchmarks.step_vista import VistaTorch
from gcl_jax.models import Model, VistaConfig, pytorch_clip
from gcl_jax.models.convert import (
  HUGGING_FACE,
  TABLE,
  from_tensors,
  to_tensors,
)
from gcl_jax.models.native import native_layout, native_table
from gcl_jax.models.vista_table import VISTA
from gcl_jax.processing import ImageProcessor
from gcl_jax.sharding import make_mesh, put_batch
from gcl_jax.training.compiled import CompiledStep
from gcl_jax.training.objective import make_objective
from gcl_jax.training.optimizer import frozen_mask, make_optimizer
from gcl_jax.training.state import init_state, make_step

_STEPS = 1_000_000  # of the schedule: the learning rate stays at its peak
_BANKS = 3  # image, text, fused


class Ours:
  """The step as `gcl_jax.training.run` builds it from a config."""

  def __init__(
    self, config: ConfigDict, model: Model, images: ImageProcessor, params: Any
  ):
    mesh, shapes = make_mesh(**config.mesh), model.abstract()
    optimizer = make_optimizer(config.optimizer, config.temperature, shapes, _STEPS)
    self._state = init_state(params, optimizer, mesh)
    self._step = CompiledStep(
      make_step(
        make_objective(model, images, config, mesh),
        optimizer,
        frozen_mask(config.optimizer, config.temperature, shapes),
        config.temperature,
        jax.tree.map(lambda leaf: leaf.sharding, self._state),
      ),
      lambda *_: None,
    )
    self._mesh = mesh

  @property
  def compile_seconds(self) -> float:
    """Spent on all shapes of a batch so far."""
    return self._step.compile_seconds

  def place(self, batch: Mapping[str, np.ndarray]) -> Any:
    """A batch of the pipeline, on the devices."""
    return put_batch(self._mesh, batch)

  def step(self, placed: Any) -> float:
    """One optimizer step; the loss before it."""
    self._state, metrics = self._step(self._state, placed, {})
    jax.block_until_ready(self._state)
    return float(metrics["loss"])

  def params(self) -> Any:
    """A copy of the parameters, NumPy."""
    return jax.tree.map(lambda leaf: np.array(leaf), self._state["params"])


class PyTorch:
  """The original's model, and the loss as a reader of the paper would write it.

  That is `transformers.CLIPModel`, or of a VISTA `step_vista.VistaTorch`.

  Where `CLIPModel` has no such shape (pruned, a ResNet), the file that an export carries:
  the layers as the release runs them, none larger than it was cut to. A ResNet's batch
  norms keep their statistics on both sides.
  """

  def __init__(
    self, config: ConfigDict, model: Model, images: ImageProcessor, params: Any
  ):
    self._device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, fields = model.config, model.config.to_hf()
    if isinstance(shape, VistaConfig):
      self._layout, table = VISTA, VISTA.table
      self._model = VistaTorch(shape)
    elif shape.plain:
      self._layout, table = HUGGING_FACE, TABLE
      self._model = transformers.CLIPModel(transformers.CLIPConfig.from_dict(fields))
    else:
      self._layout, table = native_layout(shape, "", ""), native_table(shape)
      self._model = pytorch_clip.CLIP(fields)
    tensors = to_tensors(params, shape, table)
    self._model.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()})
    if isinstance(shape, VistaConfig):  # whose file has no place for a scale
      scale = torch.tensor(params["logit_scale"])
      self._model.logit_scale = torch.nn.Parameter(scale)
    # A fixed one is no parameter.
    learned = config.temperature.mode == "learned"
    self._model.logit_scale.requires_grad_(learned)
    self._model.to(self._device).train()
    self._images, self._config = images, model.config
    self._autocast = torch.autocast(
      self._device, torch.bfloat16, enabled=config.model.dtype == "bfloat16"
    )
    self._top = math.log(config.temperature.max_logit_scale)
    self._clip_norm = config.optimizer.clip_norm
    named = dict(self._model.named_parameters())
    self._weights = list(named.values())
    # By name, as ours: a class token is kept with axes of one in front.
    decayed = {n: w for n, w in named.items() if w.ndim > 1 and "cls_token" not in n}
    rule = config.optimizer
    self._optimizer = torch.optim.AdamW(
      [
        {
          "params": list(decayed.values()),
          "weight_decay": rule.weight_decay,
        },
        {
          "params": [w for n, w in named.items() if n not in decayed],
          "weight_decay": 0.0,
        },
      ],
      lr=rule.learning_rate,
      betas=(rule.b1, rule.b2),
      eps=rule.eps,
      fused=True,  # on CPUs too, several times as fast as its default
    )
    on_gpu = self._device == "cuda"
    self._embed = torch.compile(self._rows) if on_gpu else self._rows

  def place(self, batch: Mapping[str, np.ndarray]) -> Any:
    """What `CLIPProcessor` gives: normalised pixels, channels first, and ids."""
    pixels = self._images.normalize(batch["pixels"]).transpose(0, 3, 1, 2)
    pixels = torch.from_numpy(np.ascontiguousarray(pixels))
    tokens = torch.from_numpy(batch["tokens"].astype(np.int64))
    return pixels.to(self._device), tokens.to(self._device)

  def step(self, placed: Any) -> float:
    """One optimizer step; the loss before it."""
    self._optimizer.zero_grad()
    with self._autocast:
      rows = self._embed(*placed)
    loss = gcl_loss(rows, self._model.logit_scale.exp())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self._weights, self._clip_norm)
    self._optimizer.step()
    with torch.no_grad():
      self._model.logit_scale.clamp_(0, self._top)
    return loss.item()

  def params(self) -> Any:
    """A copy of the parameters in our tree, NumPy."""
    tensors = {k: v.cpu().numpy() for k, v in self._model.state_dict().items()}
    scale = tensors["logit_scale"]
    if self._layout is VISTA:
      del tensors["logit_scale"]
    params = from_tensors(tensors, self._config, "the PyTorch side", self._layout)
    return {**params, "logit_scale": scale}

  def _rows(self, pixels, tokens):
    """Unit rows of image, text and both, (3 B, D) float32."""
    if isinstance(self._config, VistaConfig):
      return torch.cat(self._model(pixels, tokens))
    image, text = (x.float() for x in self._towers(pixels, tokens))
    return torch.cat([normalize(x, dim=-1) for x in (image, text, image + text)])

  def _towers(self, pixels, tokens):
    if not self._config.plain:
      return self._model.encode_image(pixels), self._model.encode_text(tokens)
    image = self._model.vision_model(pixels).pooler_output
    text = self._model.text_model(tokens).pooler_output
    return self._model.visual_projection(image), self._model.text_projection(text)


def gcl_loss(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
  """Unit rows (3N, D), image, text, fused -> the loss, by one matrix of similarities."""
  count = len(rows) // _BANKS
  logits = scale * rows @ rows.T
  at = torch.arange(len(rows), device=rows.device)
  logits = logits.masked_fill(at[:, None] == at, -torch.inf)
  same = sum(logits[at, (at + k * count) % len(rows)] for k in range(1, _BANKS))
  return (logits.logsumexp(dim=1) - same / (_BANKS - 1)).mean()


class Agreement(NamedTuple):
  """How far two sides are apart, as parts of the second's.

  loss: of the loss before the step. movement: of what the step changed in the
  parameters, by the Euclidean norm over all of them.
  """

  loss: float
  movement: float


def agreement(
  ours: Ours, theirs: PyTorch, batch: Mapping[str, np.ndarray]
) -> Agreement:
  """Takes one step on either side, from the same parameters, and compares."""
  before = ours.params()
  losses = [side.step(side.place(batch)) for side in (ours, theirs)]
  moved = [
    [after - start for after, start in zip(*map(jax.tree.leaves, pair), strict=True)]
    for pair in ((ours.params(), before), (theirs.params(), before))
  ]
  apart = _norm([a - b for a, b in zip(*moved, strict=True)])
  return Agreement(abs(losses[0] / losses[1] - 1), apart / _norm(moved[1]))


def _norm(leaves: list[np.ndarray]) -> float:
  return math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in leaves))
