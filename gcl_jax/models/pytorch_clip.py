"""A CLIP in PyTorch, as gcl_jax exports those that transformers' CLIPModel cannot hold:
pruned transformers whose layers differ in size, and image towers that are ResNets.

It needs torch and safetensors, nothing else:

    from pytorch_clip import load

    model = load(".")  # the folder of config.json and model.safetensors
    image = model.encode_image(pixels)  # (B, 3, S, S), normalised -> (B, D)
    text = model.encode_text(tokens)  # (B, L) ids, end of text included -> (B, D)
    fused = model.fuse(image, text)  # unit vectors of documents with both

Embeddings of one modality are not normalised. The keys of the weights are OpenCLIP's.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

ACTIVATIONS = {
  "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
  "gelu": F.gelu,
  "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
  "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Attention(nn.Module):
  """Self-attention whose heads need not fill the width."""

  def __init__(self, width: int, heads: int, head: int):
    super().__init__()
    inner = heads * head
    self.in_proj_weight = nn.Parameter(torch.zeros(3 * inner, width))
    self.in_proj_bias = nn.Parameter(torch.zeros(3 * inner))
    self.out_proj = nn.Linear(inner, width)
    self.heads, self.head = heads, head

  def forward(self, x: Tensor, causal: bool) -> Tensor:
    batch, length, _ = x.shape
    qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
    qkv = qkv.reshape(batch, length, 3, self.heads, self.head)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return self.out_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
  def __init__(self, width: int, hidden: int, act: str):
    super().__init__()
    self.c_fc = nn.Linear(width, hidden)
    self.c_proj = nn.Linear(hidden, width)
    self.act = ACTIVATIONS[act]

  def forward(self, x: Tensor) -> Tensor:
    return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
  """A half whose size is None was pruned away."""

  def __init__(self, config: dict, heads: int | None, hidden: int | None):
    super().__init__()
    width, eps = config["hidden_size"], config["layer_norm_eps"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    self.attn = self.mlp = None
    if heads is not None:
      self.ln_1 = nn.LayerNorm(width, eps)
      self.attn = Attention(width, heads, head)
    if hidden is not None:
      self.ln_2 = nn.LayerNorm(width, eps)
      self.mlp = MLP(width, hidden, config["hidden_act"])

  def forward(self, x: Tensor, causal: bool) -> Tensor:
    if self.attn is not None:
      x = x + self.attn(self.ln_1(x), causal)
    if self.mlp is not None:
      x = x + self.mlp(self.ln_2(x))
    return x


class Transformer(nn.Module):
  def __init__(self, config: dict):
    super().__init__()
    layers = config["num_hidden_layers"]
    heads = config.get("layer_heads") or [config["num_attention_heads"]] * layers
    hidden = config.get("layer_intermediate_sizes")
    hidden = hidden or [config["intermediate_size"]] * layers
    self.resblocks = nn.ModuleList(
      Block(config, *sizes) for sizes in zip(heads, hidden, strict=True)
    )

  def forward(self, x: Tensor, causal: bool) -> Tensor:
    for block in self.resblocks:
      x = block(x, causal)
    return x


class VisionTransformer(nn.Module):
  def __init__(self, config: dict, outputs: int):
    super().__init__()
    width, patch = config["hidden_size"], config["patch_size"]
    positions = (config["image_size"] // patch) ** 2 + 1
    eps = config["layer_norm_eps"]
    self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
    self.class_embedding = nn.Parameter(torch.zeros(width))
    self.positional_embedding = nn.Parameter(torch.zeros(positions, width))
    self.ln_pre = nn.LayerNorm(width, eps)
    self.transformer = Transformer(config)
    self.ln_post = nn.LayerNorm(width, eps)
    self.proj = nn.Parameter(torch.zeros(width, outputs))

  def forward(self, pixels: Tensor) -> Tensor:
    x = self.conv1(pixels).flatten(2).transpose(1, 2)
    first = self.class_embedding.expand(len(x), 1, -1)
    x = torch.cat([first, x], dim=1) + self.positional_embedding
    x = self.transformer(self.ln_pre(x), causal=False)
    return self.ln_post(x[:, 0]) @ self.proj


class BatchNorm(nn.Module):
  """With the statistics of the file, in training too."""

  def __init__(self, width: int):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(width))
    self.bias = nn.Parameter(torch.zeros(width))
    self.register_buffer("running_mean", torch.zeros(width))
    self.register_buffer("running_var", torch.ones(width))

  def forward(self, x: Tensor) -> Tensor:
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class Bottleneck(nn.Module):
  def __init__(self, inputs: int, width: int, stride: int):
    super().__init__()
    outputs = 4 * width
    self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
    self.bn1 = BatchNorm(width)
    self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
    self.bn2 = BatchNorm(width)
    self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
    self.bn3 = BatchNorm(outputs)
    self.stride, self.downsample = stride, None
    if stride > 1 or inputs != outputs:
      self.downsample = nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, bias=False), BatchNorm(outputs)
      )

  def forward(self, x: Tensor) -> Tensor:
    y = F.relu(self.bn1(self.conv1(x)))
    y = F.relu(self.bn2(self.conv2(y)))
    if self.stride > 1:
      x, y = F.avg_pool2d(x, self.stride), F.avg_pool2d(y, self.stride)
    y = self.bn3(self.conv3(y))
    return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
  """The mean of all cells attends to them."""

  def __init__(self, positions: int, width: int, heads: int, outputs: int):
    super().__init__()
    self.positional_embedding = nn.Parameter(torch.zeros(positions, width))
    self.q_proj = nn.Linear(width, width)
    self.k_proj = nn.Linear(width, width)
    self.v_proj = nn.Linear(width, width)
    self.c_proj = nn.Linear(width, outputs)
    self.heads = heads

  def forward(self, x: Tensor) -> Tensor:
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding

    def heads(y: Tensor) -> Tensor:
      return y.unflatten(2, (self.heads, -1)).transpose(1, 2)

    q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
    mixed = F.scaled_dot_product_attention(heads(q), heads(k), heads(v))
    return self.c_proj(mixed.transpose(1, 2).flatten(1))


class ResNet(nn.Module):
  def __init__(self, config: dict, outputs: int):
    super().__init__()
    width = config["hidden_size"]
    self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
    self.bn1 = BatchNorm(width // 2)
    self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
    self.bn2 = BatchNorm(width // 2)
    self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
    self.bn3 = BatchNorm(width)
    inputs = width
    for stage, count in enumerate(config["stage_layers"], 1):
      blocks = []
      for block in range(count):
        stride = 2 if stage > 1 and block == 0 else 1
        channels = width * 2 ** (stage - 1)
        blocks.append(Bottleneck(inputs, channels, stride))
        inputs = 4 * channels
      setattr(self, f"layer{stage}", nn.Sequential(*blocks))
    self.attnpool = AttentionPool(
      ((config["image_size"] + 1) // 32) ** 2 + 1,
      inputs,
      config["num_attention_heads"],
      outputs,
    )

  def forward(self, x: Tensor) -> Tensor:
    x = F.relu(self.bn1(self.conv1(x)))
    x = F.relu(self.bn2(self.conv2(x)))
    x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
    x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
    return self.attnpool(x)


class CLIP(nn.Module):
  """Both towers; `config` is config.json, `fusion` what gcl_jax.json says of it."""

  def __init__(self, config: dict, fusion: dict | None = None):
    super().__init__()
    vision, text, outputs = (
      config[key] for key in ("vision_config", "text_config", "projection_dim")
    )
    width = text["hidden_size"]
    self.visual = (ResNet if "stage_layers" in vision else VisionTransformer)(
      vision, outputs
    )
    self.token_embedding = nn.Embedding(text["vocab_size"], width)
    self.positional_embedding = nn.Parameter(
      torch.zeros(text["max_position_embeddings"], width)
    )
    self.transformer = Transformer(text)
    self.ln_final = nn.LayerNorm(width, text["layer_norm_eps"])
    self.text_projection = nn.Parameter(torch.zeros(width, outputs))
    self.logit_scale = nn.Parameter(torch.zeros(()))
    self.end, self.fusion = text["eos_token_id"], fusion or {}

  def encode_image(self, pixels: Tensor) -> Tensor:
    """(B, 3, S, S), normalised -> (B, D)."""
    return self.visual(pixels)

  def encode_text(self, tokens: Tensor) -> Tensor:
    """(B, L) ids -> (B, D); read at the first end of text, whatever follows it."""
    x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
    x = self.transformer(x, causal=True)
    # The end of text is 2 in old configs, and means the largest id.
    end = tokens if self.end == 2 else (tokens == self.end).int()
    x = x[torch.arange(len(x), device=x.device), end.argmax(dim=1)]
    return self.ln_final(x) @ self.text_projection

  def fuse(self, image: Tensor, text: Tensor) -> Tensor:
    """Raw embeddings (B, D) of documents with both -> unit vectors (B, D)."""
    if self.fusion.get("of", "raw") == "unit":
      image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    weights = (self.fusion.get(f"{name}_weight", 1.0) for name in ("image", "text"))
    image_weight, text_weight = weights
    return F.normalize(image_weight * image + text_weight * text, dim=-1)


def load(folder: str | Path = ".") -> CLIP:
  """The model of an exported folder, in evaluation mode, float32."""
  folder = Path(folder)
  config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  settings = folder / "gcl_jax.json"
  fusion = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
  model = CLIP(config, fusion.get("fusion"))
  model.load_state_dict(load_file(folder / "model.safetensors"))
  return model.eval()
