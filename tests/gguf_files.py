"""GGUF files for tests, written independently of what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from torch import Tensor, nn

from minilm.files.gguf import GGUFCheckpoint

Type = GGMLQuantizationType
Array = np.ndarray[Any, Any]


PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def gguf_name(name: str) -> str:
    part, _, kind = name.rpartition(".")
    if part.startswith("model.layers."):
        _, _, layer, part = part.split(".", 3)
        return f"blk.{layer}.{PARTS[part]}.{kind}"
    return f"{PARTS[part]}.{kind}"


def permuted(value: Array, heads: int) -> Array:
    """llama.cpp's order of the rows of q and k, row by row: the halves of each head interleaved."""
    size = len(value) // heads
    order = []
    for head in range(heads):
        for pair in range(size // 2):
            order += [head * size + pair, head * size + size // 2 + pair]
    return value[order]


def write_gguf(path: Path, arch: str, tensors: dict[str, Any], metadata: dict[str, Any]) -> Path:
    """`tensors`: our name in the file -> array, or (raw bytes, type). Values of `metadata` are written by
    their type."""
    writer = GGUFWriter(path, arch)
    for key, value in metadata.items():
        add: dict[type, Any] = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](key, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path: Path, model: nn.Module, extra: dict[str, Any] | None = None, **tensors: Any) -> Path:
    """A model of transformers as llama.cpp's converter would write it, in float32."""
    config: Any = model.config
    arch = {"mistral": "llama"}.get(config.model_type, config.model_type)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    arrays = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.float().numpy()
        if arch == "llama" and (part := name.split(".")[-2]) in heads:
            array = permuted(array, heads[part])
        arrays[gguf_name(name)] = array
    metadata = {
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    if getattr(config, "head_dim", None):
        metadata |= {f"{arch}.attention.{key}_length": config.head_dim for key in ("key", "value")}
    return write_gguf(path, arch, arrays | tensors, metadata | (extra or {}))


SMALL: dict[str, Any] = {
    "llama.context_length": 64,
    "llama.embedding_length": 8,
    "llama.block_count": 1,
    "llama.feed_forward_length": 12,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e4,
    "llama.rope.dimension_count": 4,
    "tokenizer.ggml.tokens": ["a", "b", "ü", "c", "d"],
    "tokenizer.ggml.scores": [0.5, -1.0, 2.0, 0.25, -3.0],
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
}


def small_tensors(seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    shapes = {
        "token_embd.weight": (5, 8),
        "output_norm.weight": (8,),
        "blk.0.attn_norm.weight": (8,),
        "blk.0.ffn_norm.weight": (8,),
        "blk.0.attn_q.weight": (8, 8),
        "blk.0.attn_k.weight": (4, 8),
        "blk.0.attn_v.weight": (4, 8),
        "blk.0.attn_output.weight": (8, 8),
        "blk.0.ffn_gate.weight": (12, 8),
        "blk.0.ffn_up.weight": (12, 8),
        "blk.0.ffn_down.weight": (8, 12),
    }
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def small(
    path: Path,
    tensors: dict[str, Any] | None = None,
    without: str = "",
    arch: str = "llama",
    **metadata: Any,
) -> Path:
    """A file of one small layer; `metadata` is given with the architecture's prefix left out and __ for a
    dot."""
    changed = {f"llama.{key.replace('__', '.')}": value for key, value in metadata.items()}
    kept = {
        key: value for key, value in (SMALL | changed).items() if not without or key != "llama." + without
    }
    return write_gguf(path, arch, small_tensors() | (tensors or {}), kept)


def read(checkpoint: GGUFCheckpoint, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(checkpoint.tensors[name].shape, dtype=dtype)
    checkpoint.read_into(name, out)
    return out


def blocks_of(kind: GGMLQuantizationType, rows: int, blocks: int, seed: int) -> Array:
    """Random bytes, the scales among them (which may be anywhere) replaced by those of real numbers where
    known."""
    size = GGML_QUANT_SIZES[kind][1]
    data = np.random.default_rng(seed).integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    halves = {"Q4_0": [0], "Q8_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}.get(kind.name, [])
    for number, at in enumerate(halves):
        scale = np.random.default_rng(seed + number + 1).normal(0, 0.1, (rows, blocks, 1)).astype("<f2")
        data[:, :, at : at + 2] = scale.view(np.uint8)
    return data.reshape(rows, blocks * size)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def divisors(config: Any) -> Array:
    """What llama.cpp's converter puts into rope_freqs.weight: by how much transformers slows each channel
    down."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    return (plain / scaled.double().numpy()).astype(np.float32)
