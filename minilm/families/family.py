"""`Family`, the description of a model family: its config.json options, weight names and heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from ..config import NORM_EPS, ROPE_RANGES, ConfigError, ModelConfig, check_number
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
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "norm_eps"), NORM_EPS),
    "rope_theta": ROPE_RANGES["theta"],
    **dict.fromkeys(("initializer_range", "init_std"), (0, 1e6)),
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

    pool: str = "first"
    """first, last or mean; or the option that says it (`cls` is first)."""
    hidden: str | None = None
    """The dense layer before the logits: the body's pooler ("pooler"), or a layer in the head with this
    activation, or with that of the option of this name."""
    drop_input: bool | str = False
    """Apply dropout also before that layer (RoBERTa, ELECTRA); or the option with its own rate (DeBERTa)."""
    bias: bool = True
    norm: bool = False
    """A norm after that layer; heads for tokens have both, too (ModernBERT)."""


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
    base_pooler: bool = True
    """The bare model has the pooler too, unless told otherwise."""
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

    variant: Callable[[Family, Options], Family] | None = None
    """Gives the family with other weight names, where an option changes them (DeBERTa's legacy)."""

    def of(self, hf: Options) -> Family:
        """The family for these options."""
        return self if self.variant is None else self.variant(self, hf)

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
            spec = self.translate(hf)
        except ConfigError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise ConfigError(f"{self.model_type}: the configuration cannot be read: {error}") from error
        if hf.get("is_causal") is not False:
            return spec
        ahead = tuple(w and w + spec.causal for w in spec.windows)  # on both sides, their ends included
        return replace(spec, causal=False, windows=ahead)

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
