"""LoRA: low-rank factors beside frozen matrices of the blocks, and their sum.

The factors are parameters of their own, `lora/<path of the matrix>/a` and `/b`. The model
never sees them: it is given W + (alpha / rank) · A·B, made within the step. That costs a
float32 copy of the adapted matrices and of their gradients while the step runs, and
little time beside the towers; a frozen W is stored once, and optimizer state and averages
exist for the factors alone.

Source: Hu et al., arXiv 2106.09685. A is random and B zero: training starts at W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gcl_jax.errors import UserError
from gcl_jax.sharding import map_with_path

_GATE = "mlp/gate"  # which not every tower has
# Names that a config may give -> matrices of a block.
MATRICES = {
  "query": ("attention/query",),
  "key": ("attention/key",),
  "value": ("attention/value",),
  "out": ("attention/out",),
  "mlp": ("mlp/fc1", "mlp/fc2", _GATE),
}


def lora_shapes(
  params: Any, rank: int, matrices: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
  """Shapes of the factors: a (layers, inputs, rank) and b (layers, rank, outputs).

  Args:
    params: arrays or shapes of the model, a nested dict.
    rank: at least 1.
    matrices: tower (`vision`, `text`) -> names in `MATRICES`.

  Returns:
    A nested dict of `jax.ShapeDtypeStruct`, to be `params["lora"]`.

  Raises:
    UserError: there is no such matrix, none is named, or one is too small for the rank.
  """
  shapes: dict[str, Any] = {}
  for tower, names in matrices.items():
    for name in names:
      if name not in MATRICES:
        raise UserError(
          f"config.lora: there is no matrix {name!r}: name some of {', '.join(MATRICES)}."
        )
      if "blocks" not in params[tower]:
        raise UserError(
          f"config.lora names {name} of the image tower, which is a ResNet and has no such "
          "matrices: set --config.lora.image='()'."
        )
      for path in MATRICES[name]:
        if path == _GATE and "gate" not in params[tower]["blocks"]["mlp"]:
          continue
        layers, inputs, outputs = _at(params[tower]["blocks"], path)["kernel"].shape
        if rank > min(inputs, outputs):
          raise UserError(
            f"config.lora.rank is {rank}, but the {tower} tower's {path} is {inputs} x "
            f"{outputs}: a rank is at most the smaller side."
          )
        _put(
          shapes,
          f"{tower}/blocks/{path}",
          {
            "a": jax.ShapeDtypeStruct((layers, inputs, rank), jnp.float32),
            "b": jax.ShapeDtypeStruct((layers, rank, outputs), jnp.float32),
          },
        )
  if not shapes:
    raise UserError(
      f"config.lora.rank is {rank}, but no matrix of a tower that is trained is named: "
      "set config.lora.image or config.lora.text, or the rank to 0 (no LoRA)."
    )
  return shapes


def first_factors(shapes: Any, seed: int) -> Any:
  """NumPy arrays in the place of `shapes`: a normal of variance 1 / inputs, b zero."""
  # From NumPy: JAX would compile a draw for every shape.
  rng = np.random.default_rng((seed, 0x10AA))

  def draw(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    if path.endswith("/b"):
      return np.zeros(leaf.shape, np.float32)
    return rng.standard_normal(leaf.shape, np.float32) / math.sqrt(leaf.shape[1])

  return map_with_path(draw, shapes)


def merge_lora(params: Any, alpha: float) -> Any:
  """The model's own parameters, W + (alpha / rank) · A·B where there are factors.

  Differentiable; inside `jax.jit` or not. The sum is float32 on every device.

  Args:
    params: a nested dict of arrays, with or without `lora`.
    alpha: of `config.lora.alpha`.
  """
  if "lora" not in params:
    return params
  rest = {name: tree for name, tree in params.items() if name != "lora"}
  return _merged(rest, params["lora"], alpha)


def _merged(base: Any, factors: Any, alpha: float) -> Any:
  if set(factors) == {"a", "b"}:
    a, b = factors["a"], factors["b"]
    product = jnp.matmul(a, b, precision="highest")  # else TPUs and GPUs would round
    return {**base, "kernel": base["kernel"] + (alpha / a.shape[-1]) * product}
  return {
    name: _merged(tree, factors[name], alpha) if name in factors else tree
    for name, tree in base.items()
  }


def _at(tree: Any, path: str) -> Any:
  for name in path.split("/"):
    tree = tree[name]
  return tree


def _put(tree: dict[str, Any], path: str, leaf: Any) -> None:
  *folders, last = path.split("/")
  for name in folders:
    tree = tree.setdefault(name, {})
  tree[last] = leaf
