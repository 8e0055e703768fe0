"""The first module of a sentence encoder: tokenizer and Transformer, and the maximum length of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..families import ENCODER_DECODERS, family_of
from ..files import MOST_CONFIG, FileError, has_file, open_checkpoint, read_json, resolve, saving
from ..model import AutoModel, PreTrainedModel
from ..text import AutoTokenizer, Tokenizer
from .batching import Tokens, tokenise, window
from .modules import check_known, write_json

_CONFIGS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")


MOST_TOKENS = 2**31 - 1


class Transformer(nn.Module):
    """A Transformer with its tokenizer.

    Args:
        model: a model, or the name or folder of one.
        tokenizer: None: load the tokenizer of `model`.
        max_seq_length: longer texts are cut; None: the tokenizer's limit. Never more than the model's
            positions.
        do_lower_case: lower-case the texts, even if the tokenizer does not.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        tokenizer: Tokenizer | None = None,
        max_seq_length: int | None = None,
        do_lower_case: bool = False,
    ) -> None:
        super().__init__()
        self.model: PreTrainedModel = (
            model if isinstance(model, PreTrainedModel) else _class(model).from_pretrained(model)
        )
        self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(self.model.name_or_path)
        self.do_lower_case = do_lower_case
        if do_lower_case:
            _lower_case(self.tokenizer)
        if max_seq_length is not None:
            self.tokenizer.model_max_length = int(max_seq_length)

    @classmethod
    def load(
        cls,
        path: Path,
        place: str,
        device: str | int | torch.device,
        model_options: dict[str, Any],
        tokenizer_options: dict[str, Any],
    ) -> Transformer:
        """Read the module in the folder `place` of the model's folder (or the GGUF file) `path`."""
        folder = path / place if place else path
        files = [folder / f"sentence_{name}_config.json" for name in _CONFIGS]
        file = next((file for file in files if has_file(file)), None)
        config = read_json(file, limit=MOST_CONFIG) if file is not None else {}
        longest, lower = config.pop("max_seq_length", None), bool(config.pop("do_lower_case", False))
        if file is not None:
            if longest is not None and (type(longest) is not int or not 1 <= longest <= MOST_TOKENS):
                raise FileError(f"{file}: max_seq_length must be a number from 1, and is {longest!r:.60}")
            _check(file, config)
        with open_checkpoint(folder) as checkpoint:
            pooler = any("pooler." in name for name in checkpoint.tensors)
        # Keep a pooler of the checkpoint, so that saving loses nothing, but not a random one.
        options = {"device": device, "add_pooling_layer": pooler, **model_options}
        model = _class(folder).from_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **tokenizer_options)
        return cls(model, tokenizer, tokenizer_options.get("model_max_length") or longest, lower)

    @property
    def auto_model(self) -> PreTrainedModel:
        """The model, under sentence-transformers' name."""
        return self.model

    @property
    def max_seq_length(self) -> int:
        """Maximum tokens of a text, including special tokens. Can be set; None: no limit of its own."""
        return window(self.model, self.tokenizer)

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        limit = self.model.spec.max_positions
        value = limit if value is None else value
        if (
            not isinstance(value, int)
            or value < 1
            or (value > limit and self.model.spec.positions == "learned")
        ):
            raise ValueError(f"max_seq_length must be at least 1 and at most {limit}, and is {value!r}")
        self.tokenizer.model_max_length = value

    def get_embedding_dimension(self) -> int:
        """C."""
        return self.model.spec.hidden_size

    get_word_embedding_dimension = get_embedding_dimension

    def tokenise(self, texts: list[str]) -> tuple[list[Tokens], int]:
        """The tokens of each text, cut to `max_seq_length`, and how many texts were cut."""
        return tokenise(self.tokenizer, texts, None, self.max_seq_length)

    def prompt_lengths(self, texts: list[str], prompt: str) -> list[int]:
        """Number of tokens at the start of each text (which starts with `prompt`) that belong only to the
        prompt, with special tokens before it. A token with characters of both counts as part of the text."""
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_seq_length, verbose=False)
        found = []
        for row in encoded.encodings or []:
            length = 0
            for index, (sequence, (_, end)) in enumerate(zip(row.sequence_ids, row.offsets, strict=True)):
                if sequence is None:  # special
                    continue
                if end > len(prompt):
                    break
                length = index + 1
            found.append(length)
        return found

    def save(self, folder: Path) -> None:
        """Write model, tokenizer and sentence_bert_config.json."""
        config = {"max_seq_length": self.max_seq_length, "do_lower_case": self.do_lower_case}
        with saving(folder, replaces=[f"sentence_{name}_config.json" for name in _CONFIGS]) as new:
            self.model.save_pretrained(new)
            self.tokenizer.save_pretrained(new)
            write_json(new / "sentence_bert_config.json", config)


def _class(path: Any) -> type[PreTrainedModel]:
    """The class that embeds texts: of T5 the encoder alone, as in sentence-transformers."""
    file = resolve(path, files="config") / "config.json"
    model_type = read_json(file, limit=MOST_CONFIG).get("model_type") if has_file(file) else None
    if not isinstance(model_type, str) or model_type not in ENCODER_DECODERS:
        return AutoModel  # which says what is wrong with another kind of name
    if "encoder" not in family_of(model_type).heads:
        return AutoModel
    from ..seq2seq import class_of

    return class_of("encoder", model_type)


def _check(file: Path, config: dict[str, Any]) -> None:
    """Refuse settings of newer files for other kinds of input than text."""
    modalities = config.pop("modality_config", None) or {}
    if not isinstance(modalities, dict) or not isinstance(modalities.get("text", {}), dict):
        raise FileError(f"{file}: modality_config must be a mapping, and is {modalities!r:.60}")
    if "message" in modalities:
        check_known(file, "a Transformer", {"texts written as chat messages (modality_config)": True})
    text = modalities.get("text", {})
    if text and (text.get("method"), text.get("method_output_name")) != ("forward", "last_hidden_state"):
        check_known(file, "a Transformer", {f"modality_config {text}": True})
    if config.pop("transformer_task", "feature-extraction") != "feature-extraction":
        check_known(file, "a Transformer", {"another transformer_task than feature-extraction": True})
    for name in ("module_output_name", "unpad_inputs", "model_args", "model_kwargs", "tokenizer_args"):
        config.pop(name, None)
    check_known(file, "a Transformer", {name: value for name, value in config.items() if value != {}})


def _lower_case(tokenizer: Tokenizer) -> None:
    """Make the tokenizer lower-case texts first, unless it already does."""
    from tokenizers import normalizers

    backend = tokenizer.backend_tokenizer
    steps = json.loads(backend.to_str())["normalizer"]
    steps = steps["normalizers"] if steps and steps["type"] == "Sequence" else [steps] if steps else []
    if not any(step["type"] == "Lowercase" or step.get("lowercase") for step in steps):
        first = normalizers.Lowercase()
        backend.normalizer = normalizers.Sequence([first, backend.normalizer]) if steps else first
