"""What fusion weights cost in accuracy: error against float64 as alpha grows.

    python -m benchmarks.loss_accuracy

An image and a text that point apart have large weights, alpha = beta = 1 / ‖e_i + e_t‖,
and the fused similarities of a `Mix` are then small differences of large products. Each
cell is max|Δ| / max|reference| of value and gradients, on the same float32 inputs, at the
worst of three scales.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.loss import dense
from gcl_jax import command_line
from gcl_jax.fusion import Mix
from gcl_jax.losses import gcl_loss

ALPHAS = (0.6, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
SCALES = (1.0, 20.0, 100.0)
PAIRS, WIDTH = 256, 64


def main() -> None:
  """Prints the table, in Markdown."""
  print(table({alpha: errors(alpha) for alpha in ALPHAS}))


def errors(alpha: float) -> dict[str, float]:
  """The largest error of each form, over value, gradients and scales."""
  found: dict[str, float] = {}
  for scale in SCALES:
    arrays = _pairs(alpha)
    with jax.enable_x64(True):
      wide = [jnp.asarray(x, jnp.float64) for x in (*arrays, np.float64(scale))]
      reference = _value_and_gradients(_plain, wide)
    narrow = [jnp.asarray(x) for x in (*arrays, np.float32(scale))]
    for form, run in _FORMS.items():
      got = _value_and_gradients(run, narrow)
      error = max(_error(x, y) for x, y in zip(got, reference, strict=True))
      found[form] = max(found.get(form, 0.0), error)
  return found


def table(rows: dict[float, dict[str, float]]) -> str:
  """A line per alpha."""
  lines = [
    f"| alpha = beta | {' | '.join(_FORMS)} |",
    "|---:|" + "---:|" * len(_FORMS),
  ]
  for alpha, found in rows.items():
    cells = " | ".join(f"{found[form]:.0e}" for form in _FORMS)
    lines.append(f"| {alpha:g} | {cells} |")
  return "\n".join(lines)


def _plain(image, text, alpha, beta, scale):
  fused = alpha[:, None] * image + beta[:, None] * text
  return dense(image, text, fused, scale)


def _ours(form):
  def run(image, text, alpha, beta, scale):
    mix = Mix(alpha, beta)
    return gcl_loss(image, text, mix, logit_scale=scale, form=form)[0]

  return run


_FORMS = {"dense": _ours("dense"), "streaming": _ours("streaming")}


def _pairs(alpha: float) -> tuple[np.ndarray, ...]:
  """Unit rows at the angle at which alpha = beta = this, float32."""
  rng = np.random.default_rng(0)
  image, other = rng.normal(size=(2, PAIRS, WIDTH))
  image /= np.linalg.norm(image, axis=1, keepdims=True)
  other -= image * np.sum(image * other, axis=1, keepdims=True)
  other /= np.linalg.norm(other, axis=1, keepdims=True)
  cosine = 1 / (2 * alpha**2) - 1
  text = cosine * image + np.sqrt(1 - cosine**2) * other
  weights = np.full(PAIRS, alpha)
  return tuple(x.astype(np.float32) for x in (image, text, weights, weights))


def _value_and_gradients(run, arrays) -> list[np.ndarray]:
  value, gradients = jax.jit(jax.value_and_grad(run, argnums=range(5)))(*arrays)
  return [np.asarray(x, np.float64) for x in (value, *gradients)]


def _error(got: np.ndarray, reference: np.ndarray) -> float:
  return float(np.max(np.abs(got - reference)) / np.max(np.abs(reference)))


if __name__ == "__main__":
  command_line.run(main)
