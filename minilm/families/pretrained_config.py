"""`PretrainedConfig`: a checkpoint's config.json, under its family's own names, as in transformers.

    config = AutoConfig.from_pretrained("bert-base-uncased"); config.hidden_size, config.id2label,
    config.num_labels = 3

It is a mutable set of options with the family's defaults. The model reads `ModelConfig`, into which the
family translates it.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from typing import Any, ClassVar

from .._version import __version__
from ..config import ConfigError
from ..files import saving

COMMON: dict[str, Any] = {
    "_commit_hash": None,
    "architectures": None,
    "dtype": None,
    "finetuning_task": None,
    "id2label": None,
    "is_causal": None,
    "label2id": None,
    "output_attentions": False,
    "output_hidden_states": False,
    "problem_type": None,
    "return_dict": True,
    "use_cache": True,
}
"""Options that every family has, with their defaults."""

NO_EFFECT = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cls_token_id",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "directionality",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "emb_size",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "initializer_range",
        "is_encoder_decoder",
        "language",
        "length_penalty",
        "mask_token_id",
        "max_length",
        "min_length",
        "minilm_version",
        "model_max_length",
        "model_type",
        "n_ctx",
        "name_or_path",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_past",
        "output_scores",
        "pad_token_id",
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
        "pooler_type",
        "predict_special_tokens",
        "prefix",
        "pretraining_tp",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "sbert_ce_default_activation_function",
        "sentence_transformers",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_return_dict",
        "vocab_file",
    }
)
"""Keys in published config.json files that do not affect a forward pass of these families."""


MOST_LABELS = 10_000_000


class PretrainedConfig:
    """Options of a checkpoint. Unknown attributes raise AttributeError; known ones have the family's default.

    Class aliases such as ``BertConfig`` are this class with `model_type` set:
    ``BertConfig(hidden_size=384)``.
    """

    model_type: str = ""
    reader: ClassVar[Any] = None
    """What finds and reads a config.json: `minilm.model` gives it."""

    def __init__(self, **options: Any) -> None:
        from .table import family_of

        model_type = options.pop("model_type", None) or type(self).model_type
        family = family_of(model_type)
        values: dict[str, Any] = {**copy.deepcopy(COMMON), **copy.deepcopy(dict(family.defaults))}
        object.__setattr__(self, "_family", family)
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "model_type", family.model_type)
        num_labels = options.pop("num_labels", None)
        for key, value in options.items():
            setattr(self, key, value)
        if num_labels is not None:
            self.num_labels = num_labels

    # Options
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_values", "_family"):
            raise AttributeError(name)
        key = self._family.attribute_map.get(name, name)
        if key in self._values:
            return self._values[key]
        raise AttributeError(f"the {self.model_type} configuration has no option {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
            return
        if name == "torch_dtype":
            name = "dtype"
        if name == "dtype" and value is not None:
            value = str(value).removeprefix("torch.")
        self._values[self._family.attribute_map.get(name, name)] = value

    @staticmethod
    def _labels(value: Any) -> dict[int, str]:
        try:
            return {int(key): label for key, label in value.items()}
        except (AttributeError, TypeError, ValueError):
            raise ConfigError(f"id2label must be a mapping of numbers to names, and is {value!r}") from None

    def get(self, name: str, default: Any = None) -> Any:
        """The option, or `default` when it is absent or None."""
        value = self._values.get(self._family.attribute_map.get(name, name))
        return default if value is None else value

    def update(self, options: dict[str, Any]) -> None:
        """Set several options."""
        for key, value in options.items():
            setattr(self, key, value)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._family.attribute_map.get(name, name) in self._values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PretrainedConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> PretrainedConfig:
        return PretrainedConfig.from_dict(self.to_dict())

    # Labels
    @property
    def num_labels(self) -> int:
        """Number of classes of a classification head: the size of `id2label`, 2 without one."""
        labels = self._values["id2label"]
        return 2 if labels is None else len(labels)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        if not isinstance(count, int) or not 1 <= count <= MOST_LABELS:
            raise ConfigError(f"num_labels must be a number from 1 to {MOST_LABELS}, and is {count!r}")
        if self._values["id2label"] is None or len(self._values["id2label"]) != count:
            self._values["id2label"] = {i: f"LABEL_{i}" for i in range(count)}
            self._values["label2id"] = {f"LABEL_{i}": i for i in range(count)}

    @property
    def id2label(self) -> dict[int, str]:
        """Class numbers to names."""
        labels: dict[int, str] | None = self._values["id2label"]
        return {i: f"LABEL_{i}" for i in range(2)} if labels is None else labels

    @id2label.setter
    def id2label(self, value: Any) -> None:
        self._values["id2label"] = None if value is None else self._labels(value)

    @property
    def label2id(self) -> dict[str, int]:
        """Class names to numbers."""
        labels: dict[str, int] | None = self._values["label2id"]
        return {name: i for i, name in self.id2label.items()} if labels is None else labels

    @label2id.setter
    def label2id(self, value: Any) -> None:
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"label2id must be a mapping of names to numbers, and is {value!r}")
        self._values["label2id"] = value

    # Files
    def to_dict(self) -> dict[str, Any]:
        """All options and the model type, as in config.json."""
        values = copy.deepcopy(self._values)
        if values["id2label"] is not None:
            values["id2label"] = {str(k): v for k, v in values["id2label"].items()}
        unset = {**COMMON, **{k: None for k, v in self._family.defaults.items() if v is None}}
        values = {k: v for k, v in values.items() if not (k in unset and v == unset[k])}
        return {"model_type": self.model_type, **values}

    def to_json_string(self) -> str:
        """The contents of config.json as text."""
        return json.dumps({**self.to_dict(), "minilm_version": __version__}, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write config.json into a folder, which is created if necessary."""
        with saving(save_directory) as folder:
            (folder / "config.json").write_text(self.to_json_string(), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> PretrainedConfig:
        """As ``AutoConfig.from_pretrained``; ``BertConfig`` refuses another family's (ConfigError)."""
        config: PretrainedConfig = cls.reader(pretrained_model_name_or_path, **options)
        if cls.model_type not in ("", config.model_type):
            raise ConfigError(
                f"{cls.__name__} is for {cls.model_type}, and {pretrained_model_name_or_path} is a "
                f"{config.model_type}"
            )
        return config

    @classmethod
    def from_dict(cls, options: dict[str, Any], **overrides: Any) -> PretrainedConfig:
        """Create from the contents of a config.json. One warning lists the keys that the family does not
        know."""
        from .table import family_of

        model_type = options.get("model_type") or cls.model_type
        if not model_type:
            raise ConfigError("the configuration has no model_type, so the family of the model is not known")
        family = family_of(model_type)
        known = {*COMMON, *family.defaults, *family.attribute_map, *NO_EFFECT, *family.rejected}
        known.add("quantization_config")  # redundant with the tensors; the family checks it
        unknown = sorted(k for k, v in options.items() if k not in known and v not in (None, False))
        if unknown:
            warnings.warn(
                f"the {model_type} configuration has keys that this family does not know and that have no "
                "effect: " + ", ".join(unknown),
                stacklevel=2,
            )
        config = PretrainedConfig(model_type=model_type)
        config.update(
            {k: v for k, v in options.items() if k not in ("model_type", "num_labels", "minilm_version")}
        )
        if "num_labels" in options and options.get("id2label") is None:
            config.num_labels = options["num_labels"]
        config.override(overrides)
        return config

    def override(self, options: dict[str, Any]) -> None:
        """Set several options, `num_labels` before `id2label`, which overrides it."""
        for name in ("num_labels", *options):
            if name in options:
                setattr(self, name, options[name])

    def __repr__(self) -> str:
        return f"PretrainedConfig {self.to_json_string()}"
