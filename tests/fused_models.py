"""Models whose sizes fill no panel, page or vector, for what runs them whole in one native call, and batches
for them."""

from __future__ import annotations

from typing import Any

import torch
from pairs import randomise
from strategies import ENCODERS, small
from torch import Tensor, nn

import minilm
from minilm.model.auto import MODELS
from minilm.model.batch import Packed, pack
from minilm.ops.quantized import quantise
from minilm.quantized import QuantizedLinear

ODD = {"hidden_size": 40, "num_attention_heads": 2, "intermediate_size": 77, "num_hidden_layers": 2}
SIZES: dict[str, dict[str, Any]] = {
    "bert": ODD,
    "roberta": ODD,
    "distilbert": {"dim": 40, "n_heads": 2, "n_layers": 2, "hidden_dim": 77},
    "gpt2": {"n_embd": 40, "n_head": 2, "n_layer": 2, "n_inner": 77},
    "llama": {**ODD, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20},
    "mistral": {**ODD, "num_key_value_heads": 1, "head_dim": 20, "sliding_window": 5},
    "qwen2": {**ODD, "num_key_value_heads": 1, "head_dim": 20},
    "qwen3": {**ODD, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10},
    "phi3": {**ODD, "num_key_value_heads": 1, "head_dim": 20},
}
"""Heads of 20 and 10, 77 inner channels: nothing fills whole panels."""

LATER: dict[str, dict[str, Any]] = {
    "smollm3": {**ODD, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10},
    "olmo2": {**ODD, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10},
    "gpt_neox": {**ODD, "rotary_pct": 0.3},
    "phi": {**ODD, "num_key_value_heads": 1, "partial_rotary_factor": 0.5},
    "gemma": {**ODD, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 20},
    "gemma2": {**ODD, "num_key_value_heads": 1, "head_dim": 20, "sliding_window": 5},
    "gemma3_text": {**ODD, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10},
}
"""Families with other norms, ropes and heads, which have tests of their own."""
BIDIRECTIONAL: dict[str, dict[str, Any]] = {
    "modernbert": {**ODD, "num_hidden_layers": 4, "local_attention": 10},
    "nomic_bert": {**ODD, "head_dim": 10},
    "electra": {**ODD, "embedding_size": 24},
    "albert": {**ODD, "embedding_size": 24, "num_hidden_layers": 3},
}
"""Encoders: with windows on both sides, norms without biases and none before the first attention; with rope;
with narrow tables; with one block for all layers."""

DECODERS = [family for family in SIZES if family not in ENCODERS]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
"""Sizes of a model that every quantised format can hold."""

QUANTISED_ERROR = {"int8": 0.03, "q8_0": 0.03, "q4_0": 0.03, "q4_1": 0.03}
"""Of hidden states against the reference, which dequantises, relative to their size: rows of x are in 8
bits."""


def model_of(family: str, **options: Any) -> Any:
    """A random model, with norms and biases that can be seen, for sequences as long as the tests have."""
    config = small(family, **{**(SIZES | LATER | BIDIRECTIONAL)[family], **options})
    config |= {"n_positions": 400} if family == "gpt2" else {"max_position_embeddings": 400}
    head: Any = "masked-lm" if family in ENCODERS else "causal-lm"
    model = MODELS[head].from_config(minilm.PretrainedConfig.from_dict(config))
    randomise(model, 0)
    return model.eval().requires_grad_(False)


def quantise_blocks(model: Any, format: str) -> None:
    """Exchange the linear layers of all blocks for quantised ones."""
    for block in dict.fromkeys(model.body.layers):  # ALBERT's is one
        for owner, name in (
            (block.attention, "qkv"),
            (block.attention, "out"),
            (block.mlp, "up"),
            (block.mlp, "down"),
        ):
            setattr(owner, name, quantised_linear(getattr(owner, name), format))


def quantised_linear(layer: Any, format: str) -> nn.Module:
    """The same layer, quantised."""
    return QuantizedLinear(quantise(layer.weight, format), layer.bias)


def batch(lengths: list[int], seed: int = 0) -> tuple[Tensor, Packed]:
    """Random tokens, int64 [T], end to end."""
    columns = torch.arange(max(lengths))
    found = pack(len(lengths), max(lengths), columns < torch.tensor(lengths)[:, None], torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 41, (sum(lengths),), generator=generator), found


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """A vector of integers."""
    return torch.tensor(values, dtype=dtype)
