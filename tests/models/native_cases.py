"""CLIPs under OpenCLIP's keys: random weights, and PyTorch's evaluation of a state dict.

Written from the layout alone, without our tables: `embed_image` and `embed_text` read
what a block has from the keys that are there, as the release of TinyCLIP runs what it
pruned.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

HEAD = 64
VOCABULARY, CONTEXT = 514, 16
END = VOCABULARY - 1
ACTS = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}
State = dict[str, torch.Tensor]


class _Drawn(dict):
  """Random tensors by key, norms and biases among them."""

  def __init__(self, seed: int):
    super().__init__()
    self._generator = torch.Generator().manual_seed(seed)

  def draw(self, key: str, *shape: int, scale: float | None = None) -> None:
    scale = shape[-1] ** -0.5 if scale is None else scale
    self[key] = scale * torch.randn(*shape, generator=self._generator)

  def norm(self, key: str, width: int) -> None:
    self.draw(f"{key}.weight", width, scale=0.2)
    self[f"{key}.weight"] += 1
    self.draw(f"{key}.bias", width, scale=0.2)

  def linear(self, key: str, outputs: int, inputs: int) -> None:
    self.draw(f"{key}.weight", outputs, inputs)
    self.draw(f"{key}.bias", outputs, scale=0.2)

  def convolution(self, key: str, batch: str, shape: tuple[int, ...]) -> None:
    fan = shape[1] * shape[2] * shape[3]
    self.draw(f"{key}.weight", *shape, scale=(2 / fan) ** 0.5)
    self.norm(batch, shape[0])
    self.draw(f"{batch}.running_mean", shape[0], scale=0.2)
    self.draw(f"{batch}.running_var", shape[0], scale=0.3)
    self[f"{batch}.running_var"].exp_()
    self[f"{batch}.num_batches_tracked"] = torch.tensor(7)

  def transformer(self, tower: str, width: int, layers: int) -> None:
    for i in range(layers):
      block = f"{tower}.resblocks.{i}"
      self.draw(f"{block}.attn.in_proj_weight", 3 * width, width)
      self.draw(f"{block}.attn.in_proj_bias", 3 * width, scale=0.2)
      self.linear(f"{block}.attn.out_proj", width, width)
      self.norm(f"{block}.ln_1", width)
      self.norm(f"{block}.ln_2", width)
      self.linear(f"{block}.mlp.c_fc", 4 * width, width)
      self.linear(f"{block}.mlp.c_proj", width, 4 * width)


def _text(state: _Drawn, width: int, layers: int, outputs: int) -> None:
  state.draw("token_embedding.weight", VOCABULARY, width, scale=0.1)
  state.draw("positional_embedding", CONTEXT, width, scale=0.1)
  state.transformer("transformer", width, layers)
  state.norm("ln_final", width)
  state.draw("text_projection", width, outputs, scale=width**-0.5)
  state["logit_scale"] = torch.tensor(3.7)


def vit(
  width: int = 128, layers: int = 2, patch: int = 8, grid: int = 4, seed: int = 0
) -> State:
  """A CLIP with a ViT; the text tower is as wide and as deep."""
  state, outputs = _Drawn(seed), 24
  state.draw("visual.conv1.weight", width, 3, patch, patch, scale=0.05)
  state.draw("visual.class_embedding", width, scale=0.2)
  state.draw("visual.positional_embedding", grid**2 + 1, width, scale=0.2)
  state.norm("visual.ln_pre", width)
  state.transformer("visual.transformer", width, layers)
  state.norm("visual.ln_post", width)
  state.draw("visual.proj", width, outputs, scale=width**-0.5)
  _text(state, width, layers, outputs)
  return dict(state)


def resnet(
  width: int = 4, stages: tuple[int, ...] = (2, 1, 2, 1), grid: int = 2, seed: int = 0
) -> State:
  """A CLIP with a ResNet, whose pool has heads of 64 channels."""
  state, outputs = _Drawn(seed), 24
  for n, (inputs, channels) in enumerate(
    ((3, width // 2), (width // 2, width // 2), (width // 2, width)), 1
  ):
    state.convolution(f"visual.conv{n}", f"visual.bn{n}", (channels, inputs, 3, 3))
  inputs = width
  for stage, blocks in enumerate(stages, 1):
    channels = width * 2 ** (stage - 1)
    for block in range(blocks):
      at, last = f"visual.layer{stage}.{block}", 4 * channels
      state.convolution(f"{at}.conv1", f"{at}.bn1", (channels, inputs, 1, 1))
      state.convolution(f"{at}.conv2", f"{at}.bn2", (channels, channels, 3, 3))
      state.convolution(f"{at}.conv3", f"{at}.bn3", (last, channels, 1, 1))
      if block == 0:
        names = f"{at}.downsample.0", f"{at}.downsample.1"
        state.convolution(*names, (last, inputs, 1, 1))
      inputs = last
  pool = "visual.attnpool"
  state.draw(f"{pool}.positional_embedding", grid**2 + 1, inputs)
  for name in ("q", "k", "v"):
    state.linear(f"{pool}.{name}_proj", inputs, inputs)
  state.linear(f"{pool}.c_proj", outputs, inputs)
  _text(state, 64, 2, outputs)
  return dict(state)


def embed_image(state: State, pixels: torch.Tensor, act: str) -> torch.Tensor:
  """(B, 3, S, S) -> (B, D), not normalised."""
  if "visual.proj" not in state:
    return _embed_by_resnet(state, pixels)
  kernel = state["visual.conv1.weight"]
  x = F.conv2d(pixels, kernel, stride=kernel.shape[-1])
  x = x.reshape(*x.shape[:2], -1).permute(0, 2, 1)
  first = state["visual.class_embedding"].expand(len(x), 1, -1)
  x = torch.cat([first, x], 1) + state["visual.positional_embedding"]
  x = _transformer(state, "visual.transformer", _norm(state, "visual.ln_pre", x), act)
  return _norm(state, "visual.ln_post", x[:, 0]) @ state["visual.proj"]


def embed_text(state: State, tokens: torch.Tensor, act: str) -> torch.Tensor:
  """(B, L) -> (B, D), not normalised."""
  x = state["token_embedding.weight"][tokens]
  x = x + state["positional_embedding"][: tokens.shape[1]]
  x = _norm(state, "ln_final", _transformer(state, "transformer", x, act, causal=True))
  return x[torch.arange(len(x)), tokens.argmax(1)] @ state["text_projection"]


def _norm(state: State, key: str, x: torch.Tensor) -> torch.Tensor:
  return F.layer_norm(x, x.shape[-1:], state[f"{key}.weight"], state[f"{key}.bias"])


def _linear(state: State, key: str, x: torch.Tensor) -> torch.Tensor:
  return F.linear(x, state[f"{key}.weight"], state[f"{key}.bias"])


def _transformer(state, tower: str, x: torch.Tensor, act: str, causal=False):
  layers = [key.split("resblocks.")[1] for key in state if key.startswith(tower)]
  for i in range(1 + max(int(key.split(".")[0]) for key in layers)):
    block = f"{tower}.resblocks.{i}"
    if f"{block}.attn.in_proj_weight" in state:
      x = x + _attention(
        state, f"{block}.attn", _norm(state, f"{block}.ln_1", x), causal
      )
    if f"{block}.mlp.c_fc.weight" in state:
      y = _linear(state, f"{block}.mlp.c_fc", _norm(state, f"{block}.ln_2", x))
      x = x + _linear(state, f"{block}.mlp.c_proj", ACTS[act](y))
  return x


def _attention(state, key: str, x: torch.Tensor, causal: bool) -> torch.Tensor:
  weight, bias = state[f"{key}.in_proj_weight"], state[f"{key}.in_proj_bias"]
  batch, length, _ = x.shape
  q, k, v = (
    F.linear(x, w, b).reshape(batch, length, -1, HEAD).transpose(1, 2)
    for w, b in zip(weight.chunk(3), bias.chunk(3), strict=True)
  )
  scores = q @ k.transpose(-1, -2) * HEAD**-0.5
  if causal:
    scores = scores + torch.full((length, length), -torch.inf).triu(1)
  mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
  return _linear(state, f"{key}.out_proj", mixed)


def _convolve(state, key: str, batch: str, x: torch.Tensor, **options) -> torch.Tensor:
  x = F.conv2d(x, state[f"{key}.weight"], **options)
  names = ("running_mean", "running_var", "weight", "bias")
  return F.batch_norm(x, *(state[f"{batch}.{name}"] for name in names))


def _embed_by_resnet(state: State, x: torch.Tensor) -> torch.Tensor:
  for n, stride in ((1, 2), (2, 1), (3, 1)):
    names = f"visual.conv{n}", f"visual.bn{n}"
    x = _convolve(state, *names, x, stride=stride, padding=1).relu()
  x = F.avg_pool2d(x, 2)
  for stage in (1, 2, 3, 4):
    block = 0
    while f"visual.layer{stage}.{block}.conv1.weight" in state:
      at = f"visual.layer{stage}.{block}"
      y = _convolve(state, f"{at}.conv1", f"{at}.bn1", x).relu()
      y = _convolve(state, f"{at}.conv2", f"{at}.bn2", y, padding=1).relu()
      if stage > 1 and block == 0:
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
      if f"{at}.downsample.0.weight" in state:
        x = _convolve(state, f"{at}.downsample.0", f"{at}.downsample.1", x)
      x = (x + _convolve(state, f"{at}.conv3", f"{at}.bn3", y)).relu()
      block += 1
  pool = "visual.attnpool"
  x = x.flatten(2).permute(2, 0, 1)
  x = torch.cat([x.mean(0, keepdim=True), x])
  x = x + state[f"{pool}.positional_embedding"][:, None]
  named = {f"{n}_proj_weight": state[f"{pool}.{n}_proj.weight"] for n in "qkv"}
  mixed, _ = F.multi_head_attention_forward(
    x, x, x, x.shape[-1], x.shape[-1] // HEAD, None,
    torch.cat([state[f"{pool}.{n}_proj.bias"] for n in "qkv"]), None, None, False, 0.0,
    state[f"{pool}.c_proj.weight"], state[f"{pool}.c_proj.bias"], training=False,
    need_weights=False, use_separate_proj_weight=True, **named,
  )  # fmt: skip
  return mixed[0]


# What a gate that is kept multiplies by, in the release's own way to load a pruned model.
GATE = 1 / (1 + np.exp(-12.0))


def pruned(state: State, plan: dict[str, Any], gate: float = 1.0) -> State:
  """Cuts a ViT's towers as TinyCLIP's release does.

  Args:
    state: of `vit`.
    plan: for "visual.transformer" and "transformer": `hidden`, the channels kept, and
      per layer `heads` and `mlps`, the lists of those kept. No heads: the attention and
      its norm go. None of the MLP: it and its norm go.
    gate: the factor of what is kept, folded into the weights behind each gate.
  """
  out = copy.deepcopy(state)
  for tower, cut in plan.items():
    kept = cut["hidden"]
    for key in [key for key in out if key.startswith(f"{tower}.resblocks.")]:
      del out[key]
    for i, (heads, mlp) in enumerate(zip(cut["heads"], cut["mlps"], strict=True)):
      block = f"{tower}.resblocks.{i}"
      named = {k.removeprefix(f"{block}."): v for k, v in state.items()}
      if heads:
        rows = torch.tensor([h * HEAD + c for h in heads for c in range(HEAD)])
        width = named["attn.out_proj.weight"].shape[0]
        parts = torch.cat([rows + n * width for n in range(3)])
        out[f"{block}.attn.in_proj_weight"] = named["attn.in_proj_weight"][parts][
          :, kept
        ]
        out[f"{block}.attn.in_proj_bias"] = named["attn.in_proj_bias"][parts]
        weight = named["attn.out_proj.weight"][kept][:, rows]
        out[f"{block}.attn.out_proj.weight"] = gate**2 * weight
        out[f"{block}.attn.out_proj.bias"] = gate * named["attn.out_proj.bias"][kept]
      if mlp is not None:
        out[f"{block}.mlp.c_fc.weight"] = named["mlp.c_fc.weight"][mlp][:, kept]
        out[f"{block}.mlp.c_fc.bias"] = named["mlp.c_fc.bias"][mlp]
        weight = named["mlp.c_proj.weight"][kept][:, mlp]
        out[f"{block}.mlp.c_proj.weight"] = gate**2 * weight
        out[f"{block}.mlp.c_proj.bias"] = gate * named["mlp.c_proj.bias"][kept]
      for norm, there in (("ln_1", heads), ("ln_2", mlp is not None)):
        for leaf in ("weight", "bias") if there else ():
          out[f"{block}.{norm}.{leaf}"] = named[f"{norm}.{leaf}"][kept]
    image = tower.startswith("visual")
    norms = ("visual.ln_pre", "visual.ln_post") if image else ("ln_final",)
    for key in (f"{norm}.{leaf}" for norm in norms for leaf in ("weight", "bias")):
      out[key] = state[key][kept]
    prefix = "visual." if image else ""
    last = "visual.proj" if image else "text_projection"
    out[last] = gate * state[last][kept]
    key = f"{prefix}positional_embedding"
    out[key] = gate * state[key][:, kept]
    if image:
      for key in ("visual.conv1.weight", "visual.class_embedding"):
        out[key] = gate * state[key][kept]
    else:
      out["token_embedding.weight"] = gate * state["token_embedding.weight"][:, kept]
  return {key: value.contiguous() for key, value in out.items()}


def uneven() -> tuple[State, dict[str, Any]]:
  """A ViT of three layers and four heads, and a plan that leaves no two layers alike."""
  rng = np.random.default_rng(3)

  def some(count: int, of: int) -> list[int]:
    return sorted(rng.choice(of, count, replace=False).tolist())

  width = 4 * HEAD
  plan = {
    "visual.transformer": {
      "hidden": some(152, width),
      "heads": [some(3, 4), [], some(1, 4)],
      "mlps": [some(300, 4 * width), some(77, 4 * width), None],
    },
    "transformer": {
      "hidden": some(90, width),
      "heads": [some(2, 4), some(4, 4), some(1, 4)],
      "mlps": [some(55, 4 * width), [], some(200, 4 * width)],
    },
  }
  return vit(width=width, layers=3, patch=8, grid=3), plan


def tinyclip_keys(state: State, ddp: bool = False) -> State:
  """The names of TinyCLIP's files; `ddp` those of one that was trained on several GPUs."""
  wrap, image, text = ("module.", "_image_encoder", "_text_encoder") if ddp else (
    "", "image_encoder_without_ddp", "text_encoder_without_ddp"
  )  # fmt: skip
  named = {}
  for key, value in state.items():
    of = "_logit_scale" if key == "logit_scale" else text
    of = image if key.startswith("visual.") else of
    named[f"{of}.{wrap}{key}"] = value
  return named


def tokenizer_folder(folder: Path, entries: int = VOCABULARY) -> Path:
  """Writes a tokenizer of single bytes, and of as many entries as the cases have."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  symbols = [chr(byte) for byte in printable]
  symbols += [chr(256 + n) for n in range(256 - len(symbols))]
  names = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
  names += [f"more{n}" for n in range(entries - len(names) - 2)]
  names += ["<|startoftext|>", "<|endoftext|>"]
  vocabulary = {name: i for i, name in enumerate(names)}
  (folder / "vocab.json").write_text(json.dumps(vocabulary))
  (folder / "merges.txt").write_text("#version: 0.2\n")
  return folder


def pictures(size: int, count: int = 3) -> np.ndarray:
  """(count, size, size, 3) float32."""
  return np.random.default_rng(0).standard_normal((count, size, size, 3), np.float32)


def sentences(count: int = 3) -> np.ndarray:
  """(count, CONTEXT) ids, whose ends of text are at different places; padded with 0."""
  tokens = np.random.default_rng(1).integers(
    1, END - 1, (count, CONTEXT), dtype=np.int32
  )
  for row, line in enumerate(tokens):
    line[5 + 3 * row] = END
    line[6 + 3 * row :] = 0
  return tokens


def torch_embeddings(
  state: State, pixels: np.ndarray, tokens: np.ndarray, act: str
) -> tuple[np.ndarray, np.ndarray]:
  """PyTorch's raw embeddings of a state dict."""
  state = {key: value.float() for key, value in state.items()}
  with torch.no_grad():
    image = embed_image(state, torch.from_numpy(pixels.transpose(0, 3, 1, 2)), act)
    text = embed_text(state, torch.from_numpy(tokens).long(), act)
  return image.numpy(), text.numpy()
