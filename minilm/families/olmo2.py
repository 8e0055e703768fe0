"""OLMo 2 (OLMo et al. 2025, arXiv:2501.00656): Llama with its norms in other places.

A norm of each sub-layer's output before the residual sum instead of one of its input, x = x +
norm(attention(x)), and an RMSNorm of q and of k over all heads at once; both keep training stable.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import ModelConfig
from ..weights import copy
from . import llama
from .family import Options

DEFAULTS: dict[str, Any] = {
    **{name: value for name, value in llama.DEFAULTS.items() if name != "mlp_bias"},
    "vocab_size": 50304,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 50279,
    "pad_token_id": 1,
}
NORMS = ("input_layernorm", "post_attention_layernorm")


def translate(hf: Options) -> ModelConfig:
    """OLMo 2's options -> ModelConfig."""
    return replace(
        llama.translate(hf),
        pre_norm=False,
        output_norm=True,
        qk_norm=True,
        qk_norm_of_all=True,
        mlp_bias=False,
    )


FAMILY = replace(
    llama.FAMILY,
    model_type="olmo2",
    class_prefix="Olmo2",
    defaults=DEFAULTS,
    translate=translate,
    body=(
        *(rule for rule in llama.BODY if not rule.sources[0].endswith(tuple(f"{n}.weight" for n in NORMS))),
        copy("layers.{i}.post_attention_layernorm.weight", "body.layers.{i}.attention_out_norm.weight"),
        copy("layers.{i}.post_feedforward_layernorm.weight", "body.layers.{i}.mlp_out_norm.weight"),
        copy("layers.{i}.self_attn.q_norm.weight", "body.layers.{i}.attention.q_norm.weight"),
        copy("layers.{i}.self_attn.k_norm.weight", "body.layers.{i}.attention.k_norm.weight"),
    ),
    heads={head: llama.HEADS[head] for head in ("causal-lm", "sequence-classification")},
    rejected={**llama.FAMILY.rejected, "mlp_bias": (False,)},
    head_dropout={},
    head_prefixes={},
)
