"""Reconstructs config.json from the metadata of a GGUF file.

Most of it is a mapping of names. Rope scaling is not: `linear` and `yarn` are in the metadata, but for Llama
3 the file has a tensor with the D/2 divisors of the frequencies, and the four parameters have to be computed
from it (`_llama3_scaling`).

llama.cpp has many more options than these families. An unknown option in the file is an error that names it,
unless its value has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .reading import WeightError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
GEMMAS = ("gemma", "gemma2", "gemma3")

Array = np.ndarray[Any, np.dtype[Any]]
Shapes = Mapping[str, tuple[int, ...]]

# Keys under the architecture's name that are read below, or that do not affect the model.
_KNOWN = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count", "rope.freq_base",
    "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "tensor_data_layout", "pooling_type",
}  # fmt: skip
_KNOWN_TO: dict[str, set[str]] = {
    "gemma2": {"attn_logit_softcapping", "final_logit_softcapping"},
    "gemma3": {"final_logit_softcapping", "attention.sliding_window_pattern", "rope.freq_base_swa"},
}
"""The same for one architecture."""
_WIDE_HEADS = {("gemma2", 46), ("gemma3", 62)}
"""Architecture and layers of the models of 27B, whose scores llama.cpp divides by sqrt(C / H), and not by
sqrt(D)."""
_CONTROL = 3  # of tokenizer.ggml.token_type
_ORIGINAL = 8192  # positions that Llama 3 was trained on before its context was extended
_WITHOUT_EFFECT: dict[str, Any] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "use_parallel_residual": False,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}


class _Options:
    """The metadata of one architecture, with types and ranges checked."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], architecture: str) -> None:
        self.path = path
        self.metadata = metadata
        self.prefix = architecture + "."

    def fail(self, what: str) -> WeightError:
        return WeightError(f"{self.path}: {what}")

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer; also a list of equal integers, one per layer."""
        value = self.metadata.get(self.prefix + key, default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if value is None:
            raise self.fail(f"metadata {self.prefix}{key} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.fail(
                f"metadata {self.prefix}{key}: expected a whole number from {least} on, got {value!r}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, not negative; float32 values are rounded: 1e-5, not 9.99999974e-06."""
        value = self.metadata.get(self.prefix + key, default)
        if value is None:
            raise self.fail(f"metadata {self.prefix}{key} is missing")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise self.fail(f"metadata {self.prefix}{key}: expected a positive number, got {value!r}")
        return _shortest(value)

    def has(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def token(self, name: str, vocabulary: int) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None:
            return default_token(self.metadata, name)
        if not (type(value) is int and 0 <= value < vocabulary):
            raise self.fail(
                f"metadata tokenizer.ggml.{name}_token_id: got {_brief(value)}, expected a number "
                f"below {vocabulary}, the rows of token_embd.weight"
            )
        return value

    def check_vocabulary(self, rows: int) -> None:
        """Raise WeightError unless there are as many tokens as embeddings, as llama.cpp requires."""
        for key in ("tokens", "token_type", "scores"):
            listed = self.metadata.get(f"tokenizer.ggml.{key}")
            if listed is not None and (not isinstance(listed, list) or len(listed) != rows):
                count = len(listed) if isinstance(listed, list) else _brief(listed)
                raise self.fail(f"token_embd.weight has {rows} rows, and tokenizer.ggml.{key} {count}")
        if self.has("vocab_size") and self.integer("vocab_size") != rows:
            raise self.fail(
                f"token_embd.weight has {rows} rows, and metadata {self.prefix}vocab_size is "
                f"{self.integer('vocab_size')}"
            )

    def check_all_known(self) -> None:
        for key, value in self.metadata.items():
            option = key.removeprefix(self.prefix)
            if option == key or option in _KNOWN or option in _KNOWN_TO.get(self.prefix[:-1], ()):
                continue
            if option not in _WITHOUT_EFFECT:
                raise self.fail(f"metadata {key} = {_brief(value)} is not supported")
            if value != _WITHOUT_EFFECT[option]:
                only = _WITHOUT_EFFECT[option]
                raise self.fail(f"metadata {key} = {_brief(value)} is not supported, only {only!r}")


def default_token(metadata: Mapping[str, Any], name: str) -> int | None:
    """The id of the special token `name` ("bos", "eos") if the file does not have it: llama.cpp's default,
    for sentencepiece vocabularies in which the token with that id is special."""
    index = {"bos": 1, "eos": 2}.get(name)
    kinds = metadata.get("tokenizer.ggml.token_type")
    if index is None or metadata.get("tokenizer.ggml.model") != "llama" or not isinstance(kinds, list):
        return None
    return index if len(kinds) > index and kinds[index] == _CONTROL else None


def _shortest(value: float) -> float:
    return float(str(np.float32(value))) if value < 3e38 else float(value)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else text[:37] + "..."


def head_counts(path: Path, metadata: Mapping[str, Any], architecture: str) -> tuple[int, int]:
    """The numbers of query heads and of key-value heads."""
    options = _Options(path, metadata, architecture)
    heads = options.integer("attention.head_count")
    return heads, options.integer("attention.head_count_kv", heads)


def config_from_metadata(
    path: Path, metadata: Mapping[str, Any], architecture: str, shapes: Shapes, rope_factors: Array | None
) -> dict[str, Any]:
    """See `GGUFCheckpoint.hf_config`. `shapes` are those of the tensors, under transformers' names;
    `rope_factors` [D/2] are the values of `rope_freqs.weight`."""
    options = _Options(path, metadata, architecture)
    options.check_all_known()
    heads, kv_heads = head_counts(path, metadata, architecture)
    embeddings = shapes.get("model.embed_tokens.weight", ())
    hidden = options.integer("embedding_length")
    if len(embeddings) != 2 or embeddings[1] != hidden:
        raise options.fail(f"token_embd.weight has shape {list(embeddings)}, expected [vocabulary, {hidden}]")
    options.check_vocabulary(embeddings[0])
    layers = options.integer("block_count")
    numbers = {int(name.split(".")[2]) for name in shapes if name.startswith("model.layers.")}
    if len(numbers) != layers or max(numbers, default=-1) != layers - 1:
        raise options.fail(
            f"metadata {options.prefix}block_count is {layers}, but there are {len(numbers)} layers"
        )
    head_dim = _head_dim(options, hidden, heads)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": embeddings[0],
        "hidden_size": hidden,
        "intermediate_size": options.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": options.integer("context_length"),
        "rms_norm_eps": options.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": options.number("rope.freq_base", 0.0) or 10000.0,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
    }
    config["rope_scaling"] = _rope_scaling(options, head_dim, config["rope_theta"], rope_factors)
    if architecture != "qwen2":  # qwen2 always has biases on query, key and value
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in shapes
    if architecture == "llama":
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in shapes
    if architecture in GEMMAS:
        return config | _gemma(options, config) | _token_ids(options, embeddings[0])
    if options.has("attention.sliding_window"):
        if architecture != "llama":
            raise options.fail(f"metadata {options.prefix}attention.sliding_window is not supported")
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        config["sliding_window"] = options.integer("attention.sliding_window")
    return config | _token_ids(options, embeddings[0])


def _gemma(options: _Options, known: dict[str, Any]) -> dict[str, Any]:
    """What Gemma's files say besides, and what llama.cpp knows without being told."""
    architecture = options.prefix[:-1]
    own: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh"}
    if architecture == "gemma":
        return own
    own = {
        "hidden_activation": own["hidden_act"],
        "sliding_window": options.integer("attention.sliding_window"),
    }
    wide = (architecture, known["num_hidden_layers"]) in _WIDE_HEADS
    own["query_pre_attn_scalar"] = (
        known["hidden_size"] // known["num_attention_heads"] if wide else known["head_dim"]
    )
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        own[key] = options.number(key) if options.has(key) else None
    if architecture == "gemma3":
        own |= {
            "model_type": "gemma3_text",
            "sliding_window_pattern": options.integer("attention.sliding_window_pattern", 6),
            "rope_theta": options.number("rope.freq_base", 0.0) or 1e6,
            "rope_local_base_freq": options.number("rope.freq_base_swa", 0.0) or 10000.0,
        }
    else:
        own = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} | {
            key: value for key, value in own.items() if value is not None
        }
    return own


def _head_dim(options: _Options, hidden: int, heads: int) -> int:
    head_dim = options.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if options.integer(key, head_dim) != head_dim:
            value = options.integer(key)
            raise options.fail(f"metadata {options.prefix}{key} = {value} is not supported, only {head_dim}")
    if head_dim % 2:
        raise options.fail(f"heads of {head_dim} channels, an odd number, cannot have rotary embeddings")
    return head_dim


def _token_ids(options: _Options, vocabulary: int) -> dict[str, Any]:
    """bos, eos and pad; eos is a list if a chat model ends its turns with another token."""
    ends = [token for name in ("eos", "eot", "eom") if (token := options.token(name, vocabulary)) is not None]
    ends = list(dict.fromkeys(ends))
    return {
        "bos_token_id": options.token("bos", vocabulary),
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
        "pad_token_id": options.token("padding", vocabulary),
    }


def _rope_scaling(
    options: _Options, head_dim: int, theta: float, factors: Array | None
) -> dict[str, Any] | None:
    kind = options.metadata.get(options.prefix + "rope.scaling.type", "linear")
    # llama.cpp treats 0 as "not given"; rope.scale_linear is the older name of the key
    factor = options.number("rope.scaling.factor", options.number("rope.scale_linear", 0.0)) or 1.0
    original = options.integer("rope.scaling.original_context_length", options.integer("context_length"))
    if kind not in ("none", "linear", "yarn"):
        raise options.fail(f"metadata {options.prefix}rope.scaling.type = {_brief(kind)} is not supported")
    if factors is not None:
        if kind == "yarn" or (kind == "linear" and factor != 1):
            raise options.fail(f"both {options.prefix}rope.scaling.type = {kind!r} and rope_freqs.weight")
        return _llama3_scaling(options, head_dim, theta, factors)
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for key in ("beta_fast", "beta_slow"):
            if options.has("rope.scaling.yarn_" + key):
                scaling[key] = options.number("rope.scaling.yarn_" + key)
        return scaling
    return {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else None


def _turns(head_dim: int, theta: float, positions: int) -> Array:
    """Number of full rotations of each of the D/2 rotary channels within `positions`, float64."""
    return np.asarray(positions * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi))


def llama3_divisors(turns: Array, factor: float, low: float, high: float) -> Array:
    """The divisors of Llama 3's frequencies, for channels with `turns` rotations within the original length.

    Channels with `high` rotations or more are kept, those with `low` or fewer are divided by `factor`, and
    those between are interpolated.
    """
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))


def _llama3_scaling(options: _Options, head_dim: int, theta: float, factors: Array) -> dict[str, Any] | None:
    """The parameters of Llama 3's rope scaling, from the divisors [D/2] of the frequencies."""
    divisors = np.asarray(factors, np.float64)
    if divisors.shape != (head_dim // 2,) or not np.isfinite(divisors).all() or divisors.min() <= 0:
        raise options.fail(
            f"rope_freqs.weight: expected {head_dim // 2} positive numbers, got {_brief(factors)}"
        )
    if divisors.min() == divisors.max():
        return {"rope_type": "linear", "factor": _shortest(divisors[0])} if divisors[0] != 1 else None
    with np.errstate(all="ignore"):
        found = _fit(divisors, _turns(head_dim, theta, _ORIGINAL))
    if found is None:
        raise options.fail(
            "rope_freqs.weight: these are not divisors of Llama 3's rope scaling, the only one supported"
        )
    factor, low, high = found
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": _ORIGINAL,
    }


def _fit(divisors: Array, turns: Array) -> tuple[float, float, float] | None:
    """(factor, low, high) that give the divisors, or None.

    `factor` is the largest divisor. The interpolated channels determine the rest, since there 1/divisor is
    linear in the number of rotations. The file does not have the original length, but any choice works, as
    low and high scale with it. With Llama 3's own length its values 1 and 4 result, which are tried first.
    """
    factor = _shortest(divisors.max())
    candidates = [(1.0, 4.0)]
    smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    if between.sum() >= 2:
        slope, offset = np.polyfit(turns[between], smooth[between], 1)
        candidates.append((float(-offset / slope), float((1 - offset) / slope)))
    for low, high in candidates:
        if 0 < low < high and np.allclose(
            llama3_divisors(turns, factor, low, high), divisors, rtol=1e-4, atol=0
        ):
            return factor, low, high
    return None
