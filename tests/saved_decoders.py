"""Tiny random decoders as transformers saves them, without a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 40, "n_inner": 52},
    "llama": {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "intermediate_size": 34,
        "tie_word_embeddings": False,
    },
    "mistral": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 34,
        "sliding_window": 5,
        "tie_word_embeddings": True,
    },
}


def save_decoder(folder: Path, family: str, **options: Any) -> Path:
    """A tiny random decoder without a tokenizer, as transformers saves it."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, vocab_size=61, **{**DECODERS[family], **options})
    config.bos_token_id = config.eos_token_id = 1
    config.pad_token_id = None
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
