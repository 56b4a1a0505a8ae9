"""VISTA's keys in our parameter tree: rows as in `convert.py`."""

from __future__ import annotations

import re

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

# The class token and the position table, which EVA keeps with axes of one in front.
_ONE_AXIS = Transform(lambda x, _: x[0], lambda x, _: x[None])
_TWO_AXES = Transform(lambda x, _: x[0, 0], lambda x, _: x[None, None])

TEXT_EMBEDDINGS, TEXT_BLOCKS, POOLER = "bge_embeddings", "bge_encoder", "bge_pooler"
VISUAL = "model_visual.visual"


def _eva_blocks() -> tuple[Row, ...]:
  ours, theirs = "vision/blocks", f"{VISUAL}.blocks.{{i}}"
  return (
    *norm(f"{ours}/norm1", f"{theirs}.norm1"),
    Row(f"{ours}/attention/query/kernel", f"{theirs}.attn.q_proj.weight", TRANSPOSED),
    Row(f"{ours}/attention/query/bias", f"{theirs}.attn.q_bias", SAME),
    Row(f"{ours}/attention/key/kernel", f"{theirs}.attn.k_proj.weight", TRANSPOSED),
    Row(f"{ours}/attention/value/kernel", f"{theirs}.attn.v_proj.weight", TRANSPOSED),
    Row(f"{ours}/attention/value/bias", f"{theirs}.attn.v_bias", SAME),
    *norm(f"{ours}/attention/inner_norm", f"{theirs}.attn.inner_attn_ln"),
    *linear(f"{ours}/attention/out", f"{theirs}.attn.proj"),
    *norm(f"{ours}/norm2", f"{theirs}.norm2"),
    *linear(f"{ours}/mlp/gate", f"{theirs}.mlp.w1"),
    *linear(f"{ours}/mlp/fc1", f"{theirs}.mlp.w2"),
    *norm(f"{ours}/mlp/norm", f"{theirs}.mlp.ffn_ln"),
    *linear(f"{ours}/mlp/fc2", f"{theirs}.mlp.w3"),
  )


def _bert_blocks() -> tuple[Row, ...]:
  ours, theirs = "text/blocks", f"{TEXT_BLOCKS}.layer.{{i}}"
  return (
    *linear(f"{ours}/attention/query", f"{theirs}.attention.self.query"),
    *linear(f"{ours}/attention/key", f"{theirs}.attention.self.key"),
    *linear(f"{ours}/attention/value", f"{theirs}.attention.self.value"),
    *linear(f"{ours}/attention/out", f"{theirs}.attention.output.dense"),
    *norm(f"{ours}/norm1", f"{theirs}.attention.output.LayerNorm"),
    *linear(f"{ours}/mlp/fc1", f"{theirs}.intermediate.dense"),
    *linear(f"{ours}/mlp/fc2", f"{theirs}.output.dense"),
    *norm(f"{ours}/norm2", f"{theirs}.output.LayerNorm"),
  )


VISTA_TABLE: tuple[Row, ...] = (
  Row("vision/class_embedding", f"{VISUAL}.cls_token", _TWO_AXES),
  Row("vision/position_embedding/embedding", f"{VISUAL}.pos_embed", _ONE_AXIS),
  Row("vision/patch_embedding/kernel", f"{VISUAL}.patch_embed.proj.weight", PATCHES),
  Row("vision/patch_embedding/bias", f"{VISUAL}.patch_embed.proj.bias", SAME),
  *_eva_blocks(),
  *linear("image_projection", "visual_proj"),
  *(
    Row(f"text/{name}_embedding/embedding", f"{TEXT_EMBEDDINGS}.{key}.weight", SAME)
    for name, key in (
      ("token", "word_embeddings"),
      ("position", "position_embeddings"),
      ("type", "token_type_embeddings"),
    )
  ),
  *norm("text/embedding_norm", f"{TEXT_EMBEDDINGS}.LayerNorm"),
  *_bert_blocks(),
  Row("fixed/rotary_cos", f"{VISUAL}.rope.freqs_cos", SAME),
  Row("fixed/rotary_sin", f"{VISUAL}.rope.freqs_sin", SAME),
  *linear("fixed/pooler", f"{POOLER}.dense"),
  *norm("fixed/vision_norm", f"{VISUAL}.norm"),
  *linear("fixed/vision_head", f"{VISUAL}.head"),
  Row("fixed/vision_logit_scale", "model_visual.logit_scale", SAME),
)
VISTA = Layout(
  VISTA_TABLE,
  re.compile(r"bge_embeddings\.position_ids"),  # of files of older transformers
  "its config.json",
  "Take config.json and weights from the same model.",
  "VISTA",
)
