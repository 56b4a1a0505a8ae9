"""OpenAI's and OpenCLIP's layout of keys, which TinyCLIP's files and our own have too.

Here are its table, and the shape of a model by its tensors alone, as far as they tell:
not the activation, and the number of heads only by their width.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping

from gcl_jax.errors import UserError
from gcl_jax.models.config import CLIPConfig, ResNetConfig, TextConfig, VisionConfig
from gcl_jax.models.convert import (
  PATCHES,
  SAME,
  TRANSPOSED,
  Layout,
  Row,
  Transform,
  linear,
  norm,
)

Shapes = Mapping[str, tuple[int, ...]]

# (out, in, H, W) and (H, W, in, out).
_CONVOLUTION = Transform(
  lambda x, _: x.transpose(2, 3, 1, 0), lambda x, _: x.transpose(3, 2, 0, 1)
)


def _blocks(ours: str, theirs: str) -> tuple[Row, ...]:
  ours, theirs = f"{ours}/blocks", f"{theirs}.resblocks.{{i}}"
  return (
    *(
      Row(f"{ours}/attention/{name}/{leaf}", f"{theirs}.attn.in_proj_{kind}", transform)
      for leaf, kind, transform in (
        ("kernel", "weight", TRANSPOSED),
        ("bias", "bias", SAME),
      )
      for name in ("query", "key", "value")
    ),
    *linear(f"{ours}/attention/out", f"{theirs}.attn.out_proj"),
    *norm(f"{ours}/norm1", f"{theirs}.ln_1"),
    *norm(f"{ours}/norm2", f"{theirs}.ln_2"),
    *linear(f"{ours}/mlp/fc1", f"{theirs}.mlp.c_fc"),
    *linear(f"{ours}/mlp/fc2", f"{theirs}.mlp.c_proj"),
  )


_SHARED = (
  Row("logit_scale", "logit_scale", SAME),
  Row("text_projection/kernel", "text_projection", SAME),
  Row("text/token_embedding/embedding", "token_embedding.weight", SAME),
  Row("text/position_embedding/embedding", "positional_embedding", SAME),
  *norm("text/final_norm", "ln_final"),
  *_blocks("text", "transformer"),
)
_VIT = (
  Row("image_projection/kernel", "visual.proj", SAME),
  Row("vision/class_embedding", "visual.class_embedding", SAME),
  Row("vision/patch_embedding/kernel", "visual.conv1.weight", PATCHES),
  Row("vision/position_embedding/embedding", "visual.positional_embedding", SAME),
  *norm("vision/pre_norm", "visual.ln_pre"),
  *norm("vision/post_norm", "visual.ln_post"),
  *_blocks("vision", "visual.transformer"),
)


def _convolution(ours: str, theirs: tuple[str, str]) -> tuple[Row, ...]:
  """A convolution and its batch norm: `{ours}` has a place for "conv" and "norm"."""
  kernel, batch = theirs
  return (
    Row(f"{ours.format('conv')}/kernel", f"{kernel}.weight", _CONVOLUTION),
    *norm(ours.format("norm"), batch),
    Row(f"{ours.format('norm')}/mean", f"{batch}.running_mean", SAME),
    Row(f"{ours.format('norm')}/var", f"{batch}.running_var", SAME),
  )


def _resnet(config: ResNetConfig) -> tuple[Row, ...]:
  pool, rows = "visual.attnpool", []
  for n in (1, 2, 3):
    rows += _convolution(f"vision/{{}}{n}", (f"visual.conv{n}", f"visual.bn{n}"))
  inputs = config.width
  for stage, blocks in enumerate(config.stages, 1):
    outputs = 4 * config.width * 2 ** (stage - 1)
    for block in range(blocks):
      ours, theirs = f"vision/stage{stage}_block{block}", f"visual.layer{stage}.{block}"
      for n in (1, 2, 3):
        rows += _convolution(
          f"{ours}/{{}}{n}", (f"{theirs}.conv{n}", f"{theirs}.bn{n}")
        )
      if block == 0 and (stage > 1 or inputs != outputs):
        names = f"{theirs}.downsample.0", f"{theirs}.downsample.1"
        rows += _convolution(f"{ours}/shortcut_{{}}", names)
      inputs = outputs
  return (
    *rows,
    Row("vision/position_embedding/embedding", f"{pool}.positional_embedding", SAME),
    *linear("vision/pool/query", f"{pool}.q_proj"),
    *linear("vision/pool/key", f"{pool}.k_proj"),
    *linear("vision/pool/value", f"{pool}.v_proj"),
    *linear("image_projection", f"{pool}.c_proj"),
  )


@functools.cache
def native_table(config: CLIPConfig) -> tuple[Row, ...]:
  """The rows of a model of this shape."""
  resnet = isinstance(config.vision, ResNetConfig)
  return (*_SHARED, *(_resnet(config.vision) if resnet else _VIT))


# Numbers of OpenAI's archives, masks that some files hold, batch norms' counters.
_IGNORED = re.compile(
  r"input_resolution|context_length|vocab_size|(.*\.)?(attn_mask|num_batches_tracked)"
)


def native_layout(config: CLIPConfig, described_by: str, mend: str) -> Layout:
  """The layout of a model of this shape.

  Args:
    config: the shape.
    described_by, mend: for errors, see `Layout`.
  """
  return Layout(native_table(config), _IGNORED, described_by, mend)


def native_config(
  shapes: Shapes,
  where: str,
  *,
  act: str,
  vision_head: int = 64,
  text_heads: int | None = None,
  pruned: bool = False,
) -> CLIPConfig:
  """The shape of a model by its tensors, ViT or ResNet.

  Args:
    shapes: by key.
    where: the file, for errors.
    act: the activation of both towers.
    vision_head: channels of a head of the image tower.
    text_heads: of the text tower; None: as many as have 64 channels.
    pruned: whether layers may lack heads, MLP channels, or a half. Where they may not,
      such a layer is a damaged file's, whose missing keys `from_tensors` will name.

  Raises:
    UserError: keys that say the shape are missing (it names them), or sizes do not fit.
  """
  resnet = "visual.layer1.0.conv1.weight" in shapes
  text_width = _size(shapes, "token_embedding.weight", 1, where)
  text_head = text_width // text_heads if text_heads else 64
  vocabulary = _size(shapes, "token_embedding.weight", 0, where)
  text = TextConfig(
    width=text_width,
    vocab_size=vocabulary,
    context=_size(shapes, "positional_embedding", 0, where),
    act=act,
    # They pool at the largest id, which is that of the last entry.
    bos_id=vocabulary - 2,
    eos_id=vocabulary - 1,
    **_layers(shapes, "transformer", text_width, text_head, pruned, where),
  )
  if resnet:
    vision = _resnet_config(shapes, where, vision_head)
  else:
    width = _size(shapes, "visual.conv1.weight", 0, where)
    patch = _size(shapes, "visual.conv1.weight", 2, where)
    vision = VisionConfig(
      width=width,
      patch=patch,
      image_size=patch * _side(shapes, "visual.positional_embedding", where),
      act=act,
      **_layers(shapes, "visual.transformer", width, vision_head, pruned, where),
    )
  return CLIPConfig(vision, text, _size(shapes, "text_projection", 1, where))


def _size(shapes: Shapes, key: str, axis: int, where: str, low: int = 1) -> int:
  shape = shapes.get(key)
  if shape is None:
    raise UserError(
      f"{where} has no {key}: it is not a whole CLIP in OpenCLIP's layout. Take the file "
      "that was published."
    )
  if len(shape) <= axis or shape[axis] < low:
    raise UserError(
      f"{where}: {key} is {shape}, which is not its shape in any CLIP. Take the file that "
      "was published."
    )
  return shape[axis]


def _side(shapes: Shapes, key: str, where: str) -> int:
  """Of a square grid beside whose cells there is one more position."""
  cells = _size(shapes, key, 0, where) - 1
  side = math.isqrt(max(cells, 0))
  if side < 1 or side**2 != cells:
    raise UserError(f"{where}: {key} is for {cells} patches, which is no square image.")
  return side


def _layers(
  shapes: Shapes, tower: str, width: int, head: int, pruned: bool, where: str
) -> dict[str, object]:
  """`layers`, `heads`, `mlp` and, of a pruned tower, what else its config has."""
  pattern = re.compile(rf"{re.escape(tower)}\.resblocks\.(\d+)\..*")
  found = [int(m[1]) for m in map(pattern.fullmatch, shapes) if m]
  if not found:
    raise UserError(f"{where} has no {tower}.resblocks: it is not a whole CLIP.")

  def rows(key: str, low: int) -> int | None:
    return _size(shapes, key, 0, where, low) if key in shapes else None

  heads: list[int | None] = []
  mlps: list[int | None] = []
  for i in range(max(found) + 1):
    block = f"{tower}.resblocks.{i}"
    inner = rows(f"{block}.attn.in_proj_weight", 1)
    if inner is not None and inner % (3 * head):
      raise UserError(
        f"{where}: {block}.attn.in_proj_weight has {inner} rows, which is no whole number "
        f"of heads of {head} channels for query, key and value."
      )
    heads.append(None if inner is None else inner // (3 * head))
    # A pruned MLP that lost all its channels still adds its bias.
    mlps.append(rows(f"{block}.mlp.c_fc.weight", 0 if pruned else 1))
  most = {
    "heads": max(max(n or 0 for n in heads), 1),
    "mlp": max(max(n or 0 for n in mlps), 1),
  }
  if not pruned:
    if width % head:
      raise UserError(
        f"{where}: the {width} channels of {tower} are no heads of {head} channels."
      )
    return {"layers": len(heads), "heads": width // head, "mlp": most["mlp"]}
  same = len(set(heads)) == len(set(mlps)) == 1 and heads[0] and mlps[0]
  sizes = {} if same else {"layer_heads": tuple(heads), "layer_mlps": tuple(mlps)}
  if not same or most["heads"] * head != width:
    sizes["head_width"] = head
  return {"layers": len(heads), **most, **sizes}


def _resnet_config(shapes: Shapes, where: str, head: int) -> ResNetConfig:
  stages = []
  for stage in (1, 2, 3, 4):
    pattern = re.compile(rf"visual\.layer{stage}\.(\d+)\..*")
    blocks = [int(m[1]) for m in map(pattern.fullmatch, shapes) if m]
    if not blocks:
      raise UserError(f"{where} has no visual.layer{stage}: it is not a whole ResNet.")
    stages.append(max(blocks) + 1)
  width = _size(shapes, "visual.layer1.0.conv1.weight", 0, where)
  side = _side(shapes, "visual.attnpool.positional_embedding", where)
  if 32 * width % head:
    raise UserError(f"{where}: {32 * width} channels are no heads of {head} channels.")
  return ResNetConfig(width, tuple(stages), 32 * width // head, 32 * side)
