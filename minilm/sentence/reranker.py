"""Scores of pairs by a causal language model, as Qwen3-Reranker's: the logit of "yes" less that of "no".

The model's chat template turns a pair into a prompt, with a message of the role `query` and one of the role
`document`; a model without a template reads the two texts one after another. The score is that of the token
which would come next. These are sentence-transformers' modules Transformer (with the task text-generation)
and LogitScore.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import MOST_CONFIG, FileError, has_file, read_json
from ..model import AutoModelForCausalLM
from ..text import Tokenizer
from .batching import Ran, Tokens, tokenise
from .modules import check_known, write_json

logger = logging.getLogger(__name__)

ROLES = ("query", "document")
PROBES = (("alpha", "bravo"), ("charlie", "bravo"), ("alpha", "foxtrot"))
"""A pair, and pairs that differ from it in the query and in the document."""


class Settings:
    """The contents of LogitScore's config.json and of sentence_bert_config.json."""

    def __init__(
        self,
        true_token_id: int,
        false_token_id: int | None = None,
        *,
        plain: bool = False,
        structured: bool | None = None,
        variables: dict[str, Any] | None = None,
        max_length: int | None = None,
    ) -> None:
        self.true_token_id, self.false_token_id = true_token_id, false_token_id
        self.plain = plain
        """Whether the texts are read one after another, in spite of a template."""
        self.structured = structured
        """Whether the contents of messages are lists of parts, for the template; None: try."""
        self.variables = variables or {}
        """Of the template."""
        self.max_length = max_length

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer, name: str) -> Settings:
        """Those of a model without such files: the tokens are "yes" and "no"."""
        yes, no = (tokenizer.backend_tokenizer.token_to_id(word) for word in ("yes", "no"))
        if yes is None or no is None:
            raise ValueError(
                f"{name} is a causal language model without modules.json, whose score is the logit of the "
                'token "yes" less that of "no", and its tokenizer has no such tokens: save the model with '
                "sentence-transformers and a LogitScore that names its tokens, or use a model for sequence "
                "classification"
            )
        return cls(yes, no)

    @classmethod
    def load(cls, transformer: Path, score: Path, vocab_size: int) -> Settings:
        """From the folders of the two modules. Raises FileError."""
        file = score / "config.json"
        config = read_json(file, limit=MOST_CONFIG)
        true, false = config.pop("true_token_id", None), config.pop("false_token_id", None)
        for name, value in (("true_token_id", true), ("false_token_id", false)):
            absent = name == "false_token_id" and value is None
            if not absent and (type(value) is not int or not 0 <= value < vocab_size):
                raise FileError(f"{file}: {name} must be from 0 to {vocab_size - 1}, and is {value!r:.60}")
        if config.pop("module_input_name", "causal_logits") != "causal_logits":
            check_known(file, "LogitScore", {"another module_input_name than causal_logits": True})
        check_known(file, "LogitScore", config)
        return cls(true, false, **_of_transformer(transformer / "sentence_bert_config.json"))

    def save(self, folder: Path, structured: bool | None) -> None:
        """Write modules.json and the files of both modules into a folder from `saving`. `structured`: the
        form of messages for the template; None: the texts alone."""
        package = "sentence_transformers"
        kinds = (
            ("", f"{package}.base.modules.transformer.Transformer"),
            ("1_LogitScore", f"{package}.cross_encoder.modules.logit_score.LogitScore"),
        )
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(kinds)
        ]
        write_json(folder / "modules.json", modules)
        config: dict[str, Any] = {
            "transformer_task": "text-generation",
            "module_output_name": "causal_logits",
            "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
        }
        if structured is not None:
            shape = "structured" if structured else "flat"
            method = {**config["modality_config"]["text"], "format": shape}
            config["modality_config"]["message"] = method
        if self.variables:
            config["processing_kwargs"] = {"chat_template": self.variables}
        write_json(folder / "sentence_bert_config.json", config)
        (folder / "1_LogitScore").mkdir(exist_ok=True)
        ids = {"true_token_id": self.true_token_id, "false_token_id": self.false_token_id}
        write_json(folder / "1_LogitScore" / "config.json", {**ids, "module_input_name": "causal_logits"})


def _of_transformer(file: Path) -> dict[str, Any]:
    """The settings in sentence_bert_config.json; FileError for any that a reranker here does not follow."""
    config = read_json(file, limit=MOST_CONFIG) if has_file(file) else {}
    what = "a reranker's Transformer"
    task = config.pop("transformer_task", "text-generation")
    if task != "text-generation":
        check_known(file, what, {f"the transformer_task {task!r}": True})
    longest = config.pop("max_seq_length", None)
    if longest is not None and (type(longest) is not int or longest < 1):
        raise FileError(f"{file}: max_seq_length must be a number from 1, and is {longest!r:.60}")
    modalities, processing = config.pop("modality_config", None) or {}, config.pop("processing_kwargs", None)
    if not isinstance(modalities, dict) or not isinstance(processing or {}, dict):
        raise FileError(f"{file}: modality_config and processing_kwargs must be mappings")
    message = modalities.get("message")
    variables = dict((processing or {}).get("chat_template") or {})
    known = {"tokenize", "return_dict", "padding", "truncation", "max_length", "return_tensors"}
    rest = {f"processing_kwargs {name}": True for name in (processing or {}) if name != "chat_template"}
    rest |= {f"processing_kwargs chat_template.{name}": True for name in known & variables.keys()}
    rest |= {f"modality_config {name}": True for name in modalities if name not in ("text", "message")}
    if not variables.pop("restore_suffix", True):
        rest["processing_kwargs chat_template.restore_suffix = false"] = True
    check_known(file, what, rest)
    for name in ("module_output_name", "unpad_inputs", "model_args", "model_kwargs", "tokenizer_args"):
        config.pop(name, None)
    check_known(file, what, {name: value for name, value in config.items() if value != {}})
    structured = None if message is None else message.get("format") == "structured"
    plain = bool(modalities) and message is None
    return {"plain": plain, "structured": structured, "variables": variables, "max_length": longest}


class Judge:
    """Tokens and scores of pairs by a causal language model."""

    def __init__(self, model: AutoModelForCausalLM, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self._checked: tuple[Any, bool] | None = None
        if model.spec.causal is False:
            raise ValueError(
                f"{model.name_or_path or 'the model'} sees later tokens (is_causal is false), and its logits "
                "do not predict a next token"
            )

    def tokenise(
        self, tokenizer: Tokenizer, queries: list[str], documents: list[str], prompt: str, max_length: int
    ) -> tuple[list[Tokens], int]:
        """The tokens of each pair, at most `max_length`, and how many pairs were cut."""
        if self.settings.plain or not tokenizer.chat_template:
            return tokenise(tokenizer, [prompt + query for query in queries], documents, max_length)
        structured = self._structured(tokenizer)
        pairs = zip(queries, documents, strict=True)
        texts = [self._render(tokenizer, pair, prompt, structured) for pair in pairs]
        options: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False}
        cut = tokenizer(texts, truncation=True, max_length=max_length, return_truncated=True, **options)
        rows: list[list[int]] = cut["input_ids"]
        if any(cut["truncated"]):
            end = self._end(tokenizer, prompt, structured)
            for row, truncated in zip(rows, cut["truncated"], strict=True):
                kept = min(len(end), len(row)) if truncated else 0
                if kept:  # what the template ends with is what the score depends on
                    row[-kept:] = end[-kept:]
        return [Tokens(row) for row in rows], sum(cut["truncated"])

    def save(self, folder: Path, tokenizer: Tokenizer) -> None:
        """Write what the modules of sentence-transformers need into a folder from `saving`."""
        plain = self.settings.plain or not tokenizer.chat_template
        self.settings.save(folder, None if plain else self._structured(tokenizer))

    def scores(self, ran: Ran) -> Tensor:
        """The score of each pair, [B, 1]."""
        last = ran.hidden[ran.batch.packed.last()]
        logits = self.model.logits(last)
        found = logits[:, self.settings.true_token_id]
        if self.settings.false_token_id is not None:
            found = found - logits[:, self.settings.false_token_id]
        return found[:, None]

    def _render(self, tokenizer: Tokenizer, pair: Sequence[str], prompt: str, structured: bool) -> str:
        roles = (
            (("system", prompt), *zip(ROLES, pair, strict=True)) if prompt else zip(ROLES, pair, strict=True)
        )
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if structured else text}
            for role, text in roles
        ]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **self.settings.variables)
        return text

    def _structured(self, tokenizer: Tokenizer) -> bool:
        """Whether the template takes lists of parts. Raises ValueError for a template that has no place for
        the two texts: all pairs would have the same score."""
        if self._checked is None or self._checked[0] != tokenizer.chat_template:
            asked = self.settings.structured
            for structured in (False, True) if asked is None else (asked,):
                texts = [self._render(tokenizer, pair, "", structured) for pair in PROBES]
                if len(set(texts)) == len(PROBES):
                    self._checked = tokenizer.chat_template, structured
                    break
            else:
                raise ValueError(
                    f"the chat template of {self.model.name_or_path or 'the model'} does not show messages "
                    f"with the roles {' and '.join(ROLES)}, in which a reranker gets a pair: set "
                    "tokenizer.chat_template to the template that the model was trained with"
                )
        return self._checked[1]

    def _end(self, tokenizer: Tokenizer, prompt: str, structured: bool) -> list[int]:
        """The tokens with which the template ends, whatever the texts are."""
        first, second = (
            tokenizer(self._render(tokenizer, pair, prompt, structured), add_special_tokens=False)[
                "input_ids"
            ]
            for pair in (("0", "0"), ("1 2 3 4", "1 2 3 4"))
        )
        shorter, same = min(len(first), len(second)), 0
        while same < shorter and first[-1 - same] == second[-1 - same]:
            same += 1
        return list(first[len(first) - same :]) if 0 < same < shorter else []
