"""`Family`, the description of a model family: its config.json options, weight names and heads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ..config import LARGEST, NORM_EPS, ROPE_RANGES, ConfigError, ModelConfig, RopeConfig, check_number
from ..weights import Rule, ignore

Head = Literal[
    "base",
    "masked-lm",
    "next-sentence",
    "pre-training",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "causal-lm",
    "seq2seq-lm",
    "encoder",
]


MOST_LAYERS = 10_000

RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"), NORM_EPS),
    "rope_theta": ROPE_RANGES["theta"],
    "initializer_range": (0, 1e6),
}
"""Options of config.json, by the families' own names -> the smallest and the largest value. Dropout is from 0
to 1."""


class Options(Protocol):
    """The options of a config.json, read by attribute under the family's own names (`PretrainedConfig`)."""

    model_type: str

    def get(self, name: str, default: Any = None) -> Any: ...

    def __getattr__(self, name: str) -> Any: ...


@dataclass(frozen=True)
class SequenceHead:
    """How the head for sequence classification computes logits from one vector per sequence."""

    pool: Literal["first", "last"] = "first"
    hidden: Literal["pooler", "tanh", "relu", None] = None
    """The dense layer before the logits: the body's pooler, or a layer in the head with this activation."""
    drop_input: bool = False
    """Apply dropout also before that layer (RoBERTa)."""
    bias: bool = True


@dataclass(frozen=True)
class Family:
    """One model family. Weight rules are written without the prefix; `heads` has the rules of each kind of
    head."""

    model_type: str
    class_prefix: str
    """Prefix of transformers' class names: Bert, Roberta, GPT2, ..."""
    defaults: Mapping[str, Any]
    """Options of config.json that the family knows, with their default values."""
    translate: Callable[[Options], ModelConfig]
    prefixes: tuple[str, ...]
    """Prefixes of the body's weight names in a checkpoint of a model with a head; the first is written."""
    body: tuple[Rule, ...]
    heads: Mapping[Head, tuple[Rule, ...]]
    pooler: tuple[Rule, ...] = ()
    attribute_map: Mapping[str, str] = field(default_factory=dict)
    """Standard names of options -> the family's own."""
    rejected: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Options that exist in transformers -> the only values that minilm supports."""
    sequence_head: SequenceHead = SequenceHead()
    mlm_activation: str | None = None
    """Activation of the masked-LM head if it is not the body's."""
    mlm_norm_eps: float | None = None
    head_dropout: Mapping[Head, tuple[str | float, ...]] = field(default_factory=dict)
    """Dropout before a head: the first of these options that is set, or a number."""
    class_names: Mapping[Head, str] = field(default_factory=dict)
    """Class names in transformers that do not follow the usual pattern (GPT2LMHeadModel)."""
    head_prefixes: Mapping[Head, str] = field(default_factory=dict)
    """Heads whose checkpoints use another of `prefixes` for the body (Llama's question answering)."""

    def config(self, hf: Options) -> ModelConfig:
        """Translate the options. Raises ConfigError naming an option that is not supported."""
        for name, allowed in self.rejected.items():
            value = hf.get(name)
            if value is not None and value not in allowed:
                only = " or ".join(map(repr, allowed)) or "its absence"
                raise ConfigError(
                    f"{self.model_type}: {name}={value!r} is not supported; minilm supports only {only}"
                )
        _check_quantization(self.model_type, hf.get("quantization_config"))
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
            value = hf.get(name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"{self.model_type}: {name} must be a whole number, and is {value!r}")
        for name in self.defaults:
            limits = RANGES.get(
                name, (0, 1) if name.endswith(("dropout", "dropout_prob", "_pdrop")) else None
            )
            if limits is not None and hf.get(name) is not None:
                check_number(f"{self.model_type}: {name}", hf.get(name), *limits)
        if hf.num_hidden_layers > MOST_LAYERS:  # lists with one item per layer would fill the memory
            raise ConfigError(
                f"{self.model_type}: num_hidden_layers is {hf.num_hidden_layers}, and at most {MOST_LAYERS} "
                "are supported"
            )
        try:
            return self.translate(hf)
        except ConfigError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise ConfigError(f"{self.model_type}: the configuration cannot be read: {error}") from error

    def rules(self, head: Head) -> tuple[Rule, ...]:
        """All rules for a model with `head`: its own, and rules that skip the weights of other heads, with
        the reason."""
        own = (*self.body, *self.pooler, *self.heads.get(head, ()))
        names = {name for rule in own for name in (*rule.sources, *rule.also)}
        skipped: dict[str, Rule] = {}
        for other, rules in self.heads.items():
            for rule in rules:
                for name in (*rule.sources, *rule.also):
                    if name not in names and name not in skipped:
                        skipped[name] = ignore(name, f"belongs to a {other} head, and this model has none")
        return (*own, *skipped.values())

    def prefix(self, head: Head) -> str:
        """Prefix of the body's weight names in a checkpoint that is written for `head`."""
        return "" if head == "base" else self.head_prefixes.get(head, self.prefixes[0])

    def dropout(self, head: Head, hf: Options) -> float:
        """Dropout probability before `head`."""
        for source in self.head_dropout.get(head, ()):
            value = hf.get(source) if isinstance(source, str) else source
            if value is not None:
                check_number(f"{self.model_type}: {source}", value, 0, 1)
                return float(value)
        return 0.0

    def class_name(self, head: Head) -> str:
        """transformers' name of the class with this head, as in config.json's `architectures`."""
        usual = {
            "base": "Model",
            "masked-lm": "ForMaskedLM",
            "next-sentence": "ForNextSentencePrediction",
            "pre-training": "ForPreTraining",
            "sequence-classification": "ForSequenceClassification",
            "token-classification": "ForTokenClassification",
            "question-answering": "ForQuestionAnswering",
            "causal-lm": "ForCausalLM",
        }
        return self.class_names.get(head, self.class_prefix + usual[head])


def _check_quantization(model_type: str, given: Any) -> None:
    """Refuse checkpoints quantised by other libraries: their layouts and often their formulas differ."""
    if given is None:
        return
    method = given.get("quant_method") if isinstance(given, dict) else None
    if method == "minilm":
        return
    if method is None and isinstance(given, dict) and {"load_in_4bit", "load_in_8bit"} & given.keys():
        method = "bitsandbytes"
    what = f"quant_method {method!r}" if method is not None else repr(given)
    raise ConfigError(
        f"{model_type}: quantization_config says {what}, which minilm does not read; load the unquantised "
        "model with weights='q4' or 'int8', or a GGUF file"
    )


def equal_heads(hf: Options) -> int:
    """The head size hidden_size / num_attention_heads."""
    width, heads = hf.hidden_size, hf.num_attention_heads
    if heads < 1 or width % heads:
        raise ConfigError(
            f"{hf.model_type}: hidden_size {width} is not a multiple of num_attention_heads, which is {heads}"
        )
    return int(width // heads)


NOT_A_DECODER: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "position_embedding_type": ("absolute",),
    "pruned_heads": ({},),
}
"""Options of BERT-like checkpoints -> the only values that minilm supports."""

DECODER_ONLY: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({},),
}


def rope_config(hf: Options, default_theta: float = 10_000.0) -> RopeConfig:
    """Rope options, as transformers 5 writes them (`rope_parameters`) or transformers 4 did (`rope_theta`,
    `rope_scaling`)."""
    given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{hf.model_type}: rope_scaling must be a mapping of options, and is {given!r}")
    options: dict[str, Any] = dict(given)
    kind = options.get("rope_type", options.get("type", "default"))
    if any(isinstance(value, dict) for value in options.values()):
        raise ConfigError(
            f"{hf.model_type}: separate rope_parameters per layer type are not supported: {options}"
        )
    known = {
        "default": set(),
        "linear": {"factor"},
        "dynamic": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        "yarn": {
            *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
            "original_max_position_embeddings",
        },
    }
    if kind not in list(known):  # `kind` may be of any type, also unhashable
        raise ConfigError(
            f"{hf.model_type}: rope_type {kind!r} is not supported; supported are {', '.join(known)}"
        )
    check_number(f"{hf.model_type}: max_position_embeddings", hf.max_position_embeddings, 1, LARGEST)
    positions = int(hf.max_position_embeddings)
    factor: Any = options.get("factor")
    original = options.get("original_max_position_embeddings") or positions
    if kind in ("llama3", "yarn") and hf.get("original_max_position_embeddings"):
        original = hf.original_max_position_embeddings
    check_number(f"{hf.model_type}: original_max_position_embeddings", original, 1, LARGEST)
    if kind == "yarn" and factor is None:
        factor = positions / original
    if kind != "default" and (not isinstance(factor, (int, float)) or factor <= 0):
        raise ConfigError(f"{hf.model_type}: rope_type {kind!r} needs a positive factor, and has {factor!r}")
    if options.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{hf.model_type}: partial_rotary_factor={options['partial_rotary_factor']} is not supported, "
            "only 1.0"
        )
    surplus = set(options) - known[kind] - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind == "default":  # leftovers of an unscaled model have no effect in transformers either
        surplus -= {"factor", "original_max_position_embeddings"}
    if surplus:  # a warning, as in transformers: `attn_factor` next to yarn is common, for other software
        names = ", ".join(sorted(map(str, surplus)))
        warnings.warn(
            f"{hf.model_type}: rope_type {kind!r} does not know the options {names}, which have no effect",
            stacklevel=2,
        )
    theta = options.get("rope_theta", hf.get("rope_theta", default_theta))
    numbers = {"theta": theta, "factor": factor if kind != "default" else 1.0}
    for name in ("attention_factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
        if options.get(name) is not None:
            numbers[name] = options[name]
    for name, value in numbers.items():
        spelled = "rope_theta" if name == "theta" else f"{name} of rope_scaling"
        check_number(f"{hf.model_type}: {spelled}", value, *ROPE_RANGES[name])
    for name in ("mscale", "mscale_all_dim"):
        if options.get(name) is not None:
            check_number(f"{hf.model_type}: {name} of rope_scaling", options[name], 0, 1e3)
    return RopeConfig(
        theta=float(theta),
        type=kind,
        factor=float(factor) if kind != "default" else 1.0,
        max_positions=positions,
        original_max_positions=int(original),
        low_freq_factor=float(numbers.get("low_freq_factor", 1.0)),
        high_freq_factor=float(numbers.get("high_freq_factor", 4.0)),
        attention_factor=_yarn_attention_factor(options, float(factor)) if kind == "yarn" else 1.0,
        beta_fast=float(options.get("beta_fast") or 32),
        beta_slow=float(options.get("beta_slow") or 1),
        truncate=bool(options.get("truncate", True)),
    )


def _yarn_attention_factor(options: Mapping[str, Any], factor: float) -> float:
    from math import log

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * log(factor) + 1.0

    if options.get("attention_factor") is not None:
        return float(options["attention_factor"])
    if options.get("mscale") and options.get("mscale_all_dim"):
        return mscale(options["mscale"]) / mscale(options["mscale_all_dim"])
    return mscale(1.0)


def layer_windows(hf: Options, sliding_window: int | None) -> tuple[int | None, ...]:
    """The window of each layer, from `layer_types`, or else from `max_window_layers` (the first N layers have
    full attention)."""
    types = hf.get("layer_types")
    if types is None:
        first = hf.max_window_layers
        return tuple(sliding_window if i >= first else None for i in range(hf.num_hidden_layers))
    if not isinstance(types, list):
        raise ConfigError(f"{hf.model_type}: layer_types must be a list of names, and is {types!r}")
    unknown = [kind for kind in types if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise ConfigError(f"{hf.model_type}: layer_types {', '.join(map(str, unknown))} are not supported")
    if "sliding_attention" in types and sliding_window is None:
        raise ConfigError(
            f"{hf.model_type}: layer_types names sliding_attention, and there is no sliding_window"
        )
    return tuple(sliding_window if kind == "sliding_attention" else None for kind in types)
