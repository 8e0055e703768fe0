"""`EncoderDecoderFamily`: what a family of encoder-decoders (T5, BART, Marian) adds to `Family`.

Its configuration is a pair of `ModelConfig`, one a side, and the few options that concern both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..config import LARGEST, ConfigError, ModelConfig, check_number
from ..weights import Rule, ignore
from .family import Family, Head, Options


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Configuration of one encoder-decoder."""

    encoder: ModelConfig
    decoder: ModelConfig
    buckets: int = 0
    """Buckets of the relative position bias (T5, arXiv:1910.10683); 0: there is none, positions are
    learned or, with `sinusoids`, given."""
    max_distance: int = 128
    """Larger distances share the last bucket."""
    bias_per_layer: bool = False
    """Each layer has its own table of biases (umT5); False: the layers of a side share one."""
    sinusoids: bool = False
    """Positions are sines and cosines (Vaswani et al. 2017, arXiv:1706.03762), first all sines (Marian)."""
    embedding_scale: float = 1.0
    logits_scale: float = 1.0
    """The decoder's last hidden states are multiplied by it before the output matrix."""
    final_bias: bool = False
    """The logits have a bias that is not trained (BART's final_logits_bias)."""
    reads_source: bool = False
    """Without input of its own, the decoder reads the source, shifted to the right (BART)."""
    wraps: bool = False
    """A text that is shifted to the right begins with its last token, that of its language (mBART); False:
    with decoder_start_token_id."""
    inner_dropout: float = 0.0
    """Dropout between the two matrices of the MLP."""
    last_dropout: float = 0.0
    """Dropout after the final norm."""

    def __post_init__(self) -> None:
        check_number("inner dropout", self.inner_dropout, 0, 1)
        if self.buckets and (self.buckets < 4 or self.max_distance <= self.buckets // 2):
            raise ConfigError(
                "relative_attention_num_buckets must be at least 4 and relative_attention_max_distance more "
                f"than half of it, and they are {self.buckets} and {self.max_distance}"
            )


@dataclass(frozen=True)
class EncoderDecoderFamily(Family):
    """One family of encoder-decoders. `body` has the rules of both sides."""

    sides: Callable[[Options], EncoderDecoderConfig] | None = None

    def both(self, hf: Options) -> EncoderDecoderConfig:
        """The configuration of both sides, after the checks of `config`."""
        self.config(hf)
        assert self.sides is not None
        return self.sides(hf)

    def rules(self, head: Head) -> tuple[Rule, ...]:
        """As for any family; an encoder alone skips the decoder's weights."""
        rules = super().rules(head)
        if head != "encoder":
            return rules
        kept = tuple(rule for rule in rules if not rule.target.startswith("body.decoder."))
        skipped = {name for rule in rules if rule not in kept for name in rule.sources}
        reason = "belongs to the decoder, and this model is an encoder"
        return (*kept, *(ignore(name, reason) for name in sorted(skipped)))

    def class_name(self, head: Head) -> str:
        """transformers' name of the class with this head."""
        usual: Mapping[Head, str] = {
            "base": "Model",
            "encoder": "EncoderModel",
            "seq2seq-lm": "ForConditionalGeneration",
            "sequence-classification": "ForSequenceClassification",
        }
        return self.class_names.get(head, self.class_prefix + usual[head])


def size(hf: Options, name: str, most: int = LARGEST) -> int:
    """A size from config.json; ConfigError unless it is a whole number from 1 to `most`."""
    value = hf.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ConfigError(f"{hf.model_type}: {name} must be from 1 to {most}, and is {value!r}")
    return value


def as_decoder(encoder: ModelConfig, **changes: int) -> ModelConfig:
    """The same sizes for the decoder, except `changes`."""
    return replace(encoder, causal=True, **changes)  # type: ignore[arg-type]
