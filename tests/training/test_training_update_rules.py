"""Every rule beside plain optax on the layers taken apart, and beside NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gcl_jax.training.config import default_config
from gcl_jax.training.optimizer import make_optimizer
from gcl_jax.training.update_rules import per_layer

RATE, STEPS = 0.01, 4
# Towers of different depth and layers of very different size; a leaf of a stack has one
# axis more than a layer's. Adafactor factors what has two sides of 128 or more.
SHAPES = {
  "vision/blocks/mlp/kernel": (2, 128, 130),
  "vision/blocks/mlp/bias": (2, 130),
  "vision/patch_embedding/kernel": (6, 8),
  "text/blocks/attention/kernel": (3, 8, 8),
  "text/blocks/norm1/scale": (3, 8),
  "text/token_embedding/embedding": (12, 8),
}


def numbers(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  sizes = {}
  for path, shape in SHAPES.items():
    values = scale * rng.standard_normal(shape, np.float32)
    if "blocks" in path:
      values *= 10.0 ** -np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    sizes[path] = values.astype(np.float32)
  return sizes


def nested(flat):
  tree = {}
  for path, leaf in flat.items():
    *folders, name = path.split("/")
    here = tree
    for folder in folders:
      here = here.setdefault(folder, {})
    here[name] = jnp.asarray(leaf)
  return tree


def flat(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def apart(values):
  """Every layer of a stack as an array of its own."""
  pieces = {}
  for path, leaf in values.items():
    if "blocks" in path:
      pieces |= {f"{path}#{layer}": part for layer, part in enumerate(leaf)}
    else:
      pieces[path] = leaf
  return pieces


def trained(optimizer, params):
  """The parameters after a few steps on gradients that do not depend on them."""
  step = jax.jit(optimizer.update)
  state = optimizer.init(params)
  is_apart = any("#" in path for path in params)
  for number in range(STEPS):
    grads = numbers(100 + number, 0.1)
    grads = apart(grads) if is_apart else nested(grads)
    updates, state = step(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


def ours(name, **fields):
  config = default_config()
  config.optimizer.update(
    {
      "name": name,
      "learning_rate": RATE,
      "schedule": "constant",
      "clip_norm": 0.0,
      "weight_decay": 0.1,
      **fields,
    }
  )
  params = nested(numbers(0))
  optimizer = make_optimizer(config.optimizer, config.temperature, params, STEPS)
  return apart(flat(trained(optimizer, params)))


def matrices(tree):
  return {path: path.split("#")[0].endswith(("kernel", "embedding")) for path in tree}


def assert_close(got, want):
  assert got.keys() == want.keys()
  for path, value in want.items():
    np.testing.assert_allclose(got[path], value, rtol=2e-5, atol=1e-7, err_msg=path)


def test_lamb_trusts_each_layer_by_itself():
  rest = {
    path for path, is_matrix in matrices(apart(numbers(0))).items() if not is_matrix
  }
  lamb = optax.lamb(RATE, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.1)
  adam = optax.adam(RATE, b1=0.9, b2=0.98, eps=1e-6)
  labels = {path: "adam" if path in rest else "lamb" for path in apart(numbers(0))}
  plain = optax.partition({"lamb": lamb, "adam": adam}, labels)
  assert_close(ours("lamb"), trained(plain, apart(numbers(0))))


def test_adafactor_factors_and_clips_each_layer_by_itself():
  # With no decay and no bound on its averages ours is `optax.adafactor`'s.
  plain = optax.adafactor(RATE, multiply_by_parameter_scale=False, momentum=0.9)
  config = {"weight_decay": 0.0, "b2": 1.0}
  assert_close(ours("adafactor", **config), trained(plain, apart(numbers(0))))
  # Decay is added to the step before the learning rate: here one step of nothing else.
  config = default_config().optimizer
  config.update({"name": "adafactor", "weight_decay": 0.1, "learning_rate": RATE})
  params = nested(numbers(0))
  optimizer = make_optimizer(config, default_config().temperature, params, STEPS)
  nothing = jax.tree.map(jnp.zeros_like, params)
  moved, _ = jax.jit(optimizer.update)(nothing, optimizer.init(params), params)
  for path, step in flat(moved).items():
    decayed = path.endswith(("kernel", "embedding"))
    want = -RATE * 0.1 * numbers(0)[path] if decayed else 0.0
    np.testing.assert_allclose(step, want, rtol=1e-6, atol=1e-12, err_msg=path)


def test_adafactor_keeps_rows_and_columns_instead_of_a_second_moment():
  config = default_config()
  config.optimizer.name, config.optimizer.b1 = "adafactor", 0.0
  params = nested(numbers(0))
  optimizer = make_optimizer(config.optimizer, config.temperature, params, STEPS)
  shapes = {
    leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, params))
  }
  assert (2, 128) in shapes and (2, 130) in shapes
  assert (2, 128, 130) not in shapes


def test_muon_turns_each_layer_s_matrix_and_leaves_the_rest_to_adamw():
  blocks = {path for path in apart(SHAPES_AS_ZEROS) if "#" in path and "kernel" in path}
  labels = {path: "m" if path in blocks else "a" for path in apart(SHAPES_AS_ZEROS)}
  plain = optax.partition(
    {
      "m": optax.contrib.muon(RATE, weight_decay=0.1, consistent_rms=0.2),
      "a": optax.adamw(
        0.003, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.1, mask=matrices
      ),
    },
    labels,
  )
  got = ours("muon", adamw_learning_rate=0.003)
  assert_close(got, trained(plain, apart(numbers(0))))


def test_a_step_of_muon_has_singular_values_near_one():
  # Independent of optax: the step of a matrix, over 0.2 sqrt(longer side), is nearly a
  # rotation, however small its layer's gradient is.
  config = default_config()
  config.optimizer.update({"name": "muon", "learning_rate": 1.0, "weight_decay": 0.0})
  params = nested(numbers(0))
  optimizer = make_optimizer(config.optimizer, config.temperature, params, STEPS)
  updates, _ = jax.jit(optimizer.update)(
    nested(numbers(1)), optimizer.init(params), params
  )
  steps = flat(updates)["text/blocks/attention/kernel"] / (0.2 * 8**0.5)
  values = np.linalg.svd(steps, compute_uv=False)
  assert values.shape == (3, 8)
  assert (values[:, :-1] > 0.5).all() and (values < 1.3).all()


SHAPES_AS_ZEROS = {path: np.zeros(shape) for path, shape in SHAPES.items()}


def test_lion_is_the_sign_of_a_momentum():
  values, momenta = numbers(0), dict.fromkeys(SHAPES, 0.0)
  for number in range(STEPS):
    for path, grad in numbers(100 + number, 0.1).items():
      step = np.sign(0.9 * momenta[path] + 0.1 * grad)
      if path.endswith(("kernel", "embedding")):
        step = step + 0.1 * values[path]
      values[path] = values[path] - RATE * step
      momenta[path] = 0.98 * momenta[path] + 0.02 * grad
  assert_close(ours("lion"), apart(values))


def test_adamw_is_pytorch_s():
  import torch

  kept = {p: torch.nn.Parameter(torch.from_numpy(v)) for p, v in numbers(0).items()}
  decayed = [v for p, v in kept.items() if p.endswith(("kernel", "embedding"))]
  rest = [v for p, v in kept.items() if not p.endswith(("kernel", "embedding"))]
  optimizer = torch.optim.AdamW(
    [{"params": decayed}, {"params": rest, "weight_decay": 0.0}],
    lr=RATE,
    betas=(0.9, 0.98),
    eps=1e-6,
    weight_decay=0.1,
  )
  for number in range(STEPS):
    for path, grad in numbers(100 + number, 0.1).items():
      kept[path].grad = torch.from_numpy(grad)
    optimizer.step()
  assert_close(
    ours("adamw"), apart({path: value.detach().numpy() for path, value in kept.items()})
  )


@pytest.mark.parametrize("name", ["adamw", "lion", "lamb", "adafactor", "muon"])
def test_the_first_moment_may_be_bfloat16(name):
  # Also that every rule bears frozen parameters: a whole tower of them.
  config = default_config()
  config.optimizer.update({"name": name, "moment_dtype": "bfloat16"})
  config.optimizer.locked_tower = "text"
  params = nested(numbers(0))
  optimizer = make_optimizer(config.optimizer, config.temperature, params, STEPS)
  state = jax.eval_shape(optimizer.init, params)
  by_type = {}
  for leaf in jax.tree.leaves(state):
    if leaf.shape == SHAPES["vision/blocks/mlp/kernel"]:
      by_type.setdefault(str(leaf.dtype), []).append(leaf)
  want = {"bfloat16": 1, "float32": 1} if name in ("adamw", "lamb") else {"bfloat16": 1}
  assert {kind: len(found) for kind, found in by_type.items()} == want
  updates, after = jax.eval_shape(optimizer.update, params, state, params)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  same = jax.tree.map(
    lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), after, state
  )
  assert all(jax.tree.leaves(same))
  assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_a_rule_per_layer_is_the_rule_on_each():
  rule = optax.clip_by_block_rms(1.0)
  params = nested(numbers(0, 5.0))
  wrapped = per_layer(rule)
  clipped, _ = jax.jit(wrapped.update)(params, wrapped.init(params), params)
  for path, part in apart(flat(clipped)).items():
    assert np.sqrt(np.mean(part**2)) <= 1.0 + 1e-6, path
  whole, _ = rule.update(params, rule.init(params))
  kernel = whole["vision"]["blocks"]["mlp"]["kernel"]
  assert np.sqrt(np.mean(kernel[0] ** 2)) > 1.3  # it was none
