"""Gemma 3, the text models (Gemma Team 2025, arXiv:2503.19786): Gemma 2 with norms of q and k instead of soft
caps, and two ropes.

Five of six layers have a sliding window, and rope with a smaller theta; only the others, which see the whole
text, have their frequencies scaled for long texts. EmbeddingGemma (arXiv:2509.20354) is such a model whose
tokens see later ones, too (use_bidirectional_attention).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import ConfigError, ModelConfig
from ..weights import copy
from . import gemma2
from .family import Options
from .positions import rope_config

DEFAULTS: dict[str, Any] = {
    **gemma2.DEFAULTS,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "rope_local_base_freq": None,
    "sliding_window_pattern": None,
    "_sliding_window_pattern": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
KINDS = ("full_attention", "sliding_attention")


def ropes(hf: Options, thetas: tuple[float, float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rope options of layers with full attention (with `rope_scaling`), and of those with a window.
    `thetas`: the defaults of rope_theta."""
    given, scaling = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    if isinstance(given, dict):  # beside those of the kinds, transformers writes some that say nothing
        given = {k: v for k, v in given.items() if k in KINDS or v not in (None, "default")}
    if not isinstance(given, dict) or not set(given) <= set(KINDS) or not isinstance(scaling, dict):
        raise ConfigError(
            f"{hf.model_type}: rope_parameters must be options for {' and '.join(KINDS)}, and are "
            f"{given!r:.80}"
        )
    pairs = zip(KINDS, thetas, strict=True)
    full, local = ({"rope_theta": theta, **(given.get(kind) or {})} for kind, theta in pairs)
    return {**full, **scaling}, local


def translate(hf: Options) -> ModelConfig:
    """Gemma 3's options -> ModelConfig."""
    every = hf.get("sliding_window_pattern", hf.get("_sliding_window_pattern", 6))
    if not isinstance(every, int) or every < 1:
        raise ConfigError(f"{hf.model_type}: sliding_window_pattern must be at least 1, and is {every!r}")
    thetas = hf.get("rope_theta", 1_000_000.0), hf.get("rope_local_base_freq", 10_000.0)
    full, local = ropes(hf, thetas)
    spec = replace(
        gemma2.translate(hf, rope_config(hf, given=full), every),
        local_rope=rope_config(hf, given=local),
        qk_norm=True,
    )
    if not hf.get("use_bidirectional_attention", False):
        return spec
    # the window is then on both sides: half of it on each
    return replace(spec, causal=False, windows=tuple(w and w // 2 + 1 for w in spec.windows))


FAMILY = replace(
    gemma2.FAMILY,
    model_type="gemma3_text",
    class_prefix="Gemma3Text",
    defaults=DEFAULTS,
    translate=translate,
    body=(
        *gemma2.BODY,
        copy("layers.{i}.self_attn.q_norm.weight", "body.layers.{i}.attention.q_norm.weight"),
        copy("layers.{i}.self_attn.k_norm.weight", "body.layers.{i}.attention.k_norm.weight"),
    ),
    heads={head: gemma2.FAMILY.heads[head] for head in ("causal-lm", "sequence-classification")},
    class_names={"causal-lm": "Gemma3ForCausalLM"},
    rejected={
        **{
            name: only
            for name, only in gemma2.FAMILY.rejected.items()
            if name != "use_bidirectional_attention"
        },
        "attn_logit_softcapping": (),  # transformers reads and ignores it
    },
)
