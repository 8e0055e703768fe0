"""From the files of a checkpoint to a pipeline and its settings.

tokenizer.json is a complete pipeline, is used unchanged and takes precedence over older files. The other
settings are in tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat_template.jinja.
Padding or truncation stored in tokenizer.json is dropped: only the arguments of a call set it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import MOST_CONFIG, MOST_TEMPLATE, has_file, read_json, read_text
from .build import (
    SPLITTINGS,
    albert,
    byte_level_bpe,
    deberta,
    llama,
    plain_sentencepiece,
    read_merges,
    read_vocab_json,
    wordpiece,
    xlm_roberta,
)
from .errors import TokenizerError, backend_errors
from .families import FAMILIES, GENERIC, Family, adds, family_of, set_frame
from .gguf import tokenizer_from_gguf
from .sentencepiece import Algorithm, read_sentencepiece
from .tokenizer_json import from_tokenizer_json

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

MAX_SENTINELS = 10_000
MARIAN_FILE = "source.spm"
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model")


@dataclass
class Parts:
    """The parts of a Tokenizer. `settings`: names and values as in tokenizer_config.json, special tokens as
    plain strings."""

    backend: Backend
    settings: dict[str, Any]
    family: Family = GENERIC
    more: Any = None
    """A `Marian` (`minilm.text.vocabulary.marian`), if the tokenizer is one."""


def load(
    path: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    class_name: str | None = None,
    merges_file: str | os.PathLike[str] | None = None,
) -> Parts:
    """The tokenizer in the folder or file `path`. `overrides` take precedence over the files; `class_name`
    sets the family if the files do not, or to override them. `merges_file`: if None, next to vocab.json."""
    overrides = {key: value for key, value in (overrides or {}).items() if value is not None}
    config: dict[str, Any] = {}
    model: dict[str, Any] = {}
    if path.is_dir():
        config = _read_config(path)
        if has_file(path / "config.json", error=TokenizerError):
            model = read_json(path / "config.json", limit=MOST_CONFIG, error=TokenizerError)
    names = [class_name, config.pop("tokenizer_class", None), model.get("tokenizer_class")]
    named = next((name for name in names if isinstance(name, str)), None)
    model_type = model.get("model_type") if isinstance(model.get("model_type"), str) else None
    family = family_of(named, model_type)
    source = _vocabulary(path, family) if path.is_dir() else path
    if not has_file(source, error=TokenizerError):
        raise TokenizerError(f"{source}: no such file")
    if named is None and model_type is None:
        family = _guess(source)
    if family is GENERIC and source.suffix == ".model" and model_type in ("llama", "mistral"):
        config = {
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "add_bos_token": True,
            **config,
        }

    explicit = {**config, **overrides}
    for name in ("src_lang", "tgt_lang"):
        if name in overrides and not family.languages:
            raise TokenizerError(
                f"{path}: {name}={overrides[name]!r:.40} has no effect, its texts have no language"
            )
    if source.name == MARIAN_FILE:
        from .marian import read_marian

        backend, marian = read_marian(source.parent, explicit)
        return replace(_complete(backend, explicit, overrides, family, str(path)), more=marian)
    if source.suffix == ".gguf":
        backend, in_metadata = tokenizer_from_gguf(_read_gguf(source), source)
        explicit, family = {**in_metadata, **overrides}, GENERIC
    elif source.suffix == ".json" and source.name != "vocab.json":
        backend = from_tokenizer_json(source, family, explicit, overrides)
    else:
        backend = _from_vocabulary(source, family, explicit, merges_file)
        if family.sentinels and source.suffix == ".model":
            _add_sentinels(backend, family, explicit, str(path))
        if family.languages and source.suffix == ".model":
            _list_special(explicit, family.languages)
    return _complete(backend, explicit, overrides, family, str(path))


def from_object(backend: Backend, settings: Mapping[str, Any], class_name: str | None) -> Parts:
    """A copy of a `tokenizers.Tokenizer` with settings."""
    from tokenizers import Tokenizer

    if not isinstance(backend, Tokenizer):
        raise TokenizerError(
            f"tokenizer_object: expected a tokenizers.Tokenizer, got {type(backend).__name__}"
        )
    copy = Tokenizer.from_str(backend.to_str())
    return _complete(copy, dict(settings), settings, family_of(class_name, None), "tokenizer_object")


def _complete(
    backend: Backend, explicit: dict[str, Any], overrides: Mapping[str, Any], family: Family, source: str
) -> Parts:
    """Add special tokens to the pipeline, and those around a text. `source` is for error messages."""
    flags = _read_special_tokens(explicit, source)
    added = {key: explicit.pop(key, None) for key in ("added_tokens_decoder", "added_tokens")}
    settings = explicit
    for name, text in family.special_tokens.items():
        # Skip defaults that are not in the vocabulary: they would get an id without an embedding.
        if name not in settings and backend.token_to_id(text) is not None:
            settings[name] = text
    if family.mask_takes_space and "mask_token" in settings:
        flags.setdefault(settings["mask_token"], {"lstrip": True})
    given = {t.content for t in overrides.values() if hasattr(t, "content") and hasattr(t, "lstrip")}
    _add_tokens(backend, settings, flags, added, given, source)

    framed = backend.post_processor is not None
    for name, token, at, default in (
        ("add_bos_token", "bos_token", 0, family.adds_bos),
        ("add_eos_token", "eos_token", -1, family.adds_eos),
    ):
        if settings.get(name) is None:
            settings[name] = adds(backend, settings.get(token), at) if framed else default
        if not isinstance(settings[name], bool):
            raise TokenizerError(f"{source}: {name} is {settings[name]!r:.60}, expected true or false")
    asked = "add_bos_token" in overrides or "add_eos_token" in overrides
    if (not framed and not family.languages) or (asked and family.frame == "bos-eos"):  # MBartTokenizer does
        set_frame(backend, family.frame, settings)
    return Parts(backend, settings, family)


def _vocabulary(folder: Path, family: Family) -> Path:
    """The file in `folder` that defines the pipeline."""
    if family.frame == "marian" and has_file(folder / MARIAN_FILE, error=TokenizerError):
        return folder / MARIAN_FILE
    if has_file(folder / "tokenizer.json", error=TokenizerError):
        return folder / "tokenizer.json"
    older = {
        "bert": ["vocab.txt"],
        "roberta": ["vocab.json"],
        "xlm-roberta": ["sentencepiece.bpe.model"],
        "mbart": ["sentencepiece.bpe.model"],
        "mbart-50": ["sentencepiece.bpe.model"],
        "marian": [MARIAN_FILE],
        "bos-eos": [],
    }[family.frame]
    for name in (*older, *SENTENCEPIECE_FILES, "vocab.json", "vocab.txt"):
        if has_file(folder / name, error=TokenizerError):
            return folder / name
    quantised = sorted(folder.glob("*.gguf"))
    if len(quantised) == 1:
        return quantised[0]
    if quantised:
        raise TokenizerError(
            f"{folder}: {len(quantised)} GGUF files, choose one with gguf_file=: "
            f"{', '.join(file.name for file in quantised)}"
        )
    hint = " (tekken.json is not supported)" if (folder / "tekken.json").is_file() else ""
    raise TokenizerError(
        f"{folder}: no tokenizer: expected tokenizer.json, {', '.join(SENTENCEPIECE_FILES)}, vocab.json with "
        f"merges.txt, vocab.txt, or a GGUF file{hint}"
    )


def _guess(source: Path) -> Family:
    """The family of vocabulary files without any configuration."""
    if source.name == "vocab.txt":
        return FAMILIES["BertTokenizer"]
    if source.name == "sentencepiece.bpe.model":
        return FAMILIES["XLMRobertaTokenizer"]
    if source.name == "vocab.json":
        vocab = read_vocab_json(source)
        roberta = {"<s>", "<pad>", "</s>", "<unk>", "<mask>"} <= vocab.keys()
        return FAMILIES["RobertaTokenizer" if roberta else "GPT2Tokenizer"]
    if source.name == "spiece.model":  # T5's, and those of other models
        first = [piece.text for piece in read_sentencepiece(source).pieces[:3]]
        return FAMILIES["T5Tokenizer"] if first == ["<pad>", "</s>", "<unk>"] else GENERIC
    return FAMILIES["LlamaTokenizer"] if source.name == "tokenizer.model" else GENERIC


def _add_sentinels(backend: Backend, family: Family, settings: dict[str, Any], source: str) -> None:
    """Add T5's sentinels to the pieces, the last one first."""
    from tokenizers import AddedToken

    count = settings.get("extra_ids")
    count = family.sentinels if count is None else count
    if type(count) is not int or not 0 <= count <= MAX_SENTINELS:
        raise TokenizerError(
            f"{source}: extra_ids is {count!r:.60}, expected a number from 0 to {MAX_SENTINELS}"
        )
    names = [f"<extra_id_{number}>" for number in reversed(range(count))]
    backend.add_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    _list_special(settings, names[::-1])


def _list_special(settings: dict[str, Any], names: Sequence[str]) -> None:
    """Add `names` to the special tokens without a name."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if isinstance(extra, list):
        told = {token["content"] if isinstance(token, dict) else str(token) for token in extra}
        settings.pop("additional_special_tokens", None)
        settings["extra_special_tokens"] = [*extra, *(name for name in names if name not in told)]


def _from_vocabulary(
    source: Path, family: Family, settings: Mapping[str, Any], merges: str | os.PathLike[str] | None
) -> Backend:
    def token(name: str, default: str) -> str:
        text = settings.get(name, family.special_tokens.get(name, default))
        return str(text["content"] if isinstance(text, dict) else text)

    if source.suffix == ".model":
        if family.name == "CamembertTokenizer":  # its ids are not those of XLM-RoBERTa
            raise TokenizerError(
                f"{source}: a CamemBERT tokenizer is read from tokenizer.json only, and the folder has none; "
                "write it with transformers' save_pretrained"
            )
        model = read_sentencepiece(source)
        if family.name == "DebertaV2Tokenizer":
            return deberta(model, settings, token("mask_token", "[MASK]"))
        prefix = settings.get("add_prefix_space")
        if family.frame in ("xlm-roberta", "mbart", "mbart-50"):
            return xlm_roberta(
                model,
                add_prefix_space=prefix is not False,
                mask_token=token("mask_token", "<mask>"),
                languages=family.languages,
            )
        if family.name == "AlbertTokenizer":
            return albert(model, settings)
        if family.name == "LlamaTokenizer" and model.algorithm is Algorithm.BPE:
            return llama(
                model, legacy=bool(settings.get("legacy", False)), add_prefix_space=prefix is not False
            )
        return plain_sentencepiece(model)
    if source.suffix == ".txt":
        return wordpiece(source, token("unk_token", "[UNK]"), settings)
    merges_file = Path(merges) if merges is not None else source.with_name("merges.txt")
    splitting = SPLITTINGS["qwen2" if family.name == "Qwen2Tokenizer" else "gpt-2"]
    return byte_level_bpe(
        read_vocab_json(source),
        read_merges(merges_file),
        splitting,
        add_prefix_space=bool(settings.get("add_prefix_space", False)),
        source=f"{source} and {merges_file.name}",
    )


def _read_gguf(path: Path) -> dict[str, Any]:
    from ...files import read_gguf_metadata

    try:
        return read_gguf_metadata(path)
    except ValueError as problem:  # WeightError
        raise TokenizerError(str(problem)) from problem


def _read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed from the other files in the folder."""
    file = folder / "tokenizer_config.json"
    config = read_json(file, error=TokenizerError) if has_file(file, error=TokenizerError) else {}
    for key in ("name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file"):
        config.pop(key, None)  # paths on the machine that saved it, which must not be opened here
    if has_file(folder / "tokenizer.json", error=TokenizerError):
        config.pop("add_bos_token", None)  # tokenizer.json already does what was intended
        config.pop("add_eos_token", None)
    if "added_tokens_decoder" not in config:
        for name in ("special_tokens_map.json", "added_tokens.json"):
            if has_file(folder / name, error=TokenizerError):
                found = read_json(folder / name, error=TokenizerError)
                config.update(found if name == "special_tokens_map.json" else {"added_tokens": found})
    templates = {file.stem: file for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if has_file(folder / "chat_template.jinja", error=TokenizerError):
        templates["default"] = folder / "chat_template.jinja"
    if templates:
        texts = {
            name: read_text(file, limit=MOST_TEMPLATE, error=TokenizerError)
            for name, file in templates.items()
        }
        config["chat_template"] = texts["default"] if list(texts) == ["default"] else texts
    return config


def _read_special_tokens(settings: dict[str, Any], path: str) -> dict[str, dict[str, bool]]:
    """Convert the special tokens in `settings` to plain strings. Returns their flags, by token."""
    flags: dict[str, dict[str, bool]] = {}

    def text_of(key: str, value: Any) -> str:
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            flags[value["content"]] = {
                flag: bool(value[flag])
                for flag in ("lstrip", "rstrip", "single_word", "normalized")
                if flag in value
            }
            return str(value["content"])
        if hasattr(value, "content") and hasattr(value, "lstrip"):  # a tokenizers.AddedToken
            names = ("content", "lstrip", "rstrip", "single_word", "normalized")
            return text_of(key, {name: getattr(value, name) for name in names})
        if not isinstance(value, str):
            raise TokenizerError(f"{path}: {key} is {value!r:.60}, expected a string")
        return value

    extra = settings.pop("additional_special_tokens", None) or []
    extra = settings.pop("extra_special_tokens", None) or extra
    for key in [key for key in settings if key.endswith("_token") and not isinstance(settings[key], bool)]:
        if settings[key] is None:
            del settings[key]
        else:
            settings[key] = text_of(key, settings[key])
    if isinstance(extra, dict):  # named ones, of models for images or sound
        settings.update({key: text_of(key, value) for key, value in extra.items()})
        extra = []
    if not isinstance(extra, (list, tuple)):
        raise TokenizerError(f"{path}: extra_special_tokens is {extra!r:.60}, expected a list")
    settings["extra_special_tokens"] = [text_of("extra_special_tokens", value) for value in extra]
    return flags


def _add_tokens(
    backend: Backend,
    settings: Mapping[str, Any],
    flags: Mapping[str, Mapping[str, bool]],
    added: Mapping[str, Any],
    asked: Set[str],
    path: str,
) -> None:
    """Add the special tokens, and those that the files add to the vocabulary, to `backend`.

    For a token that it already has, the flags in tokenizer_config.json's added_tokens_decoder take precedence
    over those in tokenizer.json, as in transformers, and a named token (mask_token) is special; `asked` are
    tokens whose flags the caller gave, which take precedence over all.
    """
    from tokenizers import AddedToken

    named = [text for key, text in settings.items() if key.endswith("_token") and isinstance(text, str)]
    special = [*named, *settings["extra_special_tokens"]]
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    numbered: dict[int, AddedToken] = {}
    decoder = added["added_tokens_decoder"] or {}
    try:
        for index, token in decoder.items():
            numbered[int(index)] = token if isinstance(token, AddedToken) else AddedToken(**token)
        for text, index in (added["added_tokens"] or {}).items():
            numbered[int(index)] = AddedToken(text, normalized=text not in special, special=text in special)
    except (TypeError, ValueError, AttributeError) as problem:
        raise TokenizerError(f"{path}: the added tokens are damaged: {problem}") from problem
    new: dict[str, int] = {}
    batch: list[AddedToken] = []
    for index, token in sorted(numbered.items(), key=lambda item: item[0]):
        there = known.get(token.content)
        if there is None:
            new[token.content] = index
        elif not decoder or _same(token, there):
            continue  # precedence: added_tokens_decoder, tokenizer.json, added_tokens.json
        token.special = token.special or token.content in special
        batch.append(token)
    touched = {token.content for token in batch} | asked
    for text in dict.fromkeys(named):
        there = known.get(text)
        if there is not None and not there.special and text not in touched:
            there.special = True
            batch.append(there)
    for text in dict.fromkeys(special):
        if text in asked or (text not in known and text not in new):
            batch.append(AddedToken(text, special=True, **flags.get(text, {})))
    with backend_errors(f"{path}: special tokens"):
        backend.add_tokens(batch)  # all at once: the library rebuilds its search at every call
    for text, index in new.items():
        if backend.token_to_id(text) != index:
            raise TokenizerError(
                f"{path}: the added token {text!r} has id {index}, but the next one would be "
                f"{backend.token_to_id(text)}"
            )


def _same(one: AddedToken, other: AddedToken) -> bool:
    names = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    return all(getattr(one, name) == getattr(other, name) for name in names)
