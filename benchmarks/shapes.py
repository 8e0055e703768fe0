"""Shapes of real models, and the op calls that they make, for the op level.

Random weights do not change the work, so only the configurations of BERT-base, GPT-2 and Llama-1B are
needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import costs, machine

HF_CONFIGS: dict[str, dict[str, Any]] = {
    "MiniLM-L6": {
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    },
    "BERT-base": {
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    },
    "GPT-2": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    "SmolLM2-135M": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "Llama-1B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
}

ENCODERS = ("MiniLM-L6", "BERT-base")

QUANTIZED = {"MiniLM-L6": ("int8", "q8_0"), "SmolLM2-135M": ("q8_0", "q4_0", "q4_1")}
"""The formats in which `quantized_linear` is measured: those that are common for each model."""
TRAINED = ("SmolLM2-135M",)
"""Models whose loss over the vocabulary is measured from the hidden states on. Logits of a larger vocabulary
and their gradients in float64, which the check needs, are too much for a CPU."""


def hf_config(model: str, layers: int | None = None) -> dict[str, Any]:
    """config.json of a model, with `layers` layers if given; a toy of the same family under
    MINILM_BENCH_TINY."""
    config = dict(HF_CONFIGS[model])
    gpt = config["model_type"] == "gpt2"
    depth = "n_layer" if gpt else "num_hidden_layers"
    if machine.tiny():
        config |= {"vocab_size": 211, depth: 2}
        if gpt:
            config |= {"n_embd": 64, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        else:
            config |= {"hidden_size": 64, "intermediate_size": 128}
            config |= {"num_attention_heads": 2}
            if "num_key_value_heads" in config:
                config |= {"num_key_value_heads": 1, "head_dim": 32}
    if layers is not None:
        config[depth] = layers
    return config


def spec(model: str, layers: int | None = None) -> Any:
    """The `minilm.config.ModelConfig` of a model."""
    from minilm.families import family_of
    from minilm.families.pretrained_config import PretrainedConfig

    config = PretrainedConfig.from_dict(hf_config(model, layers))
    return family_of(config.model_type).config(config)


@dataclass(frozen=True)
class Regime:
    """The lengths of a pass: new tokens, and contexts that they continue."""

    name: str
    lengths: tuple[int, ...]
    contexts: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        """New tokens."""
        return sum(self.lengths)

    @property
    def decoding(self) -> bool:
        """Whether the sequences continue a past."""
        return self.contexts is not None


def regimes(model: str) -> list[Regime]:
    """The typical uses of a model; toy sizes under MINILM_BENCH_TINY."""
    small = machine.tiny()
    if model in ENCODERS:
        return [
            Regime("1 x 16", (16,)),
            Regime("1 x 512", (40 if small else 512,)),
            Regime("32 x 128", (8,) * 3 if small else (128,) * 32),
        ]
    contexts = (32, 48) if small else (32, 1024)
    if model == "GPT-2":  # its window is 1,024 tokens, new ones included
        contexts = (32, 48) if small else (32, 960)
    eight = (1,) * (3 if small else 8)
    return [
        Regime("prefill 512", (40 if small else 512,)),
        Regime(f"decode after {contexts[0]}", (1,), (contexts[0] + 1,)),
        Regime(f"decode after {contexts[1]}", (1,), (contexts[1] + 1,)),
        Regime("decode, batch 8", eight, (contexts[0] + 1,) * len(eight)),
    ]


@dataclass(frozen=True)
class Case:
    """One op at one shape of one model."""

    model: str
    regime: Regime
    call: costs.Call
    spec: Any

    @property
    def op(self) -> str:
        """Name in `minilm.ops`."""
        return self.call.op

    @property
    def label(self) -> str:
        """The shape as text, for tables."""
        dims = self.call.dims
        if self.op in ("linear", "quantized_linear"):
            format = f", {dims['format']}" if "format" in dims else ""
            return f"{dims['T']} x {dims['I']} -> {dims['O']}{format}"
        if self.op == "linear_cross_entropy":
            gradients = ", with gradients" if dims["backward"] else ""
            return f"{dims['T']} x {dims['C']} -> {dims['V']}{gradients}"
        if self.op in ("attention", "paged_attention"):
            first = self.regime.lengths[0]
            context = f" on {self.regime.contexts[0]}" if self.regime.contexts else ""
            heads = f"{dims['H']}/{dims['Hkv']} heads of {dims['D']}"
            return f"{len(self.regime.lengths)} x {first}{context}, {heads}"
        if "C" in dims:
            return f"{dims['T']} x {dims['C']}"
        if self.op == "gated":
            return f"{dims['T']} x 2 x {dims['F']}"
        if self.op == "cross_entropy":
            return f"{dims['T']} x {dims['V']}"
        return f"{dims['T']} tokens, {dims.get('H', '-')}/{dims['Hkv']} heads of {dims['D']}"

    @property
    def name(self) -> str:
        """Unique name of the workload."""
        return f"{self.op} [{self.label}] {self.model} {self.regime.name}"


def op_cases(models: Sequence[str] = tuple(HF_CONFIGS), itemsize: int = 4) -> list[Case]:
    """All ops at the shapes of `models`, each shape of a model once."""
    cases: list[Case] = []
    for model in models:
        config, seen = spec(model), set()
        for regime in regimes(model):
            logits = 0 if model in ENCODERS else len(regime.lengths)
            calls = costs.forward(
                config,
                regime.lengths,
                contexts=regime.contexts,
                logits=logits,
                cached=model not in ENCODERS,
                b=itemsize,
                wb=itemsize,
                cb=itemsize,
            )
            if model not in ENCODERS and not regime.decoding:
                dims = {"T": regime.tokens, "V": config.vocab_size, "b": itemsize}
                calls.append(costs.Call("cross_entropy", dims, 1, "loss"))
                if config.rope is not None:
                    heads = {"H": config.num_heads, "Hkv": config.num_kv_heads, "D": config.head_dim}
                    calls.append(
                        costs.Call("rope", {"T": regime.tokens, **heads, "b": itemsize}, 1, "attention")
                    )
            calls += _quantized(model, calls) + _trained(model, regime, config, itemsize)
            for call in calls:
                key = (call.op, repr(call.dims))
                if call.op != "embedding" and key not in seen:
                    seen.add(key)
                    cases.append(Case(model, regime, call, config))
    return cases


def _quantized(model: str, calls: Sequence[costs.Call]) -> list[costs.Call]:
    """The first layer of the MLP and the output projection in the formats of `QUANTIZED`."""
    linear = [call for call in calls if call.op == "linear"]
    chosen = [next(c for c in linear if c.where == "mlp"), *(c for c in linear if c.where == "head")]
    found = []
    for call in chosen:
        dims = {name: value for name, value in call.dims.items() if name != "wb"}
        for format in QUANTIZED.get(model, ()):
            found.append(costs.Call("quantized_linear", {**dims, "format": format}, call.count, call.where))
    return found


def _trained(model: str, regime: Regime, config: Any, itemsize: int) -> list[costs.Call]:
    """The loss of a training step, without and with its gradients."""
    if model not in TRAINED or regime.decoding:
        return []
    # More rows than channels: an implementation in chunks has more than one.
    dims = {"T": 2 * regime.tokens, "C": config.hidden_size, "V": config.vocab_size, "b": itemsize}
    return [
        costs.Call("linear_cross_entropy", {**dims, "wb": itemsize, "backward": backward}, 1, "loss")
        for backward in (False, True)
    ]
