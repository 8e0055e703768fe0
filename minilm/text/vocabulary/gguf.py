"""A tokenizer from the metadata of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The file has the vocabulary, not the pipeline: `tokenizer.ggml.model` is its kind ("gpt2": byte-level BPE,
"llama": sentencepiece BPE by scores) and `tokenizer.ggml.pre` names one of llama.cpp's ways to split a text
into words. Missing flags have llama.cpp's defaults.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import default_token
from .build import SPLITTINGS, Splitting, byte_level_bpe, plain_sentencepiece
from .errors import TokenizerError, backend_errors
from .sentencepiece import Algorithm, Kind, Piece, SentencePieceModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

logger = logging.getLogger(__name__)

# Different names in llama.cpp for the same way of splitting.
_ALIASES = {
    "gpt2": "gpt-2",
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral"), "llama-bpe"),
    "deepseek-r1-qwen": "qwen2",
}
# Files older than `tokenizer.ggml.pre` do not say how to split; the family is the best guess.
_OF_ARCHITECTURE = {"llama": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2", "gpt2": "gpt-2"}
_SPECIAL_TOKENS = {
    "bos_token": ("bos_token_id",),
    "eos_token": ("eos_token_id",),
    "unk_token": ("unknown_token_id",),
    "sep_token": ("separator_token_id", "seperator_token_id"),  # misspelt in files before 2025
    "pad_token": ("padding_token_id",),
    "cls_token": ("cls_token_id",),
    "mask_token": ("mask_token_id",),
}


def tokenizer_from_gguf(metadata: Mapping[str, Any], file: Path) -> tuple[Backend, dict[str, Any]]:
    """The pipeline, and the settings as in tokenizer_config.json: special tokens, `add_bos_token`,
    `add_eos_token`, `chat_template`. `file` is for error messages."""
    fields = _Fields(metadata, file)
    model = fields.get("model", str, None)
    tokens = fields.strings("tokens")
    if model is None or tokens is None:
        raise TokenizerError(f"{file}: a GGUF file without a tokenizer (no tokenizer.ggml.model or .tokens)")
    kinds = _kinds(fields, len(tokens))
    tokens, mark = _distinct(tokens)
    if model == "gpt2":
        backend, adds_bos = _byte_level(fields, tokens, kinds)
    elif model == "llama":
        backend, adds_bos = _sentencepiece(fields, tokens, kinds), True
    else:
        raise TokenizerError(f"{file}: tokenizer.ggml.model is {model!r}, expected 'gpt2' or 'llama'")

    if mark:
        from tokenizers import decoders

        backend.decoder = decoders.Sequence([decoders.Replace(mark, ""), backend.decoder])

    settings: dict[str, Any] = {
        "add_bos_token": fields.get("add_bos_token", bool, adds_bos),
        "add_eos_token": fields.get("add_eos_token", bool, False),
    }
    for name, keys in _SPECIAL_TOKENS.items():
        index = next((i for key in keys if (i := fields.get(key, int, None)) is not None), None)
        if index is None:
            index = default_token(metadata, name.removesuffix("_token"))
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise TokenizerError(f"{file}: {keys[0]} is {index}, but there are {len(tokens)} tokens")
        settings[name] = tokens[index]
    template = metadata.get("tokenizer.chat_template")
    named = {
        key.removeprefix("tokenizer.chat_template."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.chat_template.") and isinstance(value, str)
    }
    if named and isinstance(template, str):
        settings["chat_template"] = {"default": template, **named}
    elif named or template is not None:
        settings["chat_template"] = named or template
    return backend, settings


def _distinct(tokens: list[str]) -> tuple[list[str], str]:
    """Make all tokens distinct. Returns them, and the marker character that was appended to duplicates, as
    often as needed; "" if all were different.

    A pipeline identifies a token by its text. Among duplicates, texts are encoded to the last one, as in
    transformers; the ids of the others keep their text, from which decoding removes the marker.
    """
    last = {token: index for index, token in enumerate(tokens)}
    if len(last) == len(tokens):
        return tokens, ""
    used = set().union(*tokens)
    mark = next(chr(code) for code in range(0xFDD0, 0xFDF0) if chr(code) not in used)  # for internal use only
    times: dict[str, int] = {}
    distinct = []
    for index, token in enumerate(tokens):
        if index != last[token]:
            times[token] = times.get(token, 0) + 1
            token += mark * times[token]
        distinct.append(token)
    return distinct, mark


def _byte_level(fields: _Fields, tokens: list[str], kinds: list[Kind]) -> tuple[Backend, bool]:
    from tokenizers import AddedToken

    lines = fields.strings("merges")
    if lines is None:
        raise TokenizerError(f"{fields.file}: a byte-level BPE without tokenizer.ggml.merges")
    merges = []
    for line in lines:
        at = line.find(" ", 1)  # the left token may itself start with a space
        if at < 0:
            raise TokenizerError(f"{fields.file}: the merge {line!r} does not name two tokens")
        merges.append((line[:at], line[at + 1 :]))
    splitting = _splitting(fields)
    backend = byte_level_bpe(
        {token: index for index, token in enumerate(tokens)},
        merges,
        splitting,
        add_prefix_space=fields.get("add_space_prefix", bool, False),
        source=str(fields.file),
    )
    special = (Kind.CONTROL, Kind.UNKNOWN)
    with backend_errors(str(fields.file)):
        backend.add_tokens(
            [
                AddedToken(token, normalized=False, special=kind in special)
                for token, kind in zip(tokens, kinds, strict=True)
                if kind in (*special, Kind.USER_DEFINED) and token
            ]
        )
    return backend, splitting.adds_bos


def _splitting(fields: _Fields) -> Splitting:
    name = fields.get("pre", str, None)
    if name is None:
        architecture = fields.metadata.get("general.architecture")
        name = _OF_ARCHITECTURE.get(str(architecture), "gpt-2")
        logger.warning(
            "%s does not say how it splits text into words (tokenizer.ggml.pre), taking %r", fields.file, name
        )
    name = _ALIASES.get(name, name)
    if name not in SPLITTINGS:
        known = ", ".join(sorted({*SPLITTINGS, *_ALIASES}))
        raise TokenizerError(f"{fields.file}: tokenizer.ggml.pre is {name!r}, expected one of {known}")
    return SPLITTINGS[name]


def _sentencepiece(fields: _Fields, tokens: list[str], kinds: list[Kind]) -> Backend:
    scores = fields.floats("scores")
    if scores is None or len(scores) != len(tokens):
        found = "none" if scores is None else str(len(scores))
        raise TokenizerError(f"{fields.file}: expected {len(tokens)} tokenizer.ggml.scores, found {found}")
    # Apart from the pieces, llama.cpp stores only this setting of sentencepiece. Text is neither normalised
    # nor stripped, and a space is also added after each special token.
    model = SentencePieceModel(
        file=fields.file,
        pieces=tuple(Piece(*piece) for piece in zip(tokens, scores, kinds, strict=True)),
        algorithm=Algorithm.BPE,
        byte_fallback=True,
        unk_id=fields.get("unknown_token_id", int, 0),
        add_dummy_prefix=fields.get("add_space_prefix", bool, True),
        remove_extra_whitespaces=False,
    )
    return plain_sentencepiece(model)


def _kinds(fields: _Fields, count: int) -> list[Kind]:
    numbers = fields.get("token_type", list, None)
    if numbers is None:
        return [Kind.NORMAL] * count
    if len(numbers) != count:
        raise TokenizerError(f"{fields.file}: {len(numbers)} tokenizer.ggml.token_type for {count} tokens")
    kinds = {0: Kind.NORMAL, **{int(kind): kind for kind in Kind}}
    try:
        return [kinds[number] for number in numbers]
    except (TypeError, KeyError) as problem:
        raise TokenizerError(
            f"{fields.file}: tokenizer.ggml.token_type: no such type: {problem}"
        ) from problem


class _Fields:
    """The fields `tokenizer.ggml.*`, checked for their types."""

    def __init__(self, metadata: Mapping[str, Any], file: Path) -> None:
        self.metadata, self.file = metadata, file

    def get(self, name: str, kind: Any, default: Any) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            return default
        if hasattr(value, "tolist"):  # of numpy
            value = value.tolist()
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = kind.__name__
            raise TokenizerError(f"{self.file}: tokenizer.ggml.{name} is {value!r:.60}, expected a {wanted}")
        return value

    def strings(self, name: str) -> list[str] | None:
        return self._array(name, str)

    def floats(self, name: str) -> list[float] | None:
        values = self._array(name, (int, float))
        return None if values is None else [float(value) for value in values]

    def _array(self, name: str, kind: Any) -> list[Any] | None:
        values = self.get(name, list, None)
        if values is None:
            return None
        for index, value in enumerate(values):
            if not isinstance(value, kind) or value != value:
                raise TokenizerError(f"{self.file}: tokenizer.ggml.{name}[{index}] is {value!r:.60}")
        return list(values)
