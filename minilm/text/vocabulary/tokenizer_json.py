"""tokenizer.json: a complete pipeline of the `tokenizers` library.

It is used unchanged. transformers 5 keeps only the vocabulary and the merges if it knows the class, and so
loses, for example, SmolLM2's splitting into single digits. Here a setting changes only the step that it is
about.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import read_json
from .build import SPACE, SPLITTINGS
from .errors import TokenizerError, backend_errors
from .families import GENERIC, Family
from .limits import check, check_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_BERT_NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def from_tokenizer_json(
    path: Path, family: Family, settings: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Backend:
    """The pipeline in `path`. All `settings` apply if the class is known, else only `overrides`, which the
    caller gave. Padding and truncation stored in the file are dropped."""
    from tokenizers import Tokenizer

    data = read_json(path, error=TokenizerError)
    check(data, str(path), known=tuple(pattern for kind in SPLITTINGS.values() for pattern in kind.patterns))
    before = copy.deepcopy([data.get(name) for name in _STEPS])
    without = "first" if family.name == "DebertaV2Tokenizer" else "never"
    _apply(data, settings, overrides if family is GENERIC else settings, without)
    if family.name == "LlamaTokenizer":
        _as_llama(data, settings)
    with backend_errors(f"{path}: not a file of the tokenizers library"):
        if before == [data.get(name) for name in _STEPS]:
            backend = Tokenizer.from_file(str(path))
        else:
            backend = Tokenizer.from_str(json.dumps(data))
        backend.no_truncation()
        backend.no_padding()
        check_ids(backend, data, str(path))
        backend.decode(backend.encode("a b", "c").ids)  # some damage is detected only in use
    return backend


def _apply(
    data: Mapping[str, Any], settings: Mapping[str, Any], names: Collection[str], without: str
) -> None:
    """Change the steps in `data` by those `settings` whose names are in `names`. `without`: Metaspace's
    prepend_scheme for add_prefix_space = false."""
    for step in _steps(data, "normalizer", "normalizers"):
        if step.get("type") == "BertNormalizer":
            step.update({key: settings[name] for name, key in _BERT_NORMALIZER.items() if name in names})
    prefix = settings["add_prefix_space"] if "add_prefix_space" in names else None
    if not isinstance(prefix, bool):
        return
    for step in (
        *_steps(data, "pre_tokenizer", "pretokenizers"),
        *_steps(data, "post_processor", "processors"),
        *_steps(data, "decoder", "decoders"),
    ):
        if step.get("type") == "Metaspace":
            step.pop("add_prefix_space", None)  # the older name of prepend_scheme
            step["prepend_scheme"] = "always" if prefix else without
        elif "add_prefix_space" in step:
            step["add_prefix_space"] = prefix


def _as_llama(data: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """`legacy` controls the space after special tokens, for any pipeline in the file, as in transformers
    5."""
    model = data.get("model")
    if not isinstance(model, dict) or not model.get("byte_fallback"):
        return  # a Llama 3 tokenizer with the class name of Llama 2: bytes, not "▁"
    prefix = settings.get("add_prefix_space") is not False
    scheme = ("always" if settings.get("legacy", False) else "first") if prefix else "never"
    data["normalizer"] = None
    data["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": scheme,
        "split": False,
    }
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    data["decoder"] = {"type": "Sequence", "decoders": steps}


def _steps(data: Mapping[str, Any], name: str, inside: str) -> list[dict[str, Any]]:
    """A step of the pipeline, or the steps of a sequence."""
    step = data.get(name)
    if not isinstance(step, dict):
        return []
    inner = step.get(inside)
    return [item for item in inner if isinstance(item, dict)] if isinstance(inner, list) else [step]
