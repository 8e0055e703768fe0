"""Tiny encoder-decoders of transformers with random weights, and the same folder opened by minilm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import minilm

VOCABULARY = 99
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 37,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 11,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 31,
    "decoder_ffn_dim": 29,
    "max_position_embeddings": 40,
}
MARIAN: dict[str, Any] = {
    **BART,
    "decoder_vocab_size": VOCABULARY,
    "activation_function": "swish",
    "pad_token_id": VOCABULARY - 1,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
    "decoder_start_token_id": VOCABULARY - 1,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", T5),
    "t5-deeper-decoder": ("T5", {**T5, "num_layers": 1, "num_decoder_layers": 3}),
    "t5-gated-untied": ("T5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5-gated-silu": ("T5", {**T5, "feed_forward_proj": "gated-silu", "num_heads": 2, "d_kv": 7}),
    "t5-32-buckets": (
        "T5",
        {**T5, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 20},
    ),
    "mt5": ("MT5", T5),
    "umt5": ("UMT5", T5),
    "bart": ("Bart", BART),
    "mbart": ("MBart", {**BART, "scale_embedding": True, "decoder_start_token_id": 2}),
    "marian": ("Marian", MARIAN),
    "marian-scaled": (
        "Marian",
        {**MARIAN, "scale_embedding": True, "d_model": 21, "decoder_attention_heads": 7},
    ),
    "bart-scaled-relu": ("Bart", {**BART, "scale_embedding": True, "activation_function": "relu"}),
}


def pair(name: str, folder: Path, what: str = "ForConditionalGeneration", **changes: Any) -> tuple[Any, Any]:
    """transformers' model and ours, from one folder. Norms and biases are random too."""
    prefix, options = CASES[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{prefix}Config")(**{**options, **changes})
    config._attn_implementation = "eager"
    theirs = getattr(transformers, class_name(name, what))(config).eval()
    with torch.no_grad():
        for key, parameter in (*theirs.named_parameters(), *theirs.named_buffers()):
            if prefix == "Marian" and "positions" in key:
                continue
            norm = "norm" in key and key.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.2) + norm)
    if name == "t5-gated-untied":  # as in published files; transformers ties a new model
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn_like(theirs.lm_head.weight) * 0.3)
    theirs.save_pretrained(folder)
    return theirs, getattr(minilm, class_name(name, what)).from_pretrained(folder)


def class_name(name: str, what: str) -> str:
    """The class of a case with this head."""
    marian = name.startswith("marian") and what == "ForConditionalGeneration"
    return "MarianMTModel" if marian else f"{CASES[name][0]}{what}"


def batch(seed: int = 0, *, left: bool = True) -> dict[str, Tensor]:
    """Sources with padding on the right and (without learned positions) on the left; the decoder's on the
    right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (3, 13), generator=generator)
    mask = torch.ones(3, 13, dtype=torch.int64)
    mask[1, 8:] = 0
    if left:
        mask[2, :4] = 0
    decoder_mask = torch.ones(3, 7, dtype=torch.int64)
    decoder_mask[0, 5:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(3, VOCABULARY, (3, 7), generator=generator),
        "decoder_attention_mask": decoder_mask,
    }


def with_tokenizer(kind: str, folder: Path, what: str = "ForConditionalGeneration", **options: Any) -> Path:
    """A random model of transformers in the folder of its tokenizer, with its vocabulary and end tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prefix, sizes = CASES[kind]
    given = {**sizes, "vocab_size": len(tokenizer), **options}
    if kind == "marian":
        pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        given.update(decoder_vocab_size=len(tokenizer), pad_token_id=pad, decoder_start_token_id=pad)
        given.update(eos_token_id=end, forced_eos_token_id=end)
    config = getattr(transformers, f"{prefix}Config")(**given)
    torch.manual_seed(len(kind))
    model = getattr(transformers, class_name(kind, what))(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "positions" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name and "weight" in name))
    model.save_pretrained(folder)
    return folder
