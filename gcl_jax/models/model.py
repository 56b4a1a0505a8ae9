"""`Model`, the handle that makes and binds parameters, and what kinds of it there are.

Parameters are float32 and live outside the module, as a plain nested dict. This is the
one place that knows which config belongs to which module.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gcl_jax.errors import UserError
from gcl_jax.fusion import FusionSettings
from gcl_jax.models.clip import CLIP
from gcl_jax.models.config import CLIPConfig, named_config
from gcl_jax.models.initial import initial_params
from gcl_jax.models.layers import REMAT, remat_of_towers
from gcl_jax.models.vista import Vista
from gcl_jax.models.vista_config import VISTA_SHAPES, VistaConfig

Config = CLIPConfig | VistaConfig
DTYPES = ("float32", "bfloat16", "float16")
_MODULES = {CLIPConfig: CLIP, VistaConfig: Vista}


def config_from_dict(fields: Mapping[str, Any]) -> Config:
  """The shape that a `to_hf` of ours, or a Hugging Face CLIP's config.json, describes.

  Raises:
    UserError: it describes no model that we can run.
  """
  kind = (
    VistaConfig if fields.get("model_type") == VistaConfig.model_type else CLIPConfig
  )
  return kind.from_hf(fields)


def shape_of_name(name: str) -> Config:
  """A published shape by its name: a CLIP's (`NAMES`), or a VISTA's.

  Raises:
    UserError: no such name; says the nearest.
  """
  return VISTA_SHAPES[name] if name in VISTA_SHAPES else named_config(name)


@dataclasses.dataclass(frozen=True)
class Model:
  """How to make and bind parameters; holds no array. Hashable, not a pytree."""

  config: Config
  fusion: FusionSettings
  dtype: str
  remat: str
  graphdef: Any = dataclasses.field(repr=False, compare=False)
  _shapes: Any = dataclasses.field(repr=False, compare=False)

  def init(self, key: Array) -> dict[str, Any]:
    """Random float32 parameters as the originals draw them: a plain nested dict.

    A pure function of a `jax.random.key`: jit it, with `out_shardings` to be born
    sharded. Blocks' arrays have a leading layers axis.
    """
    return initial_params(self.config, self.fusion, self._shapes, key)

  def abstract(self) -> dict[str, Any]:
    """`jax.ShapeDtypeStruct`s in the place of `init`'s arrays."""
    return jax.tree.map(lambda leaf: leaf, self._shapes)

  def bind(self, params: Any) -> nnx.Module:
    """The module with these parameters, inside `jax.jit` or not; cheap when traced."""
    return nnx.merge(self.graphdef, nnx.State(params))


@functools.cache
def _abstract(config, fusion, dtype: str, remat: str) -> tuple[Any, Any]:
  def make() -> nnx.Module:
    rngs = nnx.Rngs(params=jax.random.key(0))
    return _MODULES[type(config)](config, fusion, jnp.dtype(dtype), remat, rngs)

  graphdef, state = nnx.split(nnx.eval_shape(make))
  return graphdef, nnx.to_pure_dict(state)


def build(
  config: Config,
  *,
  fusion: FusionSettings | None = None,
  dtype: str = "float32",
  remat: str = "none",
) -> Model:
  """A model of this shape. No device work.

  Args:
    config: the shape.
    fusion: how image and text become one; None is raw, 1 and 1.
    dtype: what the towers compute in: "float32", "bfloat16" or "float16". Parameters
      and embeddings are float32 in any case. JAX rounds the inputs of float32 products
      on TPUs and GPUs unless told otherwise (`jax.default_matmul_precision`).
    remat: what the backward pass may keep of a block: "none" (everything), "pointwise"
      (all products), "dots" (products with weights) or "full" (the block's input alone);
      or two of them with a comma between, "full,none": the image tower's and the text
      tower's.

  Raises:
    UserError: an unknown dtype or remat.
  """
  if dtype not in DTYPES:
    raise UserError(f"model.dtype is {dtype!r}: it is one of {', '.join(DTYPES)}.")
  if len(remat_of_towers(remat)) != 2 or not set(remat_of_towers(remat)) <= set(REMAT):
    raise UserError(
      f"model.remat is {remat!r}: it is one of {', '.join(REMAT)}, or two with a comma "
      "between, for the image tower and for the text tower."
    )
  fusion = FusionSettings() if fusion is None else fusion
  return Model(config, fusion, dtype, remat, *_abstract(config, fusion, dtype, remat))
