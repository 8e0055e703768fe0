"""`GenerationConfig`: a checkpoint's defaults for generation, as in generation_config.json.

An option that is None is not set. Arguments of `generate` take precedence over `model.generation_config`, and
that over `DEFAULTS`.
"""

from __future__ import annotations

import copy
import json
import os
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..config import ConfigError

if TYPE_CHECKING:
    from ..families import PretrainedConfig

DEFAULTS: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "use_cache": True,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "num_beams": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "output_scores": False,
    "output_logits": False,
    "return_dict_in_generate": False,
}
"""Defaults of `generate` for options that are not set; the same as transformers'."""

RULES = (
    "sequence_bias",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
)
"""Options for `minilm.generation.processors`."""

WITHOUT_DEFAULT = (
    "max_new_tokens",
    "min_new_tokens",
    "min_p",
    "stop_strings",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "max_time",
    "prefill_chunk_size",
    "seed",
    "typical_p",
    "top_h",
    "epsilon_cutoff",
    "eta_cutoff",
    "renormalize_logits",
    *RULES,
)
OPTIONS = (*DEFAULTS, *WITHOUT_DEFAULT)
"""The options that minilm supports."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "use_mtp": (False,),
    "speculation_type": (),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "guidance_scale": (1, 1.0),
    "token_healing": (False,),
    "watermarking_config": (),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}
"""Options of transformers that minilm does not support -> the values (besides None) that have no effect."""

_LEFT = "transformers 5 has moved it out of generate too"
_SPEED = "it changes the speed and not the text, so leave it out"
WAYS: dict[str, str] = {
    "num_beam_groups": f"{_LEFT}; num_beams without groups works",
    "diversity_penalty": f"it is for groups of beams, and {_LEFT}; num_beams without groups works",
    "constraints": f"{_LEFT}; prefix_allowed_tokens_fn restricts the tokens of beams",
    "force_words_ids": f"{_LEFT}; prefix_allowed_tokens_fn restricts the tokens of beams",
    "penalty_alpha": f"{_LEFT}; no_repeat_ngram_size and repetition_penalty work",
    "dola_layers": f"{_LEFT}; a logits_processor can do it",
    "prompt_lookup_num_tokens": _SPEED,
    "assistant_model": _SPEED,
    "assistant_early_exit": _SPEED,
    "speculation_type": _SPEED,
    "use_mtp": _SPEED,
    "guidance_scale": "a logits_processor that calls the model on the negative prompt does the same",
    "token_healing": "leave out the last token of the prompt, and restrict the first new one by "
    "prefix_allowed_tokens_fn",
    "watermarking_config": "a logits_processor, of transformers for example, does it",
    "output_attentions": "call the model on the result, with output_attentions=True",
    "output_hidden_states": "call the model on the result, with output_hidden_states=True",
    "inputs_embeds": "give input_ids",
    "position_ids": "give an attention_mask, from which they follow",
    "custom_generate": "call that function yourself",
}
"""Options that minilm does not support -> the way round."""


def unsupported(name: str, value: Any, where: str = "") -> ValueError:
    """The error for an option that minilm does not support."""
    way = f": {WAYS[name]}" if name in WAYS else ""
    return ValueError(f"generate does not support {name}={value!r:.80}{where}{way}")


WITHOUT_EFFECT = frozenset(
    {
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "low_memory",
        "compile_config",
        "disable_compile",
        "decoder_start_token_id",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "max_matching_ngram_size",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "transformers_version",
        "minilm_version",
        "_from_model_config",
        "_commit_hash",
    }
)
"""Options that only affect unsupported features, or internals of transformers."""


class GenerationConfig:
    """Options of `generate`, under transformers' names. Options that are not set are None."""

    def __init__(self, **options: Any) -> None:
        for name in OPTIONS:
            setattr(self, name, None)
        for name, value in options.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name in UNSUPPORTED or name in WITHOUT_EFFECT:
            return None
        raise AttributeError(f"the generation configuration has no option {name!r}")

    @classmethod
    def from_model_config(cls, config: PretrainedConfig) -> GenerationConfig:
        """Create from the generation options in a model configuration (special tokens; old ones have
        more)."""
        known = {*OPTIONS, *UNSUPPORTED} - {"use_cache"}
        return cls(
            **{name: value for name, value in config.to_dict().items() if name in known and value is not None}
        )

    @classmethod
    def from_checkpoint(cls, stored: dict[str, Any], config: PretrainedConfig) -> GenerationConfig:
        """Create from the contents of a generation_config.json; if there is none ({}), from the model's
        configuration."""
        if not isinstance(stored, dict):
            raise ConfigError(
                f"generation_config.json must hold an object, and holds {type(stored).__name__}"
            )
        if not stored:
            return cls.from_model_config(config)
        return cls(**{str(name): value for name, value in stored.items() if name not in WITHOUT_EFFECT})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | os.PathLike[str], **overrides: Any
    ) -> GenerationConfig:
        """Load generation_config.json from a folder or a name on the hub, with overrides."""
        from ..files import MOST_CONFIG, has_file, read_json, resolve
        from ..model import HUB_OPTIONS

        hub = {name: overrides.pop(name) for name in HUB_OPTIONS if name in overrides}
        folder = resolve(pretrained_model_name, files="config", **hub)
        file = folder / "generation_config.json"
        if not has_file(file, error=ConfigError):
            raise ConfigError(f"{folder} has no generation_config.json")
        return cls(**{**read_json(file, limit=MOST_CONFIG, error=ConfigError), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """The options that are set."""
        return {name: copy.deepcopy(value) for name, value in vars(self).items() if value is not None}

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **options: Any
    ) -> dict[str, Any]:
        """Set the options that are options of generation; returns the others. `defaults_only`: leave
        those that are set. (`allow_custom_entries` is transformers': others are returned all the same.)"""
        unused = {}
        for name, value in options.items():
            if defaults_only and (value is None or getattr(self, name, None) is not None):
                continue
            if name in vars(self) or name in UNSUPPORTED or name in WITHOUT_EFFECT:
                setattr(self, name, value)
            else:
                unused[name] = value
        return unused

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        """For transformers' Seq2SeqTrainer, which pads texts to the `max_length` that it sets."""
        return {"max_length": 20}

    def to_json_string(self) -> str:
        """The contents of generation_config.json as text."""
        held = {**self.to_dict(), "minilm_version": __version__}
        return json.dumps(held, indent=2, sort_keys=True, default=_plain) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write generation_config.json into a folder, which is created if necessary."""
        from ..files import saving

        with saving(save_directory) as folder:
            (folder / "generation_config.json").write_text(self.to_json_string(), encoding="utf-8")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"GenerationConfig {self.to_json_string()}"


def _plain(value: Any) -> Any:
    """Convert arrays, tensors and sets of token ids to JSON types."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"generation_config.json cannot hold {value!r:.80}")
